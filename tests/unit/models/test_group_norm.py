"""GroupNorm's own backward pass on the CPU, against torch's."""

import copy

import pytest
import torch

from repae_core.models import build_vae
from repae_core.models.group_norm import GroupNorm

ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("dtype", ROUNDING)
def test_gradients_are_those_of_torch(dtype):
    """Input in the type of a half-precision pass, weights not; 2 channels a group, means and scales that matter."""
    torch.manual_seed(0)
    norm = GroupNorm(16, 32, eps=1e-6).to(torch.promote_types(dtype, torch.float32))
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (3 * torch.randn(3, 32, 9, 7) + 2).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    upstream = torch.randn(3, 32, 9, 7).to(dtype)

    exact = torch.nn.GroupNorm(16, 32, eps=1e-6).double()
    exact.load_state_dict(norm.state_dict())
    x_exact = x.detach().double().requires_grad_()
    expected = exact(x_exact)
    expected.backward(upstream.double())

    y = norm(x)
    assert "RowWise" in type(y.grad_fn).__name__
    y.backward(upstream)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    wanted = [expected, x_exact.grad, exact.weight.grad, exact.bias.grad]
    for ours, theirs in zip([y, x.grad, norm.weight.grad, norm.bias.grad], wanted, strict=True):
        assert (ours - theirs).norm() < ROUNDING[dtype] * theirs.norm()


@pytest.mark.parametrize(
    ("channels", "layout", "dtype"),
    [
        (64, torch.contiguous_format, torch.float32),
        (256, torch.channels_last, torch.float32),
        (512, torch.channels_last, torch.bfloat16),
    ],
)
def test_where_torch_is_as_fast_its_own_runs(channels, layout, dtype):
    x = torch.randn(2, channels, 4, 4).to(dtype).contiguous(memory_format=layout).requires_grad_()
    assert "RowWise" not in type(GroupNorm(32, channels)(x).grad_fn).__name__


def test_a_vae_has_the_same_gradients(monkeypatch):
    ours = build_vae(
        {"base_channels": 32, "channel_multipliers": [1, 2], "norm_groups": 16}
    ).double()  # narrow in fp64 too
    ours = ours.to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64)

    def gradients(vae):
        posterior, _, recon = vae(images, noise)
        (recon.square().mean() + posterior.mean.square().mean()).backward()
        return [p.grad for p in vae.parameters()]

    found = gradients(ours)
    monkeypatch.setattr(GroupNorm, "forward", torch.nn.GroupNorm.forward)
    for a, b in zip(found, gradients(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
