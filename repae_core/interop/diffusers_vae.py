"""Our KL autoencoder as a diffusers `AutoencoderKL` folder, and back (system.md section 7)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from repae_core.models import KLVAE, build_vae

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def export_diffusers_vae(vae: KLVAE, folder: str | Path, *, scale: Tensor, bias: Tensor, sample_size: int) -> None:
    """Write a folder that `AutoencoderKL.from_pretrained` loads and that reconstructs equally.

    scale, bias: latent statistics [C]; stored as latents_mean = bias, latents_std = 1/scale; scaling_factor is 1.
    sample_size: side of the images it was trained on, pixels.
    """
    spec = vae.spec
    levels = len(spec["channel_multipliers"])
    model: Any = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=_block_types("Down", "Encoder", levels, lowest_last=True, attn=spec["attn_lowest"]),
        up_block_types=_block_types("Up", "Decoder", levels, lowest_last=False, attn=spec["attn_lowest"]),
        block_out_channels=tuple(spec["base_channels"] * m for m in spec["channel_multipliers"]),
        layers_per_block=spec["num_res_blocks"],
        latent_channels=spec["latent_channels"],
        norm_num_groups=spec["norm_groups"],
        sample_size=sample_size,
        scaling_factor=1.0,
        latents_mean=[float(v) for v in bias],
        latents_std=[float(1 / v) for v in scale],
    )
    state = {}
    for name, tensor in vae.state_dict().items():
        theirs = diffusers_name(name, levels)
        linear = re.search(r"attentions\.\d+\.to_.*weight$", theirs)
        state[theirs] = (tensor[:, :, 0, 0] if linear else tensor).contiguous()
    model.load_state_dict(state)
    model.save_pretrained(folder, safe_serialization=True)


def import_diffusers_vae(folder: str | Path) -> tuple[KLVAE, dict[str, Any]]:
    """A diffusers `AutoencoderKL` with quant convolutions as our KLVAE, and its latent statistics if stored.

    Raises:
        ValueError: an architecture that ours cannot express, naming the config entry.
    """
    model = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
    config = model.config
    widths = config.block_out_channels
    if not (config.use_quant_conv and config.use_post_quant_conv):
        raise ValueError(f"{folder}: use_quant_conv is off; such a VAE is not supported yet")
    if any(width % widths[0] for width in widths):
        raise ValueError(f"{folder}: block_out_channels {tuple(widths)} are not multiples of the first")
    vae = build_vae(
        {
            "base_channels": widths[0],
            "channel_multipliers": tuple(width // widths[0] for width in widths),
            "num_res_blocks": config.layers_per_block,
            "latent_channels": config.latent_channels,
            "attn_lowest": config.down_block_types[-1].startswith("Attn"),
            "norm_groups": config.norm_num_groups,
        }
    )
    theirs, ours = model.state_dict(), vae.state_dict()
    state = {name: theirs[diffusers_name(name, len(widths))].reshape(t.shape) for name, t in ours.items()}
    vae.load_state_dict(state)
    stats = {}
    if config.latents_mean is not None and config.latents_std is not None:
        stats = {"bias": torch.tensor(config.latents_mean), "scale": 1 / torch.tensor(config.latents_std)}
    return vae, stats


def diffusers_name(name: str, levels: int) -> str:
    """Our state-dict name (CompVis's) -> diffusers'."""
    name = re.sub(r"down\.(\d+)\.block", r"down_blocks.\1.resnets", name)
    name = re.sub(r"down\.(\d+)\.attn", r"down_blocks.\1.attentions", name)
    name = re.sub(r"down\.(\d+)\.downsample", r"down_blocks.\1.downsamplers.0", name)
    name = re.sub(r"up\.(\d+)\.", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.", name)
    name = re.sub(r"(up_blocks\.\d+)\.block", r"\1.resnets", name)
    name = re.sub(r"(up_blocks\.\d+)\.attn", r"\1.attentions", name)
    name = re.sub(r"(up_blocks\.\d+)\.upsample", r"\1.upsamplers.0", name)
    name = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", name)
    name = name.replace("mid.attn_1", "mid_block.attentions.0")
    name = name.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
    attention = re.search(r"attentions\.\d+\.(\w+)\.(?:weight|bias)$", name)
    if attention:
        name = name.replace(f".{attention[1]}.", f".{_ATTENTION[attention[1]]}.")
    return name


def _block_types(direction: str, side: str, levels: int, *, lowest_last: bool, attn: bool) -> tuple[str, ...]:
    plain, attentive = f"{direction}{side}Block2D", f"Attn{direction}{side}Block2D"
    lowest = levels - 1 if lowest_last else 0
    return tuple(attentive if attn and level == lowest else plain for level in range(levels))
