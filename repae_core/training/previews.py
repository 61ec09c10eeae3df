"""Pictures of a run while it trains: reconstructions and samples, the same images and noise every time."""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from repae_core.evaluation.grids import comparison_strip, image_grid
from repae_core.generation import Generator, SamplerSettings, to_uint8
from repae_core.models import KLVAE, SiT

PREVIEW_STEPS = 20


@torch.no_grad()
def draw_previews(
    *,
    vae: KLVAE,
    sit: SiT | None,
    real: Tensor,
    guidance: float,
    path: str,
    num_samples: int = 40,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, bytes]:
    """PNG files by the name of the picture.

    real: uint8 [N,3,H,W] to reconstruct (from the posterior mean); sit: None leaves the samples out;
    guidance: 1 where SiT was trained without label dropout, and so has no null class to be guided away from;
    progress: called after each step of the sampler with (steps done, all).
    """
    pictures = {}
    if len(real):
        posterior = vae.encode(real.float() / 127.5 - 1)
        strip = comparison_strip(real, to_uint8(vae.decode(posterior.mean)))
        pictures["reconstructions"] = _png(strip)
    if sit is not None:
        labels = torch.arange(num_samples) % sit.num_classes
        scale = guidance if sit.spec["class_dropout_prob"] else 1.0
        settings = SamplerSettings(steps=PREVIEW_STEPS, guidance=scale, path=path)
        samples = Generator(sit, vae, settings).sample(labels.sort().values, seed=0, progress=progress)
        pictures["samples"] = _png(image_grid(samples, columns=8))
    return pictures


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
