"""Checkpoints in the published REPA-E layouts, read safely and written (system.md section 7).

A joint checkpoint is one `.pt` with `model, ema, vae, discriminator, opt, opt_vae, opt_disc, args, steps`; a
latent-only one leaves out the VAE's parts. VAE, latent statistics and discriminator also come as files of their own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repae_core.interop.architectures import sit_spec, vae_spec
from repae_core.interop.optimizer_state import OptimizerState, from_positions, parameter_names, to_positions
from repae_core.interop.vae_weights import autoencoder_part
from repae_core.models import KLVAE, PatchGAN, SiT, build_discriminator, build_vae
from repae_core.weights import is_state_dict, load_weights, read_torch_file

StateDict = dict[str, Tensor]

_OPTIMIZERS = {"opt": "model", "opt_vae": "vae", "opt_disc": "discriminator"}
# `opt_disc` covers the loss module: a log-variance, the discriminator, LPIPS (VGG16's 26 tensors and 5 heads).
_AROUND_DISCRIMINATOR = {"before": 1, "after": 31}


@dataclass
class ReferenceCheckpoint:
    """What a published file holds; absent parts are None.

    model, ema, vae, discriminator: state dicts in the field's names; optimizers: by the part they train;
    latent_stats: (scale, bias) [C]; args: the training's command line; steps: joint or latent-only steps.
    """

    model: StateDict | None = None
    ema: StateDict | None = None
    vae: StateDict | None = None
    discriminator: StateDict | None = None
    optimizers: dict[str, OptimizerState] = field(default_factory=dict)
    latent_stats: tuple[Tensor, Tensor] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    origin: str = "checkpoint"

    @property
    def kind(self) -> str:
        """`joint`, `ldm`, `vae`, `latent-stats` or `discriminator`."""
        if self.model is not None:
            return "ldm" if self.vae is None else "joint"
        if self.latent_stats is not None:
            return "latent-stats"
        return "vae" if self.vae is not None else "discriminator"

    def build_sit(self, weights: str = "ema") -> SiT:
        """SiT with its `ema` or `raw` weights, strictly loaded, in eval mode; its `bn` holds the file's statistics."""
        state = self.ema if weights == "ema" else self.model
        if state is None:
            raise ValueError(f"{self.origin}: no SiT in it ({self.kind})")
        sit = SiT(**_named(self.origin, sit_spec, state, self.args))
        load_weights(sit, state, self.origin)
        return sit.eval().requires_grad_(False)

    def build_vae(self) -> KLVAE:
        """The VAE, strictly loaded, in eval mode."""
        if self.vae is None:
            raise ValueError(f"{self.origin}: no VAE in it ({self.kind})")
        groups = int(self.args.get("vae_norm_groups", 32))
        spec = _named(self.origin, vae_spec, self.vae, norm_groups=groups)
        try:
            vae = build_vae(spec)
        except ValueError as error:
            raise ValueError(f"{self.origin}: {error}") from None
        load_weights(vae, self.vae, self.origin)
        return vae.eval().requires_grad_(False)

    def build_discriminator(self) -> PatchGAN:
        """The discriminator, strictly loaded."""
        if self.discriminator is None:
            raise ValueError(f"{self.origin}: no discriminator in it ({self.kind})")
        discriminator = build_discriminator(num_filters=self.discriminator["main.0.weight"].shape[0])
        load_weights(discriminator, self.discriminator, self.origin)
        return discriminator


def load_reference_checkpoint(path: str | Path) -> ReferenceCheckpoint:
    """Read a published `.pt` (or safetensors): joint, latent-only, VAE, latent statistics or discriminator.

    Raises:
        ValueError: one line naming the file: unreadable, of no known layout, or holding code (which is not run).
    """
    origin = str(path)
    content = read_torch_file(origin)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{origin}: no published layout (a mapping is expected, not {type(content).__name__})")
    if "model" in content and "ema" in content:
        return _training_checkpoint(content, origin)
    if set(content) == {"latents_scale", "latents_bias"} and is_state_dict(content):
        scale, bias = (content[name].flatten() for name in ("latents_scale", "latents_bias"))
        return ReferenceCheckpoint(latent_stats=(scale, bias), origin=origin)
    if not is_state_dict(content):
        raise ValueError(f"{origin}: no published layout; its entries are {', '.join(map(str, list(content)[:8]))}")
    if "main.0.weight" in content:
        return ReferenceCheckpoint(discriminator=dict(content), origin=origin)
    vae = autoencoder_part(content)
    _named(origin, vae_spec, vae)
    return ReferenceCheckpoint(vae=vae, origin=origin)


def read_latent_stats(path: str | Path) -> tuple[Tensor, Tensor]:
    """(scale, bias) [C] of a published latent-statistics file, or of the `ema` of a joint checkpoint.

    Raises:
        ValueError: one line naming the file: unreadable, or without statistics.
    """
    checkpoint = load_reference_checkpoint(path)
    if checkpoint.latent_stats is not None:
        return checkpoint.latent_stats
    if checkpoint.ema is None or not {"bn.running_var", "bn.running_mean"} <= checkpoint.ema.keys():
        raise ValueError(f"{path}: no latent statistics in it ({checkpoint.kind})")
    return checkpoint.ema["bn.running_var"].rsqrt(), checkpoint.ema["bn.running_mean"]


def save_reference_checkpoint(checkpoint: ReferenceCheckpoint, path: str | Path) -> None:
    """Write the published layout of `checkpoint.kind`; the file appears whole or not at all.

    `model`, `ema`, `vae` and `discriminator` must be in their modules' order, as `state_dict()` gives it: optimizer
    states are indexed by it. `ema`'s `bn` should hold the statistics to decode with.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        torch.save(_published(checkpoint), partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _training_checkpoint(content: Mapping[str, Any], origin: str) -> ReferenceCheckpoint:
    parts = {name: _plain(content[name]) for name in ("model", "ema")}
    parts |= {name: _plain(content[name]) for name in ("vae", "discriminator") if content.get(name) is not None}
    for name, state in parts.items():
        if not is_state_dict(state):
            raise ValueError(f"{origin}: {name} is no state dict of tensors")
    optimizers = {}
    for saved, part in _OPTIMIZERS.items():
        if content.get(saved) and part in parts:
            shapes = {name: list(parts[part][name].shape) for name in parameter_names(parts[part])}
            optimizers[part] = from_positions(content[saved], shapes, f"{origin}: {saved}")
    args, steps = content.get("args") or {}, content.get("steps", 0)
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict) or not isinstance(steps, int):
        raise ValueError(f"{origin}: args must be the training's settings and steps a number")
    return ReferenceCheckpoint(**parts, optimizers=optimizers, args=dict(args), steps=steps, origin=origin)


def _published(checkpoint: ReferenceCheckpoint) -> dict[str, Any]:
    if checkpoint.kind == "latent-stats":
        assert checkpoint.latent_stats is not None
        scale, bias = (values.float().reshape(1, -1, 1, 1) for values in checkpoint.latent_stats)
        return {"latents_scale": scale, "latents_bias": bias}
    parts = {name: getattr(checkpoint, name) for name in ("model", "ema", "vae", "discriminator")}
    parts = {name: state for name, state in parts.items() if state is not None}
    if checkpoint.kind in ("vae", "discriminator"):
        return dict(parts[checkpoint.kind])
    optimizers = {}
    for saved, part in _OPTIMIZERS.items():
        if part in checkpoint.optimizers:
            around = _AROUND_DISCRIMINATOR if part == "discriminator" else {}
            names = parameter_names(parts[part])
            optimizers[saved] = to_positions(checkpoint.optimizers[part], names, **around)
    return parts | optimizers | {"args": argparse.Namespace(**checkpoint.args), "steps": checkpoint.steps}


def _plain(state: Any) -> Any:
    """Without the prefixes that DDP and torch.compile put before names."""
    if not isinstance(state, dict):
        return state
    return {str(key).removeprefix("module.").removeprefix("_orig_mod."): value for key, value in state.items()}


def _named(origin: str, read: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    try:
        spec: dict[str, Any] = read(*args, **kwargs)
    except KeyError as error:
        raise ValueError(f"{origin}: its state dict has no {error}") from None
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    return spec
