"""Gradient accumulation: a worker's batch in equal parts, one optimizer step for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from repae_core.training.draws import Draws
from repae_core.training.optim import Network
from repae_core.training.state import Batch, Metrics

MicroBatch = tuple[Batch, Draws]


def micro_batches(batch: Batch, draws: Draws, count: int) -> list[MicroBatch]:
    """The batch and its draws in `count` equal parts, in order.

    Raises:
        ValueError: the batch is not divisible.
    """
    if len(batch.labels) % count:
        raise ValueError(f"a worker's {len(batch.labels)} images cannot be split into {count} equal micro-batches")
    return list(zip(batch.chunk(count), draws.chunk(count), strict=True))


def accumulate(
    network: Network[Any], parts: Sequence[MicroBatch], loss_of: Callable[[Batch, Draws], tuple[Tensor, Metrics]]
) -> Metrics:
    """Gradient of the mean loss over micro-batches, reduced over workers once; the mean of each term."""
    terms: list[Metrics] = []
    for index, part in enumerate(parts, start=1):
        with network.gradients(reduce=index == len(parts)):
            loss, metrics = loss_of(*part)
            network.backward(loss / len(parts))
        terms.append(metrics)
    if len(terms) == 1:
        return terms[0]
    return {name: torch.stack([each[name] for each in terms]).mean() for name in terms[0]}
