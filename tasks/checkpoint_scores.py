"""Scores of checkpoints beside a training that goes on (`score_every`), as points of MLflow's curves."""

from __future__ import annotations

import logging
import os
from typing import Any

from repae_core.artifacts import Artifact, StoreError
from repae_core.artifacts.artifact import LOGS
from repae_core.artifacts.checkpoints import committed_checkpoints
from repae_core.config import TrainingConfig
from tasks.ray_side_task import LostError, SideTask, start_beside
from tasks.stage import StageContext
from tasks.training_worker import artifact_reference, score_worker

logger = logging.getLogger("repae")

_PREFIX = "scores-"
_LAST_SECONDS = 600.0  # the score of the last checkpoint is waited for


class CheckpointScores:
    """Starts a score whenever its checkpoint is there and there is room; never fails, never holds the training up.

    Room is what `cpus_per_worker` and `gpus_per_worker` ask for once more. What failed or found no room is a warning.
    """

    def __init__(self, context: StageContext, images: Artifact) -> None:
        section = context.section
        assert isinstance(section, TrainingConfig)
        self._context, self._section, self._images = context, section, images
        self._every = section.score_every * section.batch_size  # images
        self._running: tuple[int, SideTask] | None = None
        self._lost = 0  # whose score did not come to an end
        # A score that ran when an earlier attempt died is made again; one that it had not sent yet is sent.
        scored = _scored(context.artifact)
        self._started = max(scored, default=0)
        for seen, scores in scored.items():
            self._log(seen, scores)

    def look(self, images_seen: int) -> None:
        """Take a finished score, start the one that is due at this position of the training."""
        try:
            self._look(images_seen)
        except StoreError as error:
            logger.warning("scores of checkpoints: %s", error)

    def _look(self, images_seen: int) -> None:
        if self._running is not None and self._running[1].done():
            self._take()
            return
        if self._running is not None or images_seen < self._started + self._every:
            return
        due = max(self._due(), default=0)
        if due <= self._started:  # not uploaded yet
            return
        self._started = due
        payload, section = self._payload(due), self._section
        try:
            task = start_beside(score_worker, payload, cpus=section.cpus_per_worker, gpus=section.gpus_per_worker)
        except RuntimeError as error:
            logger.warning("no score of checkpoint %d: %s", due, error)
            return
        if task is None:
            logger.warning("no score of checkpoint %d: Ray has no CPUs or GPUs that the training leaves free", due)
        else:
            self._running = due, task

    def finish(self) -> None:
        """After the training: the last checkpoint's score, where there is room."""
        end = self._section.total_steps * self._section.batch_size
        for _ in range(6):  # wait for the one that runs, take it; start the last, take it; that once more if it is lost
            self.look(end)
            if self._running is not None and not self._running[1].done(_LAST_SECONDS):
                return

    def close(self) -> None:
        """End what still runs."""
        if self._running is not None:
            self._running[1].cancel()

    def _take(self) -> None:
        assert self._running is not None
        images_seen, task = self._running
        try:
            scores = task.result()
        except LostError as error:
            self._running = None
            logger.warning("no score of checkpoint %d: %s", images_seen, error)
            task.cancel()
            if images_seen != self._lost:  # once more
                self._lost, self._started = images_seen, images_seen - self._every
            return
        except RuntimeError as error:
            self._running = None
            logger.warning("no score of checkpoint %d: %s", images_seen, error)
            return
        self._context.artifact.write_json(_file(images_seen), scores)  # again at the next look, if the store is away
        self._running = None
        self._log(images_seen, scores)
        logger.info("checkpoint %d, %d samples: %s", images_seen, self._section.score_images,
                    ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))  # fmt: skip

    def _due(self) -> list[int]:
        return [seen for seen in committed_checkpoints(self._context.artifact) if seen % self._every == 0]

    def _log(self, images_seen: int, scores: dict[str, float]) -> None:
        self._context.tracking.log_metrics({f"score/{name}": value for name, value in scores.items()}, images_seen)

    def _payload(self, images_seen: int) -> dict[str, Any]:
        context = self._context
        vae = context.inputs.get("vae")
        return {
            "config": context.config.model_dump(mode="json"),
            "training": artifact_reference(context.artifact),
            "images": artifact_reference(self._images),
            "vae": artifact_reference(vae) if vae is not None else None,
            "images_seen": images_seen,
            "count": self._section.score_images,
            "threads": self._section.cpus_per_worker,
            "gpu": self._section.gpus_per_worker > 0,
            "folder": os.getcwd(),
        }


def checkpoint_scores(context: StageContext) -> CheckpointScores | None:
    """The scores that the section asks for; None for none."""
    section = context.section
    assert isinstance(section, TrainingConfig)
    if not section.score_every:
        return None
    images = context.inputs.get("images")
    if images is None:  # features were cached: the latents' manifest names the images
        manifest = context.inputs["latents"].manifest()
        assert manifest is not None
        entry = manifest.inputs["images"]
        images = Artifact(context.inputs["latents"].store, entry.stage, entry.fingerprint)
        if not images.is_whole():
            logger.warning("no scores: the preprocessed images %s are not in the store", images.uri)
            return None
    if guide := context.config.generate.guide:
        logger.warning("scores of checkpoints are without guidance: generate.guide=%s is another model", guide)
    return CheckpointScores(context, images)


def _file(images_seen: int) -> str:
    return f"{LOGS}{_PREFIX}{images_seen:09d}.json"


def _scored(artifact: Artifact) -> dict[int, dict[str, float]]:
    """Scores by images seen."""
    scored = {}
    for name in artifact.files(LOGS.rstrip("/")):
        if name.startswith(_PREFIX):
            try:
                scored[int(name.removeprefix(_PREFIX).removesuffix(".json"))] = artifact.read_json(f"{LOGS}{name}")
            except ValueError as error:
                logger.warning("a score is left out: %s", error)
    return scored
