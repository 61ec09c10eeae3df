"""Images from a trained SiT, its latent statistics and a VAE decoder (system.md section 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repae_core.diffusion import item_generators, ode_sample, randn, sde_sample
from repae_core.models import KLVAE, SiT


@dataclass(frozen=True)
class SamplerSettings:
    """sampler: ode | heun | sde; interval: times at which guidance is on; rounding: truncate | round.

    mixed_precision: no | bf16, of SiT's matrix products; the sampler's state is float64 and the decoder fp32.
    """

    sampler: str = "ode"
    steps: int = 50
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    path: str = "linear"
    rounding: str = "truncate"
    mixed_precision: str = "no"
    bn_inverse_without_eps: bool = False


class Generator:
    """`sample(labels, seed=...)` -> uint8 images; image i is a function of (seed, i), its label and the weights.

    sit: eval mode, its latent norm holding the statistics to decode with; vae: eval mode; guide: a weaker SiT of the
    same latents and classes that takes the place of the unconditional half (autoguidance, Karras et al. 2024);
    origin: what an error calls the model.

    Raises:
        ValueError: the guide has other latents or classes.
    """

    def __init__(
        self,
        sit: SiT,
        vae: KLVAE,
        settings: SamplerSettings | None = None,
        *,
        guide: SiT | None = None,
        origin: str = "the model",
    ) -> None:
        self.origin = origin
        self.sit = sit.eval()
        self.vae = vae.eval()
        self.settings = settings or SamplerSettings()
        self.guide = guide.eval() if guide is not None else None
        if guide is not None:
            require_same_latents(sit.spec, guide.spec)

    def to(self, device: torch.device) -> Generator:
        """Move all networks; returns itself."""
        for network in (self.sit, self.vae, self.guide):
            if network is not None:
                network.to(device)
        return self

    @torch.no_grad()
    def sample(
        self,
        labels: Sequence[int] | Tensor,
        *,
        seed: int = 0,
        first: int = 0,
        noise: Tensor | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """uint8 [N,3,H,W] of classes `labels` [N]; `first`: index of the first image in the whole set.

        noise: [N,C,h,w] to start from, in place of the draws of `seed`.

        Raises:
            ValueError: a label outside the model's classes, or an image that is not finite.
        """
        device = next(self.sit.parameters()).device
        y = torch.as_tensor(labels, dtype=torch.int64, device=device)
        if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < self.sit.num_classes:
            raise ValueError(f"labels must be in 0..{self.sit.num_classes - 1}")
        latents = self.sample_latents(y, seed=seed, first=first, noise=noise, progress=progress)
        images = self.decode(latents)
        self._require_finite(images, first)
        return to_uint8(images, self.settings.rounding)

    def _require_finite(self, images: Tensor, first: int) -> None:
        """NaN would become black pixels, and get a score."""
        finite = images.isfinite().flatten(1).all(dim=1)
        if not bool(finite.all()):
            s, index = self.settings, first + int(finite.int().argmin())
            guide = " and of the guide" if self.guide is not None else ""
            raise ValueError(
                f"generate: image {index} of {self.origin} is not finite (NaN or infinite) with sampler={s.sampler}, "
                f"steps={s.steps}, guidance={s.guidance:g}: the weights{guide} have diverged (choose an earlier "
                "generate.checkpoint), or these settings do not fit (lower generate.guidance, more generate.steps)"
            )

    @torch.no_grad()
    def sample_latents(
        self,
        y: Tensor,
        *,
        seed: int,
        first: int,
        noise: Tensor | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Normalised latents [N,C,h,w], float64."""
        s, positions = self.settings, range(first, first + len(y))
        if noise is None:
            shape = (self.sit.in_channels, self.sit.input_size, self.sit.input_size)
            noise = randn(shape, item_generators(seed, "generate.noise", positions))
        noise = noise.to(y.device)
        common: dict[str, Any] = {
            "steps": s.steps,
            "guidance": s.guidance,
            "interval": s.interval,
            "null_class": self.sit.null_class,
            "guide": self.guide,
            "progress": progress,
        }
        with torch.autocast(y.device.type, torch.bfloat16, enabled=s.mixed_precision == "bf16"):
            if s.sampler == "sde":
                draws = item_generators(seed, "generate.sde", positions)
                return sde_sample(self.sit, noise, y, path=s.path, generator=draws, **common)
            return ode_sample(self.sit, noise, y, heun=s.sampler == "heun", **common)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents -> images [N,3,H,W], nominally in [-1,1]."""
        z = self.sit.bn.denormalize(latents, without_eps=self.settings.bn_inverse_without_eps)
        images: Tensor = self.vae.decode(z.float())
        return images


def require_same_latents(model: Mapping[str, Any], guide: Mapping[str, Any]) -> None:
    """ValueError unless a guide's SiT (`SiT.spec`) has the model's latents and classes."""
    for name in ("input_size", "in_channels", "num_classes"):
        if model[name] != guide[name]:
            raise ValueError(f"generate.guide: its SiT has {name}={guide[name]}, the model's {model[name]}")


def to_uint8(images: Tensor, rounding: str = "truncate") -> Tensor:
    """[-1,1] -> uint8; `truncate` is clamp(255 (x+1)/2) cut to an integer, as published and as ADM."""
    levels = (images.float() + 1) * 127.5
    if rounding == "round":
        levels = levels.round()
    return levels.clamp(0, 255).to(torch.uint8)
