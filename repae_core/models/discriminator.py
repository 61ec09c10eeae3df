"""PatchGAN (Isola et al. 2017) with batch norm, as latent diffusion uses it (system.md section 4)."""

from __future__ import annotations

from torch import Tensor, nn

from repae_core.models.batch_norm import GlobalBatchNorm2d
from repae_core.models.precision import at_least_fp32


class PatchGAN(nn.Module):
    """Images [B,3,H,W] in [-1,1] -> logits [B,1,h,w], one a patch.

    sync_norm: batch statistics over all ranks; off (as published): each worker's own.
    """

    def __init__(
        self, *, num_filters: int = 64, num_layers: int = 3, in_channels: int = 3, sync_norm: bool = False
    ) -> None:
        super().__init__()
        norm = GlobalBatchNorm2d if sync_norm else nn.BatchNorm2d
        layers: list[nn.Module] = [nn.Conv2d(in_channels, num_filters, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = num_filters
        for layer in range(1, num_layers + 1):
            wider = num_filters * min(2**layer, 8)
            stride = 2 if layer < num_layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                norm(wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of realness; fp32 at least, under autocast too."""
        return at_least_fp32(self.main(images))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def build_discriminator(
    num_filters: int = 64, num_layers: int = 3, in_channels: int = 3, *, sync_norm: bool = False
) -> PatchGAN:
    """A freshly initialised PatchGAN."""
    return PatchGAN(num_filters=num_filters, num_layers=num_layers, in_channels=in_channels, sync_norm=sync_norm)
