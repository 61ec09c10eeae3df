"""What joint tuning does to the latents, and whether samples are copies: pictures and numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repae_core.evaluation.grids import image_grid, png_bytes
from repae_core.evaluation.precision_recall import CHUNK, exact_distances
from repae_core.models import KLVAE


@torch.no_grad()
def posterior_means(vae: KLVAE, images: Tensor) -> Tensor:
    """uint8 [N,3,H,W] -> latents [N,C,h,w], fp32."""
    device = next(vae.parameters()).device
    parts = [vae.encode(part.to(device).float() / 127.5 - 1).mean.float().cpu() for part in images.split(16)]
    return torch.cat(parts)


def pca_rgb(latents: Tensor) -> Tensor:
    """Latents [N,C,h,w] -> uint8 [N,3,h,w]: their first three principal components over all positions.

    Signs are fixed by the largest weight; each component is scaled from its 1st to its 99th percentile.
    """
    n, c, h, w = latents.shape
    flat = latents.permute(0, 2, 3, 1).reshape(-1, c).double()
    flat = flat - flat.mean(dim=0)
    _, vectors = torch.linalg.eigh(flat.T @ flat)
    axes = vectors.flip(1)[:, :3]  # [C, <=3], largest variance first
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    components = flat @ axes
    low, high = (torch.quantile(components[: 1 << 20], q, dim=0) for q in (0.01, 0.99))
    levels = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 255
    levels = torch.nn.functional.pad(levels, (0, 3 - levels.shape[1]))
    return levels.round().to(torch.uint8).view(n, h, w, 3).permute(0, 3, 1, 2).contiguous()


def spectrum(latents: Tensor) -> list[float]:
    """Power of the latents against spatial frequency 0, 1, ... h/2 (cycles an image), each channel at unit variance.

    Averaged over images, channels and directions, in units of white noise: 1 at every frequency would be noise.
    """
    x = latents.double()
    x = x - x.mean(dim=(0, 2, 3), keepdim=True)
    x = x / x.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-12)
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean(dim=(0, 1))  # [h,w]
    rows, columns = (torch.fft.fftfreq(size) * size for size in power.shape)
    radius = (rows[:, None].square() + columns[None, :].square()).sqrt().round().long()
    bins = min(power.shape) // 2 + 1
    return [float(power[radius == r].mean()) for r in range(bins)]


def channel_statistics(latents: Tensor) -> dict[str, list[float]]:
    """Per channel over images and positions: mean, std, and the share of variance in each principal component."""
    flat = latents.permute(1, 0, 2, 3).flatten(1).double()
    values = torch.linalg.eigvalsh(torch.atleast_2d(torch.cov(flat))).flip(0).clamp(min=0)
    return {
        "mean": flat.mean(dim=1).tolist(),
        "std": flat.std(dim=1).tolist(),
        "principal_share": (values / values.sum().clamp(min=1e-12)).tolist(),
    }


def analyse_latents(vaes: dict[str, KLVAE], images: Tensor) -> tuple[dict[str, Any], bytes]:
    """Numbers of each VAE (`before`, `after`) and a picture: images above, PCA of each VAE's latents below."""
    rows, count = [images[:16]], min(16, len(images))
    numbers: dict[str, Any] = {}
    names: list[str] = [name for name in ("before", "after") if name in vaes]
    for name in names:
        latents = posterior_means(vaes[name], images)
        numbers[name] = channel_statistics(latents) | {"spectrum": spectrum(latents), "images": len(images)}
        side = images.shape[-1] // latents.shape[-1]
        rows.append(pca_rgb(latents)[:16].repeat_interleave(side, dim=2).repeat_interleave(side, dim=3))
    scale = max(1, 64 // images.shape[-1])
    return numbers, png_bytes(image_grid(torch.cat(rows), columns=count, scale=scale, labels=["images", *names]))


def nearest_neighbours(samples: Tensor, features: Tensor, real: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """For samples uint8 [Q,3,H,W]: numbers and Euclidean distances [Q,count] of the nearest `real` features [N,D].

    features: those of all samples [M,D]; queries are its first Q rows.
    """
    return _nearest(features[: len(samples)], real, min(count, len(real)))


def nearest_distances(
    features: Tensor, real: Tensor, *, itself: bool = False, device: torch.device | None = None
) -> Tensor:
    """Distance [Q], float64, of each of `features` [Q,D] to the nearest of `real` [N,D]; computed on `device`.

    itself: `features` are the first Q rows of `real`, and row i is no neighbour of its own; an equal one elsewhere is.
    """
    return _nearest(features, real, 1, itself=itself, device=device)[1][:, 0]


def _nearest(
    features: Tensor, real: Tensor, count: int, *, itself: bool = False, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Numbers and distances [Q,count] of the nearest rows of `real`, in parts: 50,000 x 10,000 distances are 4 GB."""
    real, numbers, values = real.to(device, torch.float64), [], []
    for start in range(0, len(features), CHUNK):
        part = features[start : start + CHUNK].to(device, torch.float64)
        distances = exact_distances(part, real)
        if itself:
            rows = torch.arange(len(part), device=device)
            distances[rows, start + rows] = torch.inf
        found = distances.topk(count, dim=1, largest=False)
        numbers.append(found.indices.cpu())
        values.append(found.values.cpu())
    return torch.cat(numbers), torch.cat(values)


def neighbour_picture(samples: Tensor, neighbours: Tensor) -> bytes:
    """One row a sample: the sample [Q,3,H,W], then its nearest real images [Q,K,3,h,w], shown at its size."""
    if neighbours.shape[-2:] != samples.shape[-2:]:
        resized = F.interpolate(neighbours.flatten(0, 1).float(), samples.shape[-2:], mode="bilinear", antialias=True)
        neighbours = resized.round().clamp(0, 255).to(torch.uint8).unflatten(0, neighbours.shape[:2])
    together = torch.cat([samples[:, None], neighbours], dim=1)
    return png_bytes(
        image_grid(together.flatten(0, 1), columns=together.shape[1], scale=max(1, 64 // samples.shape[-1]))
    )


def memorised(
    sample_distances: Tensor, real: Tensor, *, most: int = 2000, device: torch.device | None = None
) -> dict[str, float | None]:
    """How near samples are to real images, against how near real images are to each other.

    sample_distances: nearest distances [Q]; real: features [N,D], of which the first `most` are compared with all
    others. A ratio well below 1 says that samples are closer to training images than these are to one another; None
    where most real images have a copy among themselves.
    """
    among = nearest_distances(real[:most], real, itself=True, device=device)
    typical, nearest = float(among.median()), float(sample_distances.median())
    return {"sample_to_real": nearest, "real_to_real": typical, "ratio": nearest / typical if typical else None}
