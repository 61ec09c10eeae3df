"""Whether a training can go on from the checkpoint it would start from, asked before others work or wait for it."""

from __future__ import annotations

from repae_core.artifacts import Artifact
from repae_core.artifacts.checkpoints import (
    committed_checkpoints,
    read_record,
    require_same_settings,
    require_steps_left,
)
from repae_core.config import PipelineConfig, TrainingConfig, section_name
from tasks.plan import Plan


def require_continuable(artifact: Artifact, init_from: Artifact | None, section: TrainingConfig) -> None:
    """ValueError where its checkpoint, or else `init_from`'s, is of other workers, or of a run that is as long.

    The workers compare this again, and all that only they know.
    """
    for source in (artifact, init_from):
        if source is not None and (found := committed_checkpoints(source)):
            fixed = {"gradient_accumulation_steps": section.gradient_accumulation_steps}
            record = read_record(source, found[-1])
            require_same_settings(source, found[-1], record, workers=max(section.workers, 1), fixed=fixed)
            steps, batch_size = section.total_steps, section.batch_size
            require_steps_left(source, found[-1], steps=steps, batch_size=batch_size, another=source is init_from)
            return


def require_init_of_pipeline(config: PipelineConfig, plan: Plan) -> None:
    """The same of every `init_from`: not after days of work on the stages before. ValueError names its field."""
    for name, planned in plan.stages.items():
        source = planned.inputs.get("init")
        if source is not None and not planned.artifact.is_whole():
            section = section_name(name)
            try:
                require_continuable(source, source, getattr(config, section))
            except ValueError as error:
                raise ValueError(f"{section}.init_from: {error}") from None
