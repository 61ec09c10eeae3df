"""A Generator out of artifacts or published checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from repae_core.artifact_models import load_latent_stats, load_sit, load_vae, open_artifact_uri
from repae_core.artifacts import Artifact
from repae_core.artifacts.checkpoints import FOLDER, read_record, resolve_checkpoint
from repae_core.generation.generator import Generator, SamplerSettings, require_same_latents
from repae_core.interop import (
    ReferenceCheckpoint,
    load_reference_checkpoint,
    measured_statistics,
    reference_checkpoint,
)


def build_generator(
    model: Artifact,
    vae: Artifact,
    guide: Artifact | None = None,
    *,
    checkpoint: str = "last",
    weights: str = "ema",
    guide_checkpoint: str = "last",
    guide_weights: str = "ema",
    **settings: Any,
) -> Generator:
    """SiT of `model` with the VAE of `vae`; a joint SiT takes the statistics measured on that VAE.

    guide: a training artifact whose SiT takes the place of the unconditional half.

    Raises:
        ValueError: no such checkpoint, or a guide that does not fit (see `require_guide`).
    """
    sit, record = load_sit(model, checkpoint, weights)
    if model.stage == "train-repae":
        scale, bias = load_latent_stats(vae)
        sit.set_latent_stats(scale=scale, bias=bias)
    weaker = None
    if guide is not None:
        require_guide(model, guide, checkpoint=checkpoint, guide_checkpoint=guide_checkpoint)
        weaker, _ = load_sit(guide, guide_checkpoint, guide_weights)
    chosen = SamplerSettings(**{"path": record["path"]} | settings)
    origin = f"checkpoint {record['images_seen']} of {model.uri}"
    return Generator(sit, load_vae(vae), chosen, guide=weaker, origin=origin)


def require_guide(model: Artifact, guide: Artifact, *, checkpoint: str, guide_checkpoint: str) -> None:
    """Both models must mean the same by a latent: only their records are read.

    Raises:
        ValueError: the guide has other latents, classes, path or VAE; or a joint model of another training.
    """
    ours, theirs = checkpoint_record(model, checkpoint), checkpoint_record(guide, guide_checkpoint)
    require_same_latents(ours["sit"], theirs["sit"])
    if ours["path"] != theirs["path"]:
        raise ValueError(f"generate.guide: trained on the {theirs['path']} path, the model on the {ours['path']} path")
    if model.stage == "train-repae":
        if guide.fingerprint != model.fingerprint:
            raise ValueError("generate.guide: a joint model's guide must be a checkpoint of the same training")
    elif _vae_of(model) != _vae_of(guide):
        raise ValueError(f"generate.guide: {guide.uri} was trained on the latents of another VAE than the model")


def checkpoint_record(model: Artifact, checkpoint: str) -> dict[str, Any]:
    """The record of a training artifact's checkpoint; ValueError listing what there is."""
    return read_record(model, resolve_checkpoint(model, checkpoint))


def _vae_of(model: Artifact) -> str | None:
    manifest = model.manifest()
    return manifest.inputs["vae"].fingerprint if manifest and "vae" in manifest.inputs else None


def load_model(uri: str | Path, *, vae: str | Path | None = None, **settings: Any) -> Generator:
    """A trained model, ready to `.sample(labels, seed=...)` in a notebook.

    uri: the folder of a `generate`, `train-ldm` or `train-repae` artifact, of one checkpoint in these two
    (`.../checkpoints/<images>`), or a published `.pt` checkpoint; vae: for a latent-only `.pt`, the file of its VAE;
    settings: fields of SamplerSettings, e.g. guidance=2.0. A `generate` artifact brings its own settings, checkpoint
    and weights, so that `sample(labels, seed=its seed)` gives its images again.

    Raises:
        ValueError: not a whole artifact of these stages, its inputs are not in the same store, or a `.pt` that is no
            checkpoint or needs a VAE.
    """
    if str(uri).endswith((".pt", ".pth", ".safetensors")):
        return _published_model(load_reference_checkpoint(uri), vae, settings)
    folder, checkpoint = str(uri).rstrip("/"), "last"
    if folder.rpartition("/")[0].endswith(f"/{FOLDER}"):
        folder, _, checkpoint = folder.rsplit("/", 2)
    artifact = open_artifact_uri(folder)
    if artifact.stage == "train-repae":
        stats = measured_statistics(artifact, checkpoint)
        return _published_model(reference_checkpoint(artifact, checkpoint, latent_stats=stats), None, settings)
    if artifact.stage not in ("train-ldm", "generate"):
        raise ValueError(f"{uri}: expected an artifact of train-repae, train-ldm or generate, not of {artifact.stage}")
    manifest = artifact.manifest()
    assert manifest is not None
    inputs = {role: Artifact(artifact.store, entry.stage, entry.fingerprint) for role, entry in manifest.inputs.items()}
    if artifact.stage == "train-ldm":
        return build_generator(artifact, inputs["vae"], checkpoint=checkpoint, **settings)
    sampler = artifact.read_json("samples.json")["sampler"]
    sampler["interval"] = tuple(sampler["interval"])
    names = ("checkpoint", "weights", "guide_checkpoint", "guide_weights")
    chosen = {name: value for name, value in manifest.config["config"].items() if name in names}
    return build_generator(inputs["model"], inputs["vae"], inputs.get("guide"), **chosen | sampler | settings)


def _published_model(checkpoint: ReferenceCheckpoint, vae: str | Path | None, settings: dict[str, Any]) -> Generator:
    decoder = checkpoint if vae is None else load_reference_checkpoint(vae)
    if decoder.vae is None:
        raise ValueError(f"{decoder.origin}: no VAE in it ({decoder.kind}); give the VAE's file as vae=")
    # A VAE's own file does not say its number of norm groups; the training's settings do.
    decoder = dataclasses.replace(decoder, args=checkpoint.args | decoder.args)
    settings = {"path": checkpoint.args.get("path_type", "linear")} | settings
    return Generator(checkpoint.build_sit(), decoder.build_vae(), SamplerSettings(**settings))
