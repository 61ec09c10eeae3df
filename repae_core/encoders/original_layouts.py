"""Files of the encoders' authors as timm's state dicts (system.md section 4).

timm itself converts OpenAI's CLIP, DINOv2, DINOv3 and I-JEPA; here is what it leaves: where the weights lie in the
file, and parts of the training that are no part of the encoder.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

# Head or decoder of the self-supervised training (DINO, MAE), classifiers; features need none of them.
_NO_ENCODER = ("head.", "head_dist.", "dino_head.", "ibot_head.", "decoder", "contrast_")


def timm_state_dict(content: Any, network: nn.Module) -> dict[str, Tensor]:
    """A file's content as a state dict for `network`, a timm vision transformer, in fp32, positions resampled to it.

    Layouts: timm's; DINO (backbone, or full checkpoint: its teacher), DINOv2, DINOv3, MoCo v3 (`base_encoder`), MAE
    (with or without decoder), OpenAI CLIP (whole model or its `visual`), I-JEPA (`encoder`).

    Raises:
        ValueError: no state dict in it, or of another patch size or width than the network.
    """
    state = _without_wrapping(content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("holds no plain state dict of tensors")
    _check_patches(state, network)
    state = {name: value.float() for name, value in state.items()}
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is not None:  # some of timm's older models read their own layout only
        state = convert(state, network)
    return {name: value for name, value in state.items() if not name.startswith(_NO_ENCODER) and name != "mask_token"}


def _without_wrapping(content: Any) -> dict[str, Any]:
    for name in ("teacher", "encoder", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        return {}
    for prefix in ("module.base_encoder.", "module.", "backbone."):
        named = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
        content = named or content
    return content


def _check_patches(state: dict[str, Tensor], network: Any) -> None:
    """timm would resample a patch embedding of another size, silently."""
    wanted = list(network.patch_embed.proj.weight.shape)
    for name in ("patch_embed.proj.weight", "visual.conv1.weight"):
        if name in state and list(state[name].shape) != wanted:
            raise ValueError(f"its patch embedding is {list(state[name].shape)}, the encoder's {wanted}")
