"""What joint and latent-only runs share: the position in the data, its draws, the loop."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from repae_core.artifacts import Artifact
from repae_core.config import PipelineConfig, TrainingConfig
from repae_core.data import DataOrder, Selection, load_batches, rank_slice
from repae_core.diffusion import item_generators, rand
from repae_core.training.compiled import is_compiled
from repae_core.training.distributed import Group
from repae_core.training.draws import Draws, sample_draws
from repae_core.training.loop import LoopSettings, Report, TrainingLoop
from repae_core.training.optim import rate_factor
from repae_core.training.precision import use_tf32
from repae_core.training.state import Batch, FlowObjective, LDMState, Metrics
from repae_core.training.throughput import ThroughputMeter, matmul_peak

logger = logging.getLogger("repae_core")


class TrainingRun(ABC):
    """One worker's training, checkpointed into `folder`; subclasses say what a batch and a step are."""

    stage: str
    section: TrainingConfig
    state: LDMState
    objective: FlowObjective
    order: DataOrder
    read: Callable[[np.ndarray, np.ndarray | None], Any]  # what a batch is made of, out of the store; picklable

    def __init__(self, config: PipelineConfig, folder: Artifact, group: Group) -> None:
        self.config, self.folder, self.group = config, folder, group
        self.loop: TrainingLoop | None = None

    @abstractmethod
    def batch(self, item: Any, draws: Draws, step: int) -> Batch:
        """This rank's part of a global batch, from what `read` gave, on its device."""

    @abstractmethod
    def step(self, index: int, item: tuple[Batch, Draws]) -> Metrics:
        """One optimizer step; `index` counts from 0 over the whole run."""

    @abstractmethod
    def image_flops(self, index: int) -> float:
        """Model FLOPs of an image at a step; counted at the first call of its kind."""

    @abstractmethod
    def preview(self, step: int) -> dict[str, bytes]:
        """PNG files after `step` steps by name; the main rank calls it, and `pulse` on the way."""

    def previews(self, step: int) -> dict[str, bytes]:
        """The main rank draws, the others wait for it (nothing from them): on none of them it counts as hanging."""
        if self.group.is_main:
            pictures = self.preview(step)
            self.group.from_main(False)
            return pictures
        while self.group.from_main(True):
            self.alive()
        return {}

    def pulse(self, *_: object) -> None:
        """While pictures are drawn: they take their time."""
        self.group.from_main(True)
        self.alive()

    def alive(self) -> None:
        """A step that takes long on purpose goes on."""
        if self.loop is not None:
            self.loop.alive()

    def inherit(self, source: Artifact) -> None:  # noqa: B027
        """Take over what a run that continues another one would not make again."""

    @abstractmethod
    def specs(self) -> dict[str, Any]:
        """What a checkpoint needs to rebuild its models."""

    def run(
        self,
        *,
        report: Report,
        guard: Callable[[], None],
        record: dict[str, Any],
        init_from: Artifact | None = None,
        preempted: Callable[[], bool] = lambda: False,
        training: str = "",
    ) -> list[dict[str, float]]:
        """Train to the end from the newest checkpoint, `init_from`'s, or the start; returns the history.

        report: called with Progress; guard: called before each commit, raises when the lease is lost;
        record: JSON-able values kept in every checkpoint; preempted: see TrainingLoop; training: see CheckpointWriter.
        """
        s = self.section
        use_tf32(s.allow_tf32)
        settings = LoopSettings(
            total_steps=s.total_steps,
            batch_size=s.batch_size,
            log_every=s.log_every,
            checkpoint_every=s.checkpoint_every,
            keep_checkpoints=s.keep_checkpoints,
            preview_every=s.preview_every,
            keep_checkpoints_every=s.keep_checkpoints_every,
            checkpoint_queue=s.checkpoint_queue,
            fixed={
                "gradient_accumulation_steps": s.gradient_accumulation_steps,
                "compile": is_compiled(self.state.sit.module),
                "vae_warmup_steps": s.total_steps - s.max_steps,
                "batch_size": s.batch_size,
            },
            step_timeout=s.step_timeout if s.workers else None,
        )
        loop = TrainingLoop(
            self.state,
            self.folder,
            settings,
            record=record | self.specs(),
            report=report,
            guard=guard,
            preempted=preempted,
            training=training,
        )
        self.loop = loop
        if not loop.restore() and init_from is not None:
            if not loop.restore(init_from):
                raise ValueError(f"init_from: {init_from.uri} has no whole checkpoint")
            self.inherit(init_from)
        loop.run(self.batches(loop.start_step), self.step, self.previews, self.meter(loop.start_step))
        return loop.history

    def meter(self, start_step: int) -> ThroughputMeter | None:
        """The main rank's; every rank measures what its part of the machine can do, at the same time."""
        peak = 0.0
        if self.section.measure_peak:
            peak = matmul_peak(self.group.device, self.section.mixed_precision) * self.group.world_size
        if not self.group.is_main:
            return None
        if peak:
            logger.info("matrix products of %.3f TFLOP/s by %d worker(s)", peak / 1e12, self.group.world_size)
        return ThroughputMeter(start_step, self.section.batch_size, self.group.device, self.image_flops, peak)

    def batches(self, start_step: int) -> Iterator[tuple[Batch, Draws]]:
        """This rank's part of every global batch from a step on, with its draws."""
        size, rank, world = self.section.batch_size, self.group.rank, self.group.world_size
        steps = range(start_step, self.section.total_steps)
        share = rank_slice(np.arange(size), rank, world)
        selections = (self.selection(step * size + share) for step in steps)
        items = load_batches(self.read, selections, workers=self.section.loader_workers)
        for step, item in zip(steps, items, strict=True):
            draws = self.draws(step * size + share)
            yield self.batch(item, draws, step), draws

    def selection(self, positions: np.ndarray) -> Selection:
        """Which items stand at these consecutive positions of the training sequence, and which are mirrored."""
        indices = self.order.batch(int(positions[0]), len(positions))
        if not self.section.flip:
            return Selection(indices)
        generators = item_generators(self.config.seed, f"{self.stage}.flip", positions.tolist())
        return Selection(indices, (rand((), generators) < 0.5).numpy())

    def draws(self, positions: np.ndarray) -> Draws:
        """Random draws of the images at these positions of the training sequence."""
        sit = self.state.sit.module
        return sample_draws(
            positions.tolist(),
            seed=self.config.seed,
            stream=self.stage,
            latent_shape=(sit.in_channels, sit.input_size, sit.input_size),
            interpolant=self.objective.interpolant,
            weighting=self.objective.weighting,
            drop_prob=self.section.class_dropout_prob,
            device=self.group.device,
        )

    def rate_factor(self, index: int) -> float:
        """Learning rate over the base rate at a step counted from the start of SiT's training."""
        return rate_factor(
            index,
            total_steps=self.section.max_steps,
            warmup_steps=self.section.lr_warmup_steps,
            decay_fraction=self.section.lr_decay_fraction,
        )
