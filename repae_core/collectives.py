"""Reductions over the processes that train together, inside models and losses."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        reduced = values.clone()
        dist.all_reduce(reduced)
        return reduced

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        reduced = gradients[0].clone()
        dist.all_reduce(reduced)
        return reduced


def world_size() -> int:
    """Number of processes; 1 where torch.distributed does not run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over all ranks, the same on each; the gradient of every rank's result reaches every rank's values."""
    return values if world_size() == 1 else cast(Tensor, _Sum.apply(values))


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over all ranks; see `sum_over_ranks`."""
    return sum_over_ranks(values) / world_size()
