"""Constructor arguments of our models, read off a published state dict's names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from repae_core.config.architectures import SIT_SIZES, parse_sit_name


def sit_spec(state: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `SiT` for a SiT state dict; heads and depth of projection come from the training's `args`.

    args: the published command line's settings (`model`, `encoder_depth`, `cfg_prob`, `bn_momentum`).

    Raises:
        ValueError: not a SiT, or of a size that args do not name.
    """
    for key in ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight"):
        if key not in state:
            raise ValueError(f"no SiT: its state dict has no {key!r}")
    hidden, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
    depth = _count(state, r"blocks\.(\d+)\.")
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    dropout = float(args.get("cfg_prob", 0.1))
    conv = "projectors.0.weight" in state
    last, first = ("weight", "weight") if conv else ("4.weight", "0.weight")
    projectors = _count(state, r"projectors\.(\d+)\.")
    return {
        "input_size": math.isqrt(state["pos_embed"].shape[1]) * patch,
        "patch_size": patch,
        "in_channels": in_channels,
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": _heads(hidden, depth, args),
        "num_classes": rows - 1 if dropout > 0 else rows,
        "encoder_depth": int(args.get("encoder_depth", min(8, depth))),
        "z_dims": [state[f"projectors.{k}.{last}"].shape[0] for k in range(projectors)],
        "projector_dim": state[f"projectors.0.{first}"].shape[0] if projectors and not conv else 2048,
        "class_dropout_prob": dropout,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "bn_momentum": float(args.get("bn_momentum", 0.1)),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden,
        "projector": "conv" if conv else "mlp",
    }


def sit_name(spec: Mapping[str, Any]) -> str:
    """`SiT-B/2` for SiT's constructor arguments; ValueError for a size without a name."""
    for name, size in SIT_SIZES.items():
        if size == (spec["depth"], spec["hidden_size"], spec["num_heads"]):
            return f"SiT-{name}/{spec['patch_size']}"
    raise ValueError(f"no published name for {spec['depth']} blocks of {spec['hidden_size']} channels")


def vae_spec(state: Mapping[str, Tensor], *, norm_groups: int = 32) -> dict[str, Any]:
    """Arguments of `build_vae` for a KL autoencoder's state dict (CompVis names).

    norm_groups: no weight shows it; 32 in everything published.

    Raises:
        ValueError: not such an autoencoder.
    """
    for key in ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"):
        if key not in state:
            raise ValueError(f"no KL autoencoder: its state dict has no {key!r}")
    base, in_channels = state["encoder.conv_in.weight"].shape[:2]
    levels = _count(state, r"encoder\.down\.(\d+)\.")
    widths = [state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    return {
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "num_res_blocks": _count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "attn_lowest": f"encoder.down.{levels - 1}.attn.0.q.weight" in state,
        "norm_groups": norm_groups,
        "in_channels": in_channels,
        "quant_conv": "quant_conv.weight" in state,
    }


def vae_name(spec: Mapping[str, Any]) -> str:
    """`f<downsampling>d<latent channels>`, the published command line's `--vae`."""
    return f"f{2 ** (len(spec['channel_multipliers']) - 1)}d{spec['latent_channels']}"


def _heads(hidden: int, depth: int, args: Mapping[str, Any]) -> int:
    if "model" in args:
        size, _ = parse_sit_name(args["model"])
        if size.depth == depth and size.hidden_size == hidden:
            return size.num_heads
    for size in SIT_SIZES.values():
        if size.depth == depth and size.hidden_size == hidden:
            return size.num_heads
    raise ValueError(f"a SiT of {depth} blocks and {hidden} channels has no published size")


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1
