"""Random draws that belong to an image, not to a batch, a worker or a process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def item_generators(seed: int, stream: str, positions: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator an image: a function of (seed, stream, position) only.

    stream: names the use (`train-repae`, `generate.noise`), so that two uses never share draws.
    """
    return [torch.Generator().manual_seed(_item_seed(seed, stream, position)) for position in positions]


def _item_seed(seed: int, stream: str, position: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{stream}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes 63 bits without sign trouble


def randn(shape: Sequence[int], generators: Sequence[torch.Generator], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals [B, *shape], row i from generator i."""
    return torch.stack([torch.randn(tuple(shape), generator=g, dtype=dtype) for g in generators])


def rand(shape: Sequence[int], generators: Sequence[torch.Generator], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniforms in [0,1) [B, *shape], row i from generator i."""
    return torch.stack([torch.rand(tuple(shape), generator=g, dtype=dtype) for g in generators])
