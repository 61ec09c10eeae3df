"""The KL autoencoders against the published implementation (vae.*)."""

import pytest
import torch
from parity.fill import fill, tensors

from repae_core.models import DiagonalGaussian, build_vae

T = tensors("vae")


@pytest.fixture(scope="module", params=["f8d4", "f16d32"])
def case(request):
    return request.param, fill(build_vae(request.param)).eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=5e-5, rtol=1e-5)


@torch.no_grad()
def test_encode(case):
    name, vae = case
    posterior = vae.encode(T["in.image"])
    for field in ("mean", "logvar", "std"):
        close(getattr(posterior, field), T[f"{name}.{field}"])
    close(vae.quant_conv(vae.encoder(T["in.image"])), T[f"{name}.moments"])
    close(posterior.kl(), T[f"{name}.kl"])
    other = DiagonalGaussian(0.5 * T[f"{name}.moments"] + 0.3)
    close(posterior.kl(other), T[f"{name}.kl_to_other"])
    z = posterior.sample(noise=T[f"{name}.posterior_noise"])
    close(z, T[f"{name}.z_sampled_with_posterior_noise"])
    close(posterior.nll(z), T[f"{name}.nll_of_z"])


@torch.no_grad()
def test_decode_and_forward(case):
    name, vae = case
    close(vae.decode(T[f"{name}.mean"]), T[f"{name}.recon_from_mean"])
    noise = torch.randn(T[f"{name}.mean"].shape, generator=torch.Generator().manual_seed(3))
    _, z, recon = vae(T["in.image"], noise)
    close(z, T[f"{name}.z_sampled_seed3"])
    close(recon, T[f"{name}.recon_seed3_forward"])


def test_logvar_is_clamped():
    posterior = DiagonalGaussian(T["clamp.in.moments"])
    close(posterior.logvar, T["clamp.logvar"])
    torch.testing.assert_close(posterior.var, T["clamp.var"], rtol=1e-6, atol=0)
    mirrored = DiagonalGaussian(-T["clamp.in.moments"])  # the stored ramp stays above the lower bound
    close(mirrored.logvar, (-T["clamp.in.moments"]).chunk(2, dim=1)[1].clamp(-30, 20))
    assert mirrored.logvar.min() == -30
