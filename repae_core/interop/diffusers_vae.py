"""Our KL autoencoder as a diffusers `AutoencoderKL` folder, and back (system.md section 7)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import Tensor

from repae_core.config.architectures import diffusers_architecture
from repae_core.models import KLVAE, build_vae
from repae_core.weights import load_weights, read_state_dict

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# Files written before diffusers 0.17.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def export_diffusers_vae(
    vae: KLVAE,
    folder: str | Path,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    sample_size: int = 256,
) -> None:
    """Write a folder that `AutoencoderKL.from_pretrained` loads and that reconstructs equally.

    scale, bias: latent statistics [C], both or neither; stored as latents_mean = bias, latents_std = 1/scale;
    scaling_factor is 1. sample_size: side of the images it was trained on, pixels.
    """
    from diffusers import AutoencoderKL  # here: it takes two seconds, which every worker would wait for

    if (scale is None) != (bias is None):
        raise ValueError("latent statistics are scale and bias: give both or neither")
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
        use_quant_conv=spec["quant_conv"],
        use_post_quant_conv=spec["quant_conv"],
        sample_size=sample_size,
        scaling_factor=1.0,
        latents_mean=None if bias is None else [float(v) for v in bias.flatten()],
        latents_std=None if scale is None else [float(1 / v) for v in scale.flatten()],
    )
    state = {}
    for name, tensor in vae.state_dict().items():
        theirs = diffusers_name(name, levels)
        linear = re.search(r"attentions\.\d+\.to_.*weight$", theirs)
        state[theirs] = (tensor[:, :, 0, 0] if linear else tensor).contiguous()
    model.load_state_dict(state)
    model.save_pretrained(folder, safe_serialization=True)


def import_diffusers_vae(folder: str | Path) -> tuple[KLVAE, dict[str, Tensor]]:
    """A diffusers `AutoencoderKL` folder (local or URI) as our KLVAE, and its latent statistics if stored.

    With or without quant convolutions, any number of channels: SD, SD 3.5, FLUX. Statistics: `scale` and `bias` [C] of
    `latents_std` and `latents_mean`.

    Raises:
        ValueError: a missing file, or an architecture that ours cannot express, naming the config entry.
    """
    folder = str(folder).rstrip("/")
    try:
        with fsspec.open(f"{folder}/config.json", "rb") as file:
            config = json.load(file)
        vae = build_vae(diffusers_architecture(config))
    except (OSError, ImportError) as error:
        raise ValueError(f"{folder}/config.json: cannot be read ({error})") from None
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    weights = f"{folder}/diffusion_pytorch_model.safetensors"
    load_weights(vae, from_diffusers(read_state_dict(weights), vae), weights)
    stats = {}
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        stats = {"bias": torch.tensor(config["latents_mean"]), "scale": 1 / torch.tensor(config["latents_std"])}
    return vae, stats


def is_diffusers_state(state: Mapping[str, Tensor]) -> bool:
    """Whether a VAE's state dict has diffusers' names."""
    return any(name.startswith("encoder.down_blocks.") for name in state)


def from_diffusers(state: Mapping[str, Tensor], vae: KLVAE) -> dict[str, Tensor]:
    """A state dict with diffusers' names under ours; names unknown to `vae` stay, for a strict load to refuse."""
    ours = vae.state_dict()
    levels = len(vae.spec["channel_multipliers"])
    renamed = {diffusers_name(name, levels): name for name in ours}
    converted = {}
    for theirs, tensor in state.items():
        old = re.search(r"attentions\.\d+\.(\w+)\.(?:weight|bias)$", theirs)
        known = (
            theirs.replace(f".{old[1]}.", f".{_OLD_ATTENTION[old[1]]}.") if old and old[1] in _OLD_ATTENTION else theirs
        )
        name = renamed.get(known, theirs)
        wanted = ours.get(name)
        if wanted is not None and wanted.numel() == tensor.numel():
            tensor = tensor.reshape(wanted.shape)  # attention: linear layers there, 1x1 convolutions here
        converted[name] = tensor.float()
    return converted


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
