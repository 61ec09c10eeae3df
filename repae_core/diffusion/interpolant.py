"""The path between latent and noise, its velocity and score (system.md section 3; SiT, Ma et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from repae_core.diffusion.randomness import rand, randn


class Interpolant:
    """x_t = a(t) zbar + s(t) n with t in [0,1]: t=0 is the latent, t=1 is noise.

    `linear`: a = 1-t, s = t; `cosine`: a = cos(pi t/2), s = sin(pi t/2).
    """

    def __init__(self, path: str = "linear") -> None:
        if path not in ("linear", "cosine"):
            raise ValueError(f"path={path!r}; known: linear, cosine")
        self.path = path

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(a, s, a', s') at t, in t's shape and dtype."""
        if self.path == "linear":
            one = torch.ones_like(t)
            return 1 - t, t, -one, one
        angle = t * (math.pi / 2)
        a, s = torch.cos(angle), torch.sin(angle)
        return a, s, -math.pi / 2 * s, math.pi / 2 * a

    def interpolate(self, zbar: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, target velocity a' zbar + s' n), both [B,C,H,W]; t [B]."""
        a, s, da, ds = (c.reshape(-1, 1, 1, 1) for c in self.coefficients(t))
        return a * zbar + s * noise, da * zbar + ds * noise

    def score(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Score at x_t from the velocity: ((a/a') v - x) / (s^2 - (a/a') s' s); t [B] or a scalar > 0."""
        a, s, da, ds = (c.reshape(-1, 1, 1, 1) for c in self.coefficients(t))
        ratio = a / da
        return (ratio * v - x) / (s**2 - ratio * ds * s)

    def sample_time(
        self,
        n: int,
        weighting: str = "uniform",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Training times t [n] in [0,1]: `uniform`, or `lognormal` (sigma = exp(N(0,1))).

        generator: one for all, or one an image.
        """
        if weighting not in ("uniform", "lognormal"):
            raise ValueError(f"weighting={weighting!r}; known: uniform, lognormal")
        each = isinstance(generator, Sequence)
        if weighting == "uniform":
            return rand((), generator) if each else torch.rand(n, generator=generator)  # type: ignore[arg-type]
        normal = randn((), generator) if each else torch.randn(n, generator=generator)  # type: ignore[arg-type]
        sigma = normal.exp()
        return sigma / (1 + sigma) if self.path == "linear" else 2 / math.pi * torch.atan(sigma)
