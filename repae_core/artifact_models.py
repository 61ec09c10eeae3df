"""Models and statistics read back from artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from repae_core.artifacts import Artifact, Store
from repae_core.artifacts.checkpoints import FOLDER, read_record, resolve_checkpoint
from repae_core.models import KLVAE, SiT, build_vae

UNTUNED_VAE = "untuned-vae.safetensors"  # in a train-repae artifact


def open_artifact_uri(uri: str | Path) -> Artifact:
    """The artifact at `{store}/{stage}/{fingerprint}`; ValueError when it is not a whole artifact."""
    parts = str(uri).rstrip("/").rsplit("/", 2)
    if len(parts) != 3:
        raise ValueError(f"{uri}: not an artifact folder (store/stage/fingerprint)")
    artifact = Artifact(Store(parts[0]), parts[1], parts[2])
    if not artifact.is_whole():
        raise ValueError(f"{uri}: not a finished artifact (no manifest.json, or files are missing)")
    return artifact


def load_vae(artifact: Artifact) -> KLVAE:
    """The VAE of an extract-vae artifact, in eval mode."""
    vae = build_vae(artifact.read_json("vae.json"))
    vae.load_state_dict(load_safetensors(artifact.read_bytes("vae.safetensors")))
    return vae.eval().requires_grad_(False)


def load_checkpoint_vae(joint: Artifact, images_seen: int) -> KLVAE:
    """The VAE of a committed joint checkpoint, in eval mode."""
    vae = build_vae(read_record(joint, images_seen)["vae"])
    vae.load_state_dict(load_safetensors(joint.read_bytes(f"{FOLDER}/{images_seen}/vae.safetensors")))
    return vae.eval().requires_grad_(False)


def load_untuned_vae(tuned: Artifact) -> KLVAE | None:
    """The VAE that the joint training behind an extract-vae artifact started from; None where that is not kept."""
    manifest = tuned.manifest()
    entry = manifest.inputs.get("model") if manifest else None
    if entry is None:
        return None
    joint = Artifact(tuned.store, entry.stage, entry.fingerprint)
    if not joint.exists(UNTUNED_VAE):
        return None
    vae = build_vae(tuned.read_json("vae.json"))
    vae.load_state_dict(load_safetensors(joint.read_bytes(UNTUNED_VAE)))
    return vae.eval().requires_grad_(False)


def load_latent_stats(artifact: Artifact) -> tuple[Tensor, Tensor]:
    """Measured (scale, bias) [C] of an extract-vae or cache-latents artifact, float64."""
    stats = artifact.read_json("latent_stats.json")
    return torch.tensor(stats["scale"], dtype=torch.float64), torch.tensor(stats["bias"], dtype=torch.float64)


def unmeasured_stats(artifact: Artifact) -> dict[str, Any] | None:
    """`latent_stats.json` of an extract-vae artifact if it was not measured (compat `ema_latent_stats`), else None.

    Published latent-only training has no other statistics than these.
    """
    stats: dict[str, Any] = artifact.read_json("latent_stats.json")
    return None if stats["images"] else stats


def load_sit(artifact: Artifact, checkpoint: str = "last", weights: str = "ema") -> tuple[SiT, dict[str, Any]]:
    """SiT of a training artifact (`ema` or `raw` weights) and its checkpoint's record."""
    images_seen = resolve_checkpoint(artifact, checkpoint)
    record = read_record(artifact, images_seen)
    sit = SiT(**record["sit"])
    name = "ema" if weights == "ema" else "sit"
    sit.load_state_dict(load_safetensors(artifact.read_bytes(f"{FOLDER}/{images_seen}/{name}.safetensors")))
    return sit.eval().requires_grad_(False), record
