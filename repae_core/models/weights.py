"""Initial weights from a safetensors file."""

from __future__ import annotations

import fsspec
from safetensors.torch import load as load_safetensors
from torch import nn


def load_module_weights(module: nn.Module, path: str) -> None:
    """Strictly load a safetensors file (path or URI) into a module; nothing when `path` is empty.

    Raises:
        ValueError: not a safetensors file, or its names or shapes differ: one line naming the file.
    """
    if not path:
        return
    try:
        with fsspec.open(path, "rb") as file:
            state = load_safetensors(file.read())
        module.load_state_dict(state)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:
        raise ValueError(f"{path}: not weights of this model: {' '.join(str(error).split())[:200]}") from None
