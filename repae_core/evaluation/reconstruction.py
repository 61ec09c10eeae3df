"""How close reconstructions are to their originals: PSNR and SSIM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, one an image, of uint8 images [N,3,H,W].

    Equal images count as if a single value were one level off, 10 log10(255^2 * 3HW): the most that different ones can
    reach (101 dB at 256 px). An infinite one would make the mean infinite, which JSON does not have.
    """
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp(min=1 / a[0].numel()))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), one an image, in [-1,1], of uint8 images [N,3,H,W], sides >= 11.

    Gaussian window 11 with sigma 1.5, per colour channel, range 255, window positions inside the image only. In
    float64: variances are differences of squares, which cancel in fp32 where an image is flat and bright.

    Raises:
        ValueError: images smaller than the window.
    """
    if min(a.shape[-2:]) < _WINDOW:
        raise ValueError(f"SSIM needs images of at least {_WINDOW} pixels, not {list(a.shape[-2:])}")
    a, b = a.double(), b.double()
    mu_a, mu_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mu_a**2, _blur(b * b) - mu_b**2
    covariance = _blur(a * b) - mu_a * mu_b
    luminance = (2 * mu_a * mu_b + _C1) / (mu_a**2 + mu_b**2 + _C1)
    structure = (2 * covariance + _C2) / (var_a + var_b + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(images: Tensor) -> Tensor:
    x = torch.arange(_WINDOW, dtype=images.dtype, device=images.device) - _WINDOW // 2
    kernel = torch.exp(-(x**2) / (2 * _SIGMA**2))
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    rows = F.conv2d(images, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
