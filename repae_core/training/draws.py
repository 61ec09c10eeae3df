"""The random draws of a training step, as explicit inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repae_core.diffusion import Interpolant, item_generators, rand, randn
from repae_core.training.distributed import to_device


@dataclass(frozen=True)
class Draws:
    """What a step draws: posterior and diffusion noise [B,C,h,w], time t [B] in [0,1], dropped labels [B] bool."""

    posterior_noise: Tensor
    t: Tensor
    noise: Tensor
    label_drop: Tensor

    def chunk(self, count: int) -> list[Draws]:
        """Equal parts, in order."""
        fields = (self.posterior_noise, self.t, self.noise, self.label_drop)
        return [Draws(*part) for part in zip(*(field.chunk(count) for field in fields), strict=True)]


def sample_draws(
    positions: Sequence[int],
    *,
    seed: int,
    stream: str,
    latent_shape: tuple[int, int, int],
    interpolant: Interpolant,
    weighting: str,
    drop_prob: float,
    device: torch.device,
) -> Draws:
    """Draws of the images at these positions of the training sequence.

    Each image has its own generator, a function of (seed, stream, position): draws depend neither on the
    number of workers nor on where a run was stopped, so no generator state has to be saved.
    """
    generators = item_generators(seed, stream, positions)
    return draw(
        generators,
        latent_shape=latent_shape,
        interpolant=interpolant,
        weighting=weighting,
        drop_prob=drop_prob,
        device=device,
    )


def draw(
    generators: Sequence[torch.Generator],
    *,
    latent_shape: tuple[int, int, int],
    interpolant: Interpolant,
    weighting: str,
    drop_prob: float,
    device: torch.device,
    posterior_noise: Tensor | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    label_drop: Tensor | None = None,
) -> Draws:
    """Draws of one generator an image; what is given is taken as it is, and not drawn."""
    posterior_noise = randn(latent_shape, generators) if posterior_noise is None else posterior_noise
    t = interpolant.sample_time(len(generators), weighting, generators) if t is None else t
    noise = randn(latent_shape, generators) if noise is None else noise
    label_drop = rand((), generators) < drop_prob if label_drop is None else label_drop
    return Draws(*(to_device(drawn, device) for drawn in (posterior_noise, t, noise, label_drop)))
