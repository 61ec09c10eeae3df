"""Filled weights in other people's code: a second SiT on timm's modules, and diffusers' AutoencoderKL.

Those that a pipeline trained: tests/flows/test_published_interchange.py.
"""

import argparse

import pytest
import torch
from diffusers import AutoencoderKL
from parity.fill import fill
from parity.independent_sit import IndependentSiT, euler_latents

from repae_core import load_model
from repae_core.interop import ReferenceCheckpoint, export_diffusers_vae, save_reference_checkpoint
from repae_core.models import build_sit, build_vae

SAMPLING = {"steps": 6, "guidance": 1.7, "interval": (0.2, 0.8)}
VAE = {"base_channels": 32, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "latent_channels": 4}


@pytest.fixture(scope="module", params=[[48], [48, 32, 16]], ids=["one encoder", "three encoders"])
def published(request, tmp_path_factory):
    """A filled joint checkpoint in the published layout, and the diffusers export of its VAE."""
    folder = tmp_path_factory.mktemp("published")
    sit = fill(
        build_sit(
            "SiT-Tiny/2", input_size=8, in_channels=4, num_classes=10, z_dims=request.param, encoder_depth=3,
            projector_dim=64,
        )
    )  # fmt: skip
    scale, bias = torch.tensor([0.8, 1.5, 0.4, 2.0]), torch.tensor([0.1, -0.4, 0.0, 1.2])
    sit.set_latent_stats(scale=scale, bias=bias)
    vae = fill(build_vae(VAE))
    state = {name: value.clone() for name, value in sit.state_dict().items()}
    checkpoint = ReferenceCheckpoint(model=state, ema=state, vae=vae.state_dict(), steps=1)
    save_reference_checkpoint(checkpoint, folder / "joint.pt")
    export_diffusers_vae(vae, folder / "diffusers", scale=scale, bias=bias, sample_size=32)
    return folder, request.param


def test_the_same_images_elsewhere(published):
    """Strictly loaded; the published sampling and inverse give our latents (1e-5) and our pixels (one level)."""
    folder, z_dims = published
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(folder / "joint.pt", weights_only=True)
    theirs = IndependentSiT(
        side=8, patch=2, channels=4, width=128, depth=4, heads=4, classes=10, z_dims=z_dims, projector_dim=64
    )
    theirs.load_state_dict(content["ema"])
    ours = load_model(folder / "joint.pt", bn_inverse_without_eps=True, **SAMPLING)
    y = torch.tensor([0, 3, 9])
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    low, high = SAMPLING["interval"]
    latents = euler_latents(theirs.eval(), noise, y, steps=6, guidance=1.7, low=low, high=high)
    normalised = ours.sample_latents(y, seed=0, first=0, noise=noise)
    mine = ours.sit.bn.denormalize(normalised, without_eps=True)
    torch.testing.assert_close(mine, latents, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        images = AutoencoderKL.from_pretrained(folder / "diffusers").eval().decode(latents.float()).sample
    levels = (255 * (images + 1) / 2).clamp(0, 255).to(torch.uint8)
    pixels = ours.sample(y, seed=0, noise=noise)
    off = (pixels.int() - levels.int()).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() < 1e-3
    assert pixels.float().std() > 10


def test_our_default_inverse_differs(published):
    """The other side of the switch: the exact inverse puts eps back."""
    folder, _ = published
    y = torch.tensor([1, 2])
    exact, without = (
        load_model(folder / "joint.pt", bn_inverse_without_eps=off, steps=2).sample(y, seed=0) for off in (False, True)
    )
    assert not torch.equal(exact, without)
    assert (exact.int() - without.int()).abs().max() <= 2
