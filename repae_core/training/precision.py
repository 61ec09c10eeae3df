"""Autocast of SiT and the encoders, and the guards against non-finite losses and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from repae_core.training.distributed import Group
from repae_core.training.optim import Network

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
        raise NonFiniteLossError(f"non-finite loss: {', '.join(bad)}")


@contextmanager
def at_step(step: int) -> Iterator[None]:
    """A non-finite number inside is told with the 1-based step."""
    try:
        yield
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"step {step}: {error}; checkpoints from before are kept") from error


def largest_norms(so_far: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each network's largest gradient norm, `so_far` and in this step; NaN and infinity stay."""
    norms = {name: value for name, value in metrics.items() if name.startswith("grad_norm_")}
    return dict(so_far) | {name: torch.maximum(norm, so_far.get(name, norm)) for name, norm in norms.items()}


def require_finite_gradients(norms: Mapping[str, Tensor], networks: Mapping[str, Network[Any]]) -> None:
    """Stop before a checkpoint keeps weights that a non-finite gradient of finite losses has spoilt.

    norms: of `largest_norms` since the last checkpoint. Asked where one is due, so that no other step waits for the
    device: mostly the next losses tell, but not where only weights are spoilt that few images use (a label's row).
    A network with a gradient scaler (fp16) has left such a step out by itself.

    Raises:
        NonFiniteLossError: names the networks; the norms are those of all ranks, so all of them stop.
    """
    watched = [name for name, network in networks.items() if not network.scaler.is_enabled()]
    bad = [n for n in watched if (norm := norms.get(f"grad_norm_{n}")) is not None and not bool(torch.isfinite(norm))]
    if bad:
        raise NonFiniteLossError(f"non-finite gradient of {', '.join(bad)}, in this step or since the last checkpoint")
