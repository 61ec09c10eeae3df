import pytest
import torch
from diffusers import AutoencoderKL

from repae_core.interop.diffusers_vae import export_diffusers_vae, import_diffusers_vae
from repae_core.models import build_vae

SMALL = {"base_channels": 16, "num_res_blocks": 1, "latent_channels": 4, "norm_groups": 16, "attn_lowest": False}


@pytest.mark.parametrize("multipliers", [(1, 2), (1, 2, 2)])
def test_diffusers_reconstructs_the_same_image(tmp_path, multipliers):
    torch.manual_seed(0)
    vae = build_vae(SMALL | {"channel_multipliers": multipliers}).eval()
    scale, bias = torch.tensor([0.5, 1.0, 2.0, 4.0]), torch.tensor([0.0, 1.0, -1.0, 0.5])
    export_diffusers_vae(vae, tmp_path, scale=scale, bias=bias, sample_size=32)
    theirs = AutoencoderKL.from_pretrained(tmp_path).eval()
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latent = vae.encode(image).mean
        posterior = theirs.encode(image).latent_dist
        torch.testing.assert_close(posterior.mean, latent, rtol=0, atol=1e-4)
        torch.testing.assert_close(posterior.std, vae.encode(image).std, rtol=0, atol=1e-4)
        torch.testing.assert_close(theirs.decode(latent).sample, vae.decode(latent), rtol=0, atol=1e-4)
    assert theirs.config.latents_mean == pytest.approx(bias.tolist())
    assert theirs.config.latents_std == pytest.approx((1 / scale).tolist())
    assert theirs.config.scaling_factor == 1
    back, _ = import_diffusers_vae(tmp_path)
    assert all(torch.equal(v, vae.state_dict()[k]) for k, v in back.state_dict().items())
    assert back.spec == vae.spec
