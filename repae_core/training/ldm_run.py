"""Latent-only training from cached latents to checkpoints: the LDM step inside the loop."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repae_core.artifacts import Artifact
from repae_core.config import PipelineConfig, TrainingConfig
from repae_core.data import DataOrder, ImageShards, LatentShards
from repae_core.encoders import spatial_normalize
from repae_core.models import KLVAE
from repae_core.training.assembly import Encoders, flow_objective, new_ldm_state, new_sit
from repae_core.training.distributed import Group, to_device
from repae_core.training.draws import Draws
from repae_core.training.ldm_step import ldm_step
from repae_core.training.previews import draw_previews
from repae_core.training.run import TrainingRun
from repae_core.training.state import Batch, Metrics
from repae_core.training.throughput import image_flops


class LDMRun(TrainingRun):
    """One worker's latent-only training, checkpointed into `folder`.

    images: needed only where the encoders' features were not cached with the latents; vae: for previews.
    """

    stage = "train-ldm"

    def __init__(
        self,
        config: PipelineConfig,
        latents: LatentShards,
        images: ImageShards | None,
        vae: KLVAE,
        folder: Artifact,
        group: Group,
    ) -> None:
        super().__init__(config, folder, group)
        self.section = config.train_ldm
        self.latents = latents
        self.order = DataOrder(len(latents), config.seed, latents.shard_starts, self.section.shuffle_shards)
        self.vae = vae.to(group.device).eval()
        self.objective = flow_objective(self.section)
        torch.manual_seed(config.seed)
        channels, size, _ = latents.latent_shape
        sit = new_sit(self.section, latent_size=size, latent_channels=channels, num_classes=latents.num_classes)
        sit.set_latent_stats(scale=latents.scale, bias=latents.bias)
        grid = sit.input_size // sit.patch_size
        cached = features_are_cached(latents, self.section, grid)
        self.encoders = None if cached else Encoders(self.section, grid=grid, device=group.device)
        if self.encoders is None:
            images = None
        elif images is not None:
            latents.require_same_images(images)
        self.read = functools.partial(read_latents, latents, images, bool(self.section.encoder))
        self.state = new_ldm_state(self.section, group, sit)

    def inherit(self, source: Artifact) -> None:
        """The latents' statistics are those of this run's cache, whatever SiT was trained on before."""
        for sit in (self.state.sit.module, self.state.ema):
            sit.set_latent_stats(scale=self.latents.scale, bias=self.latents.bias)

    def batch(self, item: LatentItem, draws: Draws, step: int) -> Batch:
        """z sampled anew from the cached mean and std, labels, features (cached, or of the images)."""
        device = self.group.device
        z = to_device(item.mean, device) + to_device(item.std, device) * draws.posterior_noise
        if self.encoders is None:
            features = [to_device(f, device) for f in item.features]
            if self.section.spatial_norm is not None:  # the cache holds features as the encoder gives them
                features = [spatial_normalize(f.float(), self.section.spatial_norm) for f in features]
        else:
            assert item.images is not None
            with self.state.timer("encoder"):
                features = self.encoders(to_device(item.images, device))
        return Batch(to_device(item.labels, device), features, latents=z)

    def step(self, index: int, item: tuple[Batch, Draws]) -> Metrics:
        """One latent-only step."""
        batch, draws = item
        return ldm_step(self.state, batch, self.objective, draws, rate_factor=self.rate_factor(index))

    @functools.cached_property
    def _flops(self) -> float:
        encoders = self.encoders.modules if self.encoders is not None else []
        side = self.latents.latent_shape[-1] * self.vae.downsample_factor
        return image_flops(ldm_step, self.state, self.objective, encoders, image_side=side)

    def image_flops(self, index: int) -> float:
        """The same for every step."""
        return self._flops

    def preview(self, step: int) -> dict[str, bytes]:
        """Samples of the moving average."""
        return draw_previews(
            vae=self.vae,
            sit=self.state.ema,
            real=torch.empty(0),
            guidance=self.config.generate.guidance,
            path=self.section.path,
            progress=self.pulse,
        )

    def specs(self) -> dict[str, Any]:
        """Constructor arguments of SiT and the VAE, and the interpolant."""
        return {"sit": self.state.sit.module.spec, "vae": self.vae.spec, "path": self.section.path}


class LatentItem(NamedTuple):
    """What a latent-only batch is made of: posterior mean and std [B,C,h,w], labels [B], features or images."""

    mean: Tensor
    std: Tensor
    labels: Tensor
    features: Sequence[Tensor] = ()
    images: Tensor | None = None


def read_latents(
    latents: LatentShards,
    images: ImageShards | None,
    aligned: bool,
    indices: np.ndarray,
    flip_mask: np.ndarray | None,
) -> LatentItem:
    """A batch out of the cache; for alignment also its features, or the images of which they are still to be made."""
    mean, std = latents.latents(indices, flip_mask)
    labels = torch.from_numpy(latents.labels[indices])
    if images is not None:
        return LatentItem(mean, std, labels, images=images.images(indices, flip_mask))
    return LatentItem(mean, std, labels, latents.features(indices, flip_mask) if aligned else ())


def features_are_cached(latents: LatentShards, section: TrainingConfig, grid: int) -> bool:
    """Whether the cache holds the features of the section's encoders on a grid of `grid` x `grid` tokens.

    Raises:
        ValueError: features of these encoders were cached on another grid.
    """
    if not section.encoder:
        return True
    if tuple(latents.encoders) != section.encoder:
        return False
    if latents.encoder_grid != grid:
        raise ValueError(
            f"train_ldm.model has {grid}x{grid} tokens, the cached features {latents.encoder_grid}x"
            f"{latents.encoder_grid}; set cache_latents.encoder_grid={grid}"
        )
    return True
