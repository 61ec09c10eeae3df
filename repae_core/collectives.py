"""Reductions over the processes that train together, inside models and losses."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce


def world_size() -> int:
    """Number of processes; 1 where torch.distributed does not run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over all ranks, the same on each; the gradient of every rank's result reaches every rank's values."""
    if world_size() == 1:
        return values
    if values.requires_grad:
        return all_reduce(values)
    reduced = values.clone()
    dist.all_reduce(reduced)
    return reduced


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over all ranks; see `sum_over_ranks`."""
    return sum_over_ranks(values) / world_size()
