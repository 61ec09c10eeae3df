"""Perceptual distances between images: LPIPS (Zhang et al. 2018), and its like on the digits' small network."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, Self, cast

import lpips
import torch
import torch.nn.functional as F
from filelock import FileLock
from lpips.lpips import ScalingLayer
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights, VGG16_Weights, WeightsEnum

from repae_core.digits.networks import DigitCNN, load_digit_perceptual
from repae_core.models.precision import hold_rounded_weights
from repae_core.remote_files import downloads_folder
from repae_core.weights import load_weights, read_state_dict


class _Backbone(NamedTuple):
    net: str  # the lpips package's name
    hub: WeightsEnum  # ImageNet weights the heads were fitted on


_BACKBONES = {
    "lpips-vgg": _Backbone("vgg", VGG16_Weights.IMAGENET1K_V1),
    "lpips-alex": _Backbone("alex", AlexNet_Weights.IMAGENET1K_V1),
}
PERCEPTUAL_NAMES = (*_BACKBONES, "digits")


class PerceptualLoss(nn.Module):
    """Distance of two batches of images [B,3,H,W] in [-1,1] -> [B], >= 0; frozen, always in eval mode."""

    def freeze(self) -> Self:
        """Eval mode, no parameter gradients; gradients still reach the images."""
        return self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: a parent's `train()` must not switch on dropout or batch statistics."""
        return super().train(False)


class LPIPS(PerceptualLoss):
    """LPIPS v0.1, with an ImageNet backbone and the lpips package's linear heads.

    double_scale: map the images by 2x-1 once more, as the published training does (compat `lpips_double_scale`).
    trunk_dtype: autocast type of the backbone's convolutions; None = fp32.
    """

    def __init__(
        self, network: nn.Module, *, double_scale: bool = False, trunk_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.network: Any = network
        if trunk_dtype is not None:
            self.network.net = HalfPrecisionTrunk(cast(nn.Module, network.net), trunk_dtype)
        self.double_scale = double_scale
        self.freeze()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Images [B,3,H,W] in [-1,1] -> [B]."""
        distance: Tensor = self.network(a, b, normalize=self.double_scale)
        return distance.flatten()  # [B,1,1,1]


class HalfPrecisionTrunk(nn.Module):
    """A convolutional trunk under autocast; its features leave it in fp32, in which distances are computed."""

    def __init__(self, trunk: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        hold_rounded_weights(trunk, dtype)
        self.trunk, self.dtype = trunk, dtype

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [B,3,H,W] -> the trunk's named tuple of features."""
        with torch.autocast(x.device.type, dtype=self.dtype):
            features = self.trunk(x)
        return type(features)(*(f.float() for f in features))


class DigitsPerceptual(PerceptualLoss):
    """LPIPS without heads on the digits network: squared differences of channel-normalised activations.

    Summed over channels, averaged over positions and over the three taps: between 0 and 4.
    """

    def __init__(self, network: DigitCNN, *, double_scale: bool = False) -> None:
        super().__init__()
        self.network = network
        self.double_scale = double_scale
        self.freeze()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Images [B,3,H,W] in [-1,1], sides divisible by 2 -> [B]."""
        if self.double_scale:
            a, b = 2 * a - 1, 2 * b - 1
        pairs = zip(self.network.taps(a), self.network.taps(b), strict=True)
        return torch.stack([_normalized_difference(p, q) for p, q in pairs]).mean(dim=0)


def _normalized_difference(p: Tensor, q: Tensor) -> Tensor:
    # eps: where all of a ReLU layer's channels are (nearly) 0, the direction is noise and its gradient huge.
    p, q = F.normalize(p, dim=1, eps=1e-2), F.normalize(q, dim=1, eps=1e-2)
    return (p - q).square().sum(dim=1).mean(dim=(1, 2))


def build_perceptual(
    name: str, weights: str | None = None, *, double_scale: bool = False, trunk_dtype: torch.dtype | None = None
) -> PerceptualLoss:
    """The perceptual distance `lpips-vgg`, `lpips-alex` or `digits`: (a, b) in [-1,1] -> [B].

    weights: backbone weights, a local or remote safetensors or .pth file in torchvision's layout (for `digits`:
    a file of `repae_core.digits.train`). None: torchvision's own, downloaded once (`digits`: the committed ones).
    double_scale, trunk_dtype: see `LPIPS` (the digits' small network stays fp32).

    Raises:
        ValueError: unknown name, unreadable or unfitting weights, or no weights and no network.
    """
    if name == "digits":
        network = load_digit_perceptual()
        if weights:
            load_weights(network, read_state_dict(weights), weights)
        return DigitsPerceptual(network, double_scale=double_scale)
    if name not in _BACKBONES:
        raise ValueError(f"unknown perceptual loss {name!r}; known: {', '.join(PERCEPTUAL_NAMES)}")
    state = read_state_dict(weights) if weights else _download(name)
    lpips_network = _lpips_network(name, state, weights or f"torchvision's {name} backbone")
    return LPIPS(lpips_network, double_scale=double_scale, trunk_dtype=trunk_dtype)


def _lpips_network(name: str, state: dict[str, Tensor], origin: str) -> nn.Module:
    with torch.device("meta"), warnings.catch_warnings():  # no random weights, no memory for VGG's classifier
        warnings.simplefilter("ignore", UserWarning)  # lpips uses torchvision's deprecated `pretrained`
        network = lpips.LPIPS(net=_BACKBONES[name].net, pretrained=False, pnet_rand=True, verbose=False)
    trunk = {}
    for key in network.net.state_dict():  # slice2.5.weight is torchvision's features.5.weight
        source = "features." + key.split(".", 1)[1]
        if source not in state:
            raise ValueError(f"{origin}: no {source!r}; expected a torchvision {name.removeprefix('lpips-')} file")
        trunk[key] = state[source].float()
    load_weights(network.net, trunk, origin, assign=True)
    heads = read_state_dict(f"{lpips.__path__[0]}/weights/v0.1/{_BACKBONES[name].net}.pth")
    network.load_state_dict(heads, strict=False, assign=True)
    network.scaling_layer = ScalingLayer()
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    return network


def _download(name: str) -> dict[str, Tensor]:
    try:
        with FileLock(downloads_folder() / f"{name}.lock"):  # torch's own cache: one downloads, the others wait
            state: dict[str, Tensor] = _BACKBONES[name].hub.get_state_dict(
                progress=False, check_hash=True, weights_only=True, map_location="cpu"
            )
    except OSError as error:
        url = _BACKBONES[name].hub.url
        raise ValueError(
            f"{name}: no network to download {url} ({error}); give that file as the perceptual weights "
            "(train_repae.perceptual_weights, evaluate.perceptual_weights), or set train_repae.perceptual_loss=none "
            "(evaluate.perceptual=[])"
        ) from None
    return state
