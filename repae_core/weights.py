"""Weights files: safetensors or torch's, local or remote; never unpickles code."""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from repae_core.remote_files import local_copy, split_checksum

# What torch's readers raise on bytes of another kind: any text starts like some pickle.
_DAMAGED = (
    SafetensorError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError,
    AssertionError, struct.error,
)  # fmt: skip


def read_torch_file(path: str) -> Any:
    """Content of a file of `torch.save`, or the tensors of a `.safetensors` file; path, fsspec URL: see `local_copy`.

    Read with `weights_only=True`: tensors, numbers, text and containers of them. Beyond torch's own list only
    `argparse.Namespace` is let in, which published checkpoints keep their settings in. Tensors are on the CPU.

    Raises:
        ValueError: one line naming the file: not found, not readable, or holding code, which is not run.
    """
    name, _ = split_checksum(path)
    local = local_copy(path)
    try:
        if name.endswith(".safetensors"):
            return load_file(local)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # Such files are refused below, in one line.
            warnings.filterwarnings("ignore", ".*(TorchScript archive|pickle protocol)", UserWarning)
            return torch.load(local, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"Unsupported ([^\n]*)", str(error))
        if refused:
            raise ValueError(
                f"{name}: refused, because reading it would run code ({refused[1]}); only tensors, numbers, text and "
                "argparse.Namespace are read"
            ) from None
        raise ValueError(f"{name}: not a file of torch.save ({_reason(error)})") from None
    except _DAMAGED as error:
        if "TorchScript" in str(error):
            raise ValueError(
                f"{name}: a TorchScript archive, which holds code; save its tensors once, where you trust it: "
                "torch.save(torch.jit.load(file).state_dict(), 'weights.pt')"
            ) from None
        raise ValueError(f"{name}: damaged, or not a weights file ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def read_state_dict(path: str, *, within: Sequence[str] = ("state_dict",)) -> dict[str, Tensor]:
    """State dict of a weights file; `within`: entries that it may be wrapped in, tried in order.

    Raises:
        ValueError: one line naming the file: as `read_torch_file`, or not a plain state dict.
    """
    state = read_torch_file(path)
    for name in within:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not is_state_dict(state):
        raise ValueError(f"{path}: holds no plain state dict of tensors")
    return dict(state)


def is_state_dict(value: Any) -> bool:
    """Whether a value is a non-empty mapping of names to tensors."""
    entries = value.items() if isinstance(value, dict) else ()
    return bool(entries) and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in entries)


def load_weights(module: nn.Module, state: dict[str, Tensor], origin: str, *, assign: bool = False) -> None:
    """Strictly load a state dict; `origin` is the file named in an error, `assign` takes over its tensors.

    Raises:
        ValueError: one line naming the origin and what is missing, unexpected, or of another shape.
    """
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        raise ValueError(f"{origin}: does not fit the model: {' '.join(str(error).split())[:300]}") from None
