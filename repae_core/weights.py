"""Weights files: safetensors or .pth, local or remote; never unpickles code."""

from __future__ import annotations

import io
import pickle

import fsspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn


def read_state_dict(path: str) -> dict[str, Tensor]:
    """State dict of a safetensors or `.pth` file at a local path or any fsspec URL (s3://, https://, ...).

    A `.pth` is read with `weights_only=True`. Tensors keep their type and are on the CPU.

    Raises:
        ValueError: one line naming the file: not found, not readable, or not a plain state dict.
    """
    try:
        with fsspec.open(path, "rb") as file:
            data = file.read()
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})") from None
    try:
        if path.endswith(".safetensors"):
            return load(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: not a safetensors file or a plain torch state dict ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no plain state dict of tensors")
    return state


def load_weights(module: nn.Module, state: dict[str, Tensor], origin: str, *, assign: bool = False) -> None:
    """Strictly load a state dict; `origin` is the file named in an error, `assign` takes over its tensors.

    Raises:
        ValueError: one line naming the origin and what is missing, unexpected, or of another shape.
    """
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        raise ValueError(f"{origin}: does not fit the model: {' '.join(str(error).split())[:300]}") from None
