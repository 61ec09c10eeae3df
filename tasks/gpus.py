"""Whether the GPUs that a stage asks for are there: Ray would wait for them for ever, torch would take the CPU."""

from __future__ import annotations

import os

from repae_core.config import PipelineConfig, section_name
from tasks.decisions import decide_all
from tasks.plan import Plan


def require_gpus(config: PipelineConfig, stage: str) -> None:
    """Refuse a `gpus_per_worker` that this machine cannot give; the cluster at RAY_ADDRESS may start GPUs later.

    Raises:
        ValueError: one line naming the field.
    """
    name = section_name(stage)
    section = getattr(config, name)
    each, workers = getattr(section, "gpus_per_worker", 0), getattr(section, "workers", 0)
    if not each or (workers and os.environ.get("RAY_ADDRESS")):
        return
    needed, found = each * workers or 1, gpus_here()  # a process alone works on one
    if needed > found:
        raise ValueError(
            f"{name}.gpus_per_worker={each}: with workers={workers} that is {needed} GPU(s), and this machine has "
            f"{found}; 0 is the CPU" + (", RAY_ADDRESS names a cluster with more" if workers else "")
        )


def require_gpus_of_pipeline(config: PipelineConfig, plan: Plan, forced: set[str]) -> None:
    """The same for every stage that will run: not after days of work on the others. ValueError as there."""
    if any(getattr(getattr(config, section_name(name)), "gpus_per_worker", 0) for name in plan.stages):
        for name, decision in decide_all(plan, forced).items():
            if decision.action != "skip":
                require_gpus(config, name)


def gpus_here() -> int:
    """GPUs that torch can use on this machine."""
    import torch

    return torch.cuda.device_count()
