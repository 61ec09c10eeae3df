"""Autocast of SiT and the encoders, and the guard against non-finite losses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from repae_core.training.distributed import Group

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLossError(ArithmeticError):
    """A loss term became NaN or infinite."""


def autocast(device: torch.device, mixed_precision: str) -> AbstractContextManager[object]:
    """`no`: nothing; `bf16` / `fp16`: torch autocast of that type.

    Raises:
        ValueError: fp16 without a GPU.
    """
    if mixed_precision == "no":
        return nullcontext()
    if mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision=fp16 needs a GPU; use no or bf16 on a CPU")
    return torch.autocast(device.type, dtype=_DTYPES[mixed_precision])


def require_finite(terms: dict[str, Tensor], group: Group) -> None:
    """Stop every rank, before any optimizer steps, when a term is not finite on one of them.

    Raises:
        NonFiniteLossError: names the terms, the same on all ranks.
    """
    finite = group.all_true(torch.isfinite(torch.stack([v.detach().float() for v in terms.values()])))
    if not bool(finite.all()):
        bad = [name for name, ok in zip(terms, finite.tolist(), strict=True) if not ok]
        raise NonFiniteLossError(f"non-finite loss: {', '.join(bad)}; the last checkpoint is kept")
