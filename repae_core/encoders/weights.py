"""timm networks of the encoders, from a file, the package or the hub."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from repae_core.digits.networks import digit_vit, read_committed
from repae_core.encoders.registry import DIGITS_VIT, EncoderSpec
from repae_core.weights import load_weights, read_state_dict


def load_vision_transformer(name: str, spec: EncoderSpec, weights: str | None, *, grid: int) -> nn.Module:
    """timm's network of an encoder, without classifier, for images of patch*grid pixels, in fp32.

    weights: a file in timm's format, or None for the hub (`digits-vit`: the committed file).

    Raises:
        ValueError: as `build_encoder`.
    """
    side = spec.patch * grid
    if name == DIGITS_VIT:
        state = read_state_dict(weights) if weights else read_committed("vit")
        with torch.device("meta"):
            network: nn.Module = digit_vit(img_size=side)
        return _fill(network, state, weights or "the committed digits-vit")
    if weights is None:
        return _from_hub(name, spec, side)
    # A table entry's buffers are all in the file, so its random initialisation can be left out; other timm models
    # may compute some when built.
    with torch.device("cpu" if name.startswith("timm/") else "meta"), torch.random.fork_rng(devices=[]):
        network = timm.create_model(spec.architecture, pretrained=False, num_classes=0, img_size=side)
    return _fill(network, read_state_dict(weights), weights)


def _from_hub(name: str, spec: EncoderSpec, side: int) -> nn.Module:
    if not spec.hub:
        raise ValueError(f"{name}: timm's hub has no such weights; give a file in timm's format (encoder_weights)")
    model = f"{spec.architecture}.{spec.hub}"
    try:
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = timm.create_model(model, pretrained=True, num_classes=0, img_size=side)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{name}: no network to download timm/{model} ({str(error).splitlines()[0]}); "
            "give a file in timm's format (encoder_weights)"
        ) from None
    return network


def _fill(network: Any, state: dict[str, Tensor], origin: str) -> nn.Module:
    """Load a timm state dict strictly, apart from its classifier; the position table is resampled in fp32."""
    state = {key: value.float() for key, value in state.items() if not key.startswith(("head.", "head_dist."))}
    if "pos_embed" in state and getattr(network, "pos_embed", None) is not None:
        state["pos_embed"] = resample_abs_pos_embed(
            state["pos_embed"],
            new_size=list(network.patch_embed.grid_size),
            num_prefix_tokens=0 if network.no_embed_class else network.num_prefix_tokens,
        )
    load_weights(network, state, origin, assign=True)
    return cast(nn.Module, network)
