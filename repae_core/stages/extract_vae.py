"""`extract-vae`: the tuned VAE out of a joint checkpoint, with measured latent statistics."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors
from torch import Tensor

from repae_core.artifacts import Artifact
from repae_core.artifacts.checkpoints import read_record, resolve_checkpoint
from repae_core.data import ImageShards, batch_indices
from repae_core.interop import export_diffusers_vae
from repae_core.models import KLVAE, SiT, build_vae
from repae_core.training.latent_stats import measure_latents

Progress = Callable[[int, int], None]


def extract_vae(
    joint: Artifact,
    images: ImageShards,
    out: Artifact,
    *,
    checkpoint: str,
    weights: str,
    stats_images: int | None,
    ema_latent_stats: bool,
    export_diffusers: bool,
    seed: int,
    batch_size: int,
    progress: Progress,
) -> dict[str, Any]:
    """Write the VAE (`vae.safetensors`, `vae.json`), `latent_stats.json`, `discriminator.safetensors`, `diffusers/`.

    weights: raw | ema, of the VAE.
    ema_latent_stats: published behaviour, the moving average's running statistics instead of measured ones.
    """
    seen = resolve_checkpoint(joint, checkpoint)
    record = read_record(joint, seen)
    file = {"raw": "vae", "ema": "vae_ema"}[weights]
    blob = joint.read_bytes(f"checkpoints/{seen}/{file}.safetensors")
    vae = build_vae(record["vae"])
    vae.load_state_dict(load_safetensors(blob))
    vae.eval().requires_grad_(False)
    if ema_latent_stats:
        sit = SiT(**record["sit"])
        sit.load_state_dict(load_safetensors(joint.read_bytes(f"checkpoints/{seen}/ema.safetensors")))
        scale, bias = sit.latent_stats()
        count = 0
    else:
        count = min(stats_images or len(images), len(images))
        chosen = batch_indices(len(images), seed=seed, images_seen=0, batch_size=count)
        scale, bias = measure_latents(vae, images, chosen, batch_size=batch_size, progress=progress)
    out.write_bytes("vae.safetensors", blob)
    out.write_json("vae.json", record["vae"])
    out.write_json("latent_stats.json", {"scale": scale.tolist(), "bias": bias.tolist(), "images": count})
    out.write_bytes("discriminator.safetensors", joint.read_bytes(f"checkpoints/{seen}/discriminator.safetensors"))
    if export_diffusers:
        _write_diffusers(vae, out, scale=scale, bias=bias, sample_size=images.resolution)
    return {"images_seen": seen, "stats_images": count, "scale": scale.tolist(), "bias": bias.tolist()}


def _write_diffusers(vae: KLVAE, out: Artifact, *, scale: Tensor, bias: Tensor, sample_size: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        export_diffusers_vae(vae, scratch, scale=scale, bias=bias, sample_size=sample_size)
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                out.write_bytes(f"diffusers/{path.relative_to(scratch).as_posix()}", path.read_bytes())
