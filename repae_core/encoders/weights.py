"""timm networks of the encoders, from a file, the package or the hub."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from torch import nn

from repae_core.config.encoders import DIGITS_VIT, EncoderSpec
from repae_core.digits.networks import digit_vit, read_committed
from repae_core.encoders.original_layouts import timm_state_dict
from repae_core.weights import load_weights, read_torch_file


def load_vision_transformer(name: str, spec: EncoderSpec, weights: str | None, *, grid: int) -> nn.Module:
    """timm's network of an encoder, without classifier, for images of patch*grid pixels, in fp32.

    weights: a file in timm's or the original authors' layout (`timm_state_dict`), or None for the hub (`digits-vit`:
    the committed file).

    Raises:
        ValueError: as `build_encoder`.
    """
    side = spec.patch * grid
    if name == DIGITS_VIT:
        content = read_torch_file(weights) if weights else read_committed("vit")
        with torch.device("meta"):
            network: nn.Module = digit_vit(img_size=side)
        return _fill(network, content, weights or "the committed digits-vit")
    if weights is None:
        return _from_hub(name, spec, side)
    # All tensors of the table's plain transformers are in the file, so random initialisation can be left out; DINOv3
    # and other timm models compute buffers when built.
    plain = not name.startswith(("timm/", "dinov3"))
    with torch.device("meta" if plain else "cpu"), torch.random.fork_rng(devices=[]):
        network = timm.create_model(spec.architecture, pretrained=False, num_classes=0, img_size=side)
    return _fill(network, read_torch_file(weights), weights)


def _from_hub(name: str, spec: EncoderSpec, side: int) -> nn.Module:
    if not spec.hub:
        raise ValueError(f"{name}: timm's hub has no such weights; give a file of the weights (encoder_weights)")
    model = f"{spec.architecture}.{spec.hub}"
    try:
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = timm.create_model(model, pretrained=True, num_classes=0, img_size=side)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{name}: no network to download timm/{model} ({str(error).splitlines()[0]}); "
            "give a file of the weights (encoder_weights)"
        ) from None
    return network


def _fill(network: Any, content: Any, origin: str) -> nn.Module:
    """Load a file's content strictly, apart from its classifier."""
    try:
        state = timm_state_dict(content, network)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    load_weights(network, state, origin, assign=True)
    return cast(nn.Module, network)
