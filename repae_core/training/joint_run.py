"""Joint training from shards to checkpoints: the REPA-E step inside the loop."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from repae_core.artifact_models import UNTUNED_VAE
from repae_core.artifacts import Artifact
from repae_core.artifacts.checkpoints import committed_checkpoints
from repae_core.config import PipelineConfig
from repae_core.data import DataOrder, ImageShards, batch_indices
from repae_core.interop import read_latent_stats
from repae_core.training.ablation_steps import frozen_vae_step, naive_end_to_end_step
from repae_core.training.assembly import Encoders, joint_objective, new_joint_state
from repae_core.training.distributed import Group, to_device
from repae_core.training.draws import Draws
from repae_core.training.latent_stats import measure_latents
from repae_core.training.previews import draw_previews
from repae_core.training.repae_step import repae_step, vae_warmup_step
from repae_core.training.run import TrainingRun
from repae_core.training.state import Batch, JointState, Metrics
from repae_core.training.throughput import Step, image_flops

STEPS: dict[str, Step] = {"repa-e": repae_step, "frozen": frozen_vae_step, "naive": naive_end_to_end_step}


class JointRun(TrainingRun):
    """One worker's joint training on `images`, checkpointed into `folder`."""

    stage = "train-repae"
    state: JointState

    def __init__(self, config: PipelineConfig, images: ImageShards, folder: Artifact, group: Group) -> None:
        super().__init__(config, folder, group)
        self.section = self.joint = config.train_repae
        self._flops: dict[Step, float] = {}
        self.images, self.read = images, functools.partial(read_images, images)
        self.order = DataOrder(len(images), config.seed, images.shard_starts, self.joint.shuffle_shards)
        if self.joint.latent_stats and not committed_checkpoints(folder):  # needed when the warm-up is over: too late
            self.given_latent_stats(self.joint.latent_stats)
        self.encoders = Encoders(self.joint, grid=config.token_grid("train_repae"), device=group.device)
        self.objective = self.joint_objective = joint_objective(self.joint, config.compat, group.device)
        self.state = new_joint_state(
            self.joint,
            config.compat,
            group,
            seed=config.seed,
            latent_size=config.latent_size,
            num_classes=images.num_classes,
        )

    def batch(self, item: tuple[Tensor, Tensor], draws: Draws, step: int) -> Batch:
        """Images, labels, and (past the warm-up) the encoders' features."""
        pixels, labels = (to_device(part, self.group.device) for part in item)
        with self.state.timer("encoder"):
            features = self.encoders(pixels) if step >= self.joint.vae_warmup_steps else []
        return Batch(labels, features, images=pixels)

    def step(self, index: int, item: tuple[Batch, Draws]) -> Metrics:
        """Warm-up steps of the VAE alone, then joint steps."""
        batch, draws = item
        warmup = self.joint.vae_warmup_steps
        if index < warmup:
            rate = self.joint.vae_warmup_learning_rate or self.joint.vae_learning_rate
            factor = rate / self.joint.vae_learning_rate
            return vae_warmup_step(self.state, batch, self.joint_objective, draws, rate_factor=factor)
        if index == warmup:
            self.start_latent_norm()
            self.keep_untuned_vae()
        step = STEPS[self.joint.vae_training]
        return step(self.state, batch, self.joint_objective, draws, rate_factor=self.rate_factor(index - warmup))

    def given_latent_stats(self, path: str) -> tuple[Tensor, Tensor]:
        """(scale, bias) [C]; ValueError naming the field: unreadable, or of other latents."""
        try:
            scale, bias = read_latent_stats(path)
        except ValueError as error:
            raise ValueError(f"train_repae.latent_stats: {error}") from error
        if len(scale) != (channels := self.joint.vae.latent_channels):
            raise ValueError(
                f"train_repae.latent_stats: {path} is of {len(scale)} channels, train_repae.vae makes {channels}"
            )
        return scale, bias

    def start_latent_norm(self) -> None:
        """Given statistics, else measured ones of the VAE's latents, become the latent norm's first running ones."""
        if self.joint.latent_stats:
            scale, bias = self.given_latent_stats(self.joint.latent_stats)
        else:
            count = min(self.joint.latent_stats_images, len(self.images))
            chosen = batch_indices(len(self.images), seed=self.config.seed, images_seen=0, batch_size=count)
            scale, bias = measure_latents(self.state.vae.module, self.images, chosen, progress=lambda *_: self.alive())
        for sit in (self.state.sit.module, self.state.ema):
            sit.set_latent_stats(scale=scale, bias=bias)

    def keep_untuned_vae(self) -> None:
        """The VAE that joint training starts from: its moving average too, and what `evaluate` compares."""
        if self.state.vae_ema is not None:
            self.state.vae_ema.load_state_dict(self.state.vae.module.state_dict())
        if self.group.is_main:
            state = {name: tensor.cpu().contiguous() for name, tensor in self.state.vae.module.state_dict().items()}
            self.folder.write_bytes(UNTUNED_VAE, save_safetensors(state))

    def inherit(self, source: Artifact) -> None:
        """The VAE from before joint training, which a run that continues another one does not pass again."""
        if self.group.is_main and source.exists(UNTUNED_VAE):
            self.folder.write_bytes(UNTUNED_VAE, source.read_bytes(UNTUNED_VAE))

    def image_flops(self, index: int) -> float:
        """Of a warm-up or a joint step."""
        step, encoders = STEPS[self.joint.vae_training], self.encoders.modules
        if index < self.joint.vae_warmup_steps:
            step, encoders = vae_warmup_step, []
        if step not in self._flops:
            side = self.config.preprocess.resolution
            self._flops[step] = image_flops(step, self.state, self.objective, encoders, image_side=side)
        return self._flops[step]

    def preview(self, step: int) -> dict[str, bytes]:
        """Reconstructions always, samples once SiT trains; of the moving averages, which start after the warm-up."""
        warm = step > self.joint.vae_warmup_steps
        return draw_previews(
            vae=(self.state.vae_ema if warm else None) or self.state.vae.module,
            sit=self.state.ema if warm else None,
            real=self.images.images(np.arange(min(16, len(self.images)))).to(self.group.device),
            guidance=self.config.generate.guidance,
            path=self.joint.path,
            progress=self.pulse,
        )

    def specs(self) -> dict[str, Any]:
        """Constructor arguments of SiT and the VAE, and the interpolant."""
        return {"sit": self.state.sit.module.spec, "vae": self.state.vae.module.spec, "path": self.joint.path}


def read_images(images: ImageShards, indices: np.ndarray, flip_mask: np.ndarray | None) -> tuple[Tensor, Tensor]:
    """Images uint8 [B,3,H,W] and labels [B] of a batch."""
    return images.images(indices, flip_mask), torch.from_numpy(images.labels[indices])
