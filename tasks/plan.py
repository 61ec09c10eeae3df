"""Which artifact each stage of a config makes and what it reads: decided before any work."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repae_core.artifacts import Artifact, Store, fingerprint
from repae_core.config import STAGES, PipelineConfig, content_paths, output_fields, section_name
from repae_core.config.stages import TOO_FEW_SAMPLES
from repae_core.data.preprocess import allowed_failures
from repae_core.data.sources import ImageSource, open_source
from repae_core.remote_files import local_copy, sha256_of
from tasks.stage_inputs import resolve_inputs

# Raised when a stage's output changes for the same config.
VERSIONS = {
    "preprocess": 3,
    "train-repae": 4,
    "extract-vae": 1,
    "cache-latents": 4,
    "train-ldm": 3,
    "generate": 4,
    "evaluate": 5,
}


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a config: its artifact, its inputs by role, and what its fingerprint was made from."""

    name: str
    artifact: Artifact
    inputs: dict[str, Artifact]
    payload: dict[str, Any]


@dataclass
class Plan:
    """The stages of a config in order.

    source: the listed data set.
    not_needed: what the pipeline's result does not depend on. An external VAE replaces stages 2 and 3, which are
    then not planned at all; images of the joint model need no latent cache and no second training.
    """

    store: Store
    source: ImageSource
    stages: dict[str, PlannedStage] = field(default_factory=dict)
    not_needed: tuple[str, ...] = ()


def make_plan(
    config: PipelineConfig, store: Store, *, references: Mapping[str, Mapping[str, str]] | None = None
) -> Plan:
    """Fingerprints of every stage of a config.

    references: stage -> role -> `latest`, a fingerprint prefix or a URI in place of what this config makes.

    Raises:
        ValueError: source, weights file, timm model or referenced artifact missing, or a source of which more names
            give no image than allowed: one line.
    """
    _require_timm_models(config)
    source = open_source(config.preprocess.source)
    allowed_failures(source, config.preprocess.max_skipped_fraction)
    _require_classes(config, len(source.class_names))
    plan = Plan(store, source)
    external_vae = config.cache_latents.vae != "auto" and config.generate.model == "train-ldm"
    if external_vae:
        plan.not_needed = ("train-repae", "extract-vae")
    elif config.generate.model == "train-repae":
        plan.not_needed = ("cache-latents", "train-ldm")
    for stage in STAGES:
        if external_vae and stage in plan.not_needed:
            continue
        made = {name: planned.artifact for name, planned in plan.stages.items()}
        payload_of = functools.partial(_payload, config, stage)
        inputs = resolve_inputs(config, stage, store, made, (references or {}).get(stage, {}), payload_of)
        payload = payload_of(inputs)
        if stage == "preprocess":
            payload["config"]["source"] = source.content_digest()
        plan.stages[stage] = PlannedStage(stage, Artifact(store, stage, fingerprint(payload)), inputs, payload)
    return plan


def _payload(config: PipelineConfig, stage: str, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """What the fingerprint is made from: no URI, path, host, time or library version."""
    section = config.section(stage)
    values = output_fields(section)
    hashes: dict[str, list[str]] = {}
    for name, path in content_paths(section):
        hashes.setdefault(name, []).append(_content_sha256(config, path, f"{section_name(stage)}.{name}"))
    for name, digests in hashes.items():
        target, *rest = name.split(".")
        if rest:
            values[target][rest[0]] = digests
        else:
            values[target] = digests
    values.pop("init_from", None)
    if stage == "preprocess" and config.preprocess.encoding != "jpeg":
        values.pop("jpeg_quality")
    if stage == "cache-latents":
        values.pop("vae")
        if config.cache_latents.encoder:
            values["encoder_grid"] = values["encoder_grid"] or f"patch {config.train_ldm.patch_size}"
    if stage == "generate":
        values["steps"] = config.generate.sampler_steps
        guide = values.pop("guide")  # hashed as an input
        if not guide:
            del values["guide_checkpoint"], values["guide_weights"]
    if stage == "evaluate" and config.evaluate.reference != "auto":
        values["reference"] = _reference_sha256(config.evaluate.reference)
    return {
        "stage": stage,
        "version": VERSIONS[stage],
        "seed": config.seed,
        "compat": config.compat.of_stage(stage),
        "config": values,
        "inputs": {role: artifact.fingerprint for role, artifact in sorted(inputs.items())},
    }


def _require_timm_models(config: PipelineConfig) -> None:
    """Encoders `timm/<model>`; those of the table are checked by the config itself."""
    for section in ("train_repae", "cache_latents", "train_ldm"):
        for name in getattr(config, section).encoder:
            if name.startswith("timm/"):
                from repae_core.encoders import encoder_dim  # timm takes seconds to import

                try:
                    encoder_dim(name)
                except ValueError as error:
                    raise ValueError(f"{section}.encoder: {error}") from None


def _content_sha256(config: PipelineConfig, path: str, field_name: str) -> str:
    try:
        return file_sha256(path, field_name)
    except ValueError as error:
        inception = field_name == "evaluate.extractor_weights" and config.evaluate.extractor == "inception"
        if inception and "://" not in path and not Path(path).exists():
            from repae_core.evaluation.inception import fetch_weights  # imports torch

            raise ValueError(f"{error}; {fetch_weights(path)}") from None
        raise


def _reference_sha256(path: str) -> str:
    """Of a reference file that can be one: a wrong file is told before any work."""
    from repae_core.evaluation import check_reference_file  # imports torch

    check_reference_file(path)
    return file_sha256(path, "evaluate.reference")


def require_scorable(config: PipelineConfig) -> None:
    """What evaluation of this config cannot do without, before any work.

    Raises:
        ValueError: Inception's weights, which are the user's to give (names the command that fetches them); or too few
            samples.
    """
    if config.evaluate.extractor == "inception" and not config.evaluate.extractor_weights:
        from repae_core.evaluation.inception import missing_weights

        raise ValueError(missing_weights())
    if config.generate.num_images < 2:
        raise ValueError(TOO_FEW_SAMPLES.format(config.generate.num_images))


def _require_classes(config: PipelineConfig, found: int) -> None:
    for section in ("train_repae", "train_ldm"):
        configured = getattr(config, section).num_classes
        if configured is not None and configured < found:
            raise ValueError(
                f"{section}.num_classes={configured}, but the data set has {found} classes; set it to {found}, or "
                "leave it out to take the data set's"
            )


def file_sha256(path: str, field_name: str) -> str:
    """sha256 of a local or remote file; ValueError naming the field when it cannot be read, or is not as given."""
    try:
        return sha256_of(local_copy(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{field_name}: {error}") from None
