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
    dtype = autocast_dtype(device, mixed_precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def autocast_dtype(device: torch.device, mixed_precision: str) -> torch.dtype | None:
    """The type that `autocast` computes in; None for `no`.

    Raises:
        ValueError: fp16 without a GPU.
    """
    if mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision=fp16 needs a GPU; use no or bf16 on a CPU")
    return _DTYPES.get(mixed_precision)


def use_tf32(allowed: bool) -> None:
    """Whether a GPU may compute fp32 products and convolutions in TF32 (torch's own default: convolutions only)."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def require_finite(terms: dict[str, Tensor], group: Group) -> None:
    """Stop every rank, before any optimizer steps, when a term is not finite on one of them.

    Raises:
        NonFiniteLossError: names the terms, the same on all ranks.
    """
    finite = group.all_true(torch.isfinite(torch.stack([v.detach().float() for v in terms.values()])))
    if not bool(finite.all()):
        bad = [name for name, ok in zip(terms, finite.tolist(), strict=True) if not ok]
        raise NonFiniteLossError(f"non-finite loss: {', '.join(bad)}; the last checkpoint is kept")
