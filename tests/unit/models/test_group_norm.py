"""GroupNorm's own backward pass on the CPU, against torch's."""

import pytest
import torch

from repae_core.models import build_vae
from repae_core.models.group_norm import GroupNorm

SHAPE = (3, 32, 9, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_those_of_torch(dtype):
    """2 channels a group, means and scales that matter; those of weight and bias in full precision."""
    torch.manual_seed(0)
    norm = GroupNorm(16, 32, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (3 * torch.randn(SHAPE) + 2).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    upstream = torch.randn(SHAPE).to(dtype)

    exact = torch.nn.GroupNorm(16, 32, eps=1e-6).double()
    exact.load_state_dict(norm.state_dict())
    x_exact = x.detach().double().requires_grad_()
    expected = exact(x_exact)
    expected.backward(upstream.double())

    y = norm(x)
    assert "RowWise" in type(y.grad_fn).__name__
    y.backward(upstream)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    rounding = torch.finfo(dtype).eps / 2
    assert (y - expected).norm() < rounding * expected.norm()
    assert (x.grad - x_exact.grad).norm() < rounding * x_exact.grad.norm()
    for ours, theirs in ((norm.weight.grad, exact.weight.grad), (norm.bias.grad, exact.bias.grad)):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


@pytest.mark.parametrize(
    ("channels", "layout", "dtype"),
    [
        (64, torch.contiguous_format, torch.bfloat16),
        (64, torch.channels_last, torch.float32),
        (512, torch.channels_last, torch.bfloat16),
    ],
)
def test_where_torch_is_as_fast_its_own_runs(channels, layout, dtype):
    x = torch.randn(2, channels, 4, 4).to(dtype).contiguous(memory_format=layout).requires_grad_()
    assert "RowWise" not in type(GroupNorm(32, channels)(x).grad_fn).__name__


@pytest.mark.parametrize(("images", "affine"), [(0, True), (2, False)])
def test_what_has_no_rows_or_weights_is_torchs(images, affine):
    x = torch.randn(images, 64, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    GroupNorm(32, 64, affine=affine)(x).sum().backward()
    assert x.grad.shape == x.shape


def test_a_half_precision_vae_is_as_near_to_the_exact_one(monkeypatch):
    """Against the gradients in fp32: as far off by rounding as with torch's own backward pass."""
    torch.manual_seed(0)
    vae = build_vae({"base_channels": 32, "channel_multipliers": [1, 2], "norm_groups": 16})
    vae = vae.to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    noise = torch.randn(2, 4, 8, 8)

    def gradients(*, half: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            posterior, _, recon = vae(images, noise)
        vae.zero_grad()
        (recon.square().mean() + posterior.mean.square().mean()).backward()
        return torch.cat([p.grad.flatten() for p in vae.parameters()])

    exact, ours = gradients(half=False), gradients(half=True)
    monkeypatch.setattr(GroupNorm, "forward", torch.nn.GroupNorm.forward)
    theirs = gradients(half=True)
    assert not torch.equal(ours, theirs)
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm() < 0.1 * exact.norm()
