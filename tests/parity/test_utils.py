"""Scaling of images, latent normalisation, uint8 conversion and grids (utils.*)."""

import numpy as np
import pytest
import torch
from parity.fill import scalars, tensors

from repae_core.evaluation.grids import image_grid
from repae_core.generation.generator import to_uint8
from repae_core.models import LatentNorm

T, J = tensors("utils"), scalars("utils")


def latent_norm(eps: float) -> LatentNorm:
    norm = LatentNorm(3).double().eval()
    norm.eps = eps
    norm.set_stats(scale=T["latents.in.scale"], bias=T["latents.in.bias"])
    return norm


def test_latents_are_normalised_as_published():
    """The published helper is (x - bias) * scale: our latent norm without its eps, which the switch leaves out."""
    x = T["latents.in.x"].double()
    torch.testing.assert_close(latent_norm(0.0)(x).float(), T["latents.normalized"], atol=1e-5, rtol=1e-5)
    published = latent_norm(1e-4).denormalize(x, without_eps=True)
    torch.testing.assert_close(published.float(), T["latents.denormalized"], atol=1e-5, rtol=1e-5)


def test_both_sides_of_the_inverse():
    """Ours is the exact inverse of the forward pass, eps and all; the published one misses it by the eps."""
    norm, x = latent_norm(1e-4), T["latents.in.x"].double()
    torch.testing.assert_close(norm.denormalize(norm(x)), x, atol=1e-12, rtol=0)
    missed = norm.denormalize(norm(x), without_eps=True) - x
    variance = norm.running_var.double()[None, :, None, None]
    centred = x - norm.running_mean.double()[None, :, None, None]
    torch.testing.assert_close(missed, centred * (variance / (variance + 1e-4)).sqrt() - centred, atol=1e-12, rtol=0)
    assert missed.abs().max() > 1e-6


def test_images_scaled_to_minus_one_and_one():
    k, size = J["k"], J["resolution"]
    x, y = np.arange(size)[None, :], np.arange(size)[:, None]
    planes = [((k + 2) * x + (k + 7) * y * (q + 1) + x * y // (17 + q)) % 256 for q in range(3)]
    images = torch.from_numpy(np.stack(planes).astype(np.uint8))[None].float() / 127.5 - 1
    torch.testing.assert_close(images[..., ::17, ::17], T["preprocess_imgs_vae.every_17th"], atol=1e-6, rtol=0)


def test_written_images_are_truncated():
    samples = T["array2grid.in.samples"]  # in [0,1], partly beyond
    ours = to_uint8(samples.double() * 2 - 1).permute(0, 2, 3, 1)
    # A level of the float32 product may sit on an integer by rounding alone; nothing else may differ.
    level = samples.permute(0, 2, 3, 1).double() * 255
    on_the_edge = (level - level.round()).abs() < 1e-3
    assert torch.equal(ours[~on_the_edge], T["generate_uint8.out"][~on_the_edge])
    assert on_the_edge.float().mean() < 0.02


def test_logged_grid_is_rounded():
    """The published logging grid: rounded levels, row by row; ours has a gap of white and other columns."""
    samples, published = T["array2grid.in.samples"], T["array2grid.out"]
    ours = to_uint8(samples * 2 - 1, "round")
    grid = np.asarray(image_grid(ours, columns=2))
    side = samples.shape[-1]
    pixels = {tuple(ours[i].permute(1, 2, 0).flatten().tolist()) for i in range(len(samples))}
    found = {
        tuple(published[top : top + side, left : left + side].flatten().tolist())
        for top in range(published.shape[0] - side + 1)
        for left in range(published.shape[1] - side + 1)
    }
    assert pixels <= found
    assert grid.shape[2] == 3


@pytest.mark.parametrize("rounding", ["truncate", "round"])
def test_levels_come_back(rounding):
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.double() / 127.5 - 1 + 1e-7, rounding), levels)
