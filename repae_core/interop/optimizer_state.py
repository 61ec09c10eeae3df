"""Optimizer states by parameter name, and as published: by position among a module's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class OptimizerState:
    """AdamW: parameter name -> {exp_avg, exp_avg_sq, step}, and the group's settings (lr, betas, ...).

    A parameter that never had a gradient has no entry.
    """

    state: dict[str, dict[str, Tensor]]
    settings: dict[str, Any]


def parameter_names(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Parameters of a module in its own order, given its state dict in that order."""
    return [name for name in state_dict if not name.endswith(_BUFFERS)]


def from_positions(saved: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], origin: str) -> OptimizerState:
    """A torch optimizer's state dict, indexed by position, as state by name.

    shapes: of the parameters, in the module's order. The optimizer may hold others around them (the published
    discriminator's also holds a log-variance before and LPIPS after): the place is where all shapes fit.

    Raises:
        ValueError: no place fits, or this is no AdamW's state.
    """
    try:
        groups = saved["param_groups"]
        indices = [index for group in groups for index in group["params"]]
        sizes = {index: list(entry["exp_avg"].shape) for index, entry in saved["state"].items()}
    except (LookupError, TypeError, AttributeError):
        raise ValueError(f"{origin}: no state dict of AdamW") from None
    names = list(shapes)
    for offset in range(len(indices) - len(names) + 1):
        placed = dict(zip(names, indices[offset:], strict=False))
        found = {name: saved["state"][index] for name, index in placed.items() if index in saved["state"]}
        strangers = set(sizes) - set(placed.values())
        if not strangers and all(sizes[placed[name]] == list(shapes[name]) for name in found):
            settings = {key: value for key, value in groups[0].items() if key != "params"}
            return OptimizerState({name: dict(entry) for name, entry in found.items()}, settings)
    raise ValueError(f"{origin}: its shapes do not fit the model's parameters")


def to_positions(optimizer: OptimizerState, names: Iterable[str], *, before: int = 0, after: int = 0) -> dict[str, Any]:
    """State by name as a torch optimizer's state dict over all parameters `names`, in the module's order.

    before, after: numbers of foreign parameters around them, which have no state.
    """
    positions = {name: before + k for k, name in enumerate(names)}
    count = before + len(positions) + after
    empty = torch.optim.AdamW([nn.Parameter(torch.zeros(())) for _ in range(count)])
    saved: dict[str, Any] = empty.state_dict()
    known = saved["param_groups"][0]
    known |= {key: value for key, value in optimizer.settings.items() if key in known and key != "params"}
    saved["state"] = {positions[name]: entry for name, entry in optimizer.state.items()}
    return saved
