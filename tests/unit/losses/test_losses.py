"""Losses where the parity data does not look: errors, shapes, states, gradients."""

import pytest
import torch

from repae_core.losses import (
    LeCamEMA,
    alignment_loss,
    build_perceptual,
    flow_matching_loss,
    hinge_discriminator_loss,
    kl_loss,
    lecam_loss,
    reconstruction_loss,
)
from repae_core.models import DiagonalGaussian


def test_alignment_bounds():
    f = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    assert alignment_loss([f], [3 * f]) == pytest.approx(-1)
    assert alignment_loss([f], [-f]) == pytest.approx(1)
    assert alignment_loss([f, f], [f, -f]) == pytest.approx(0, abs=1e-6)
    assert alignment_loss([], []) == 0


@pytest.mark.parametrize("other", [[(2, 4, 7)], [(2, 1, 8)], [(2, 4, 8), (2, 4, 8)]])
def test_alignment_of_unequal_shapes(other):
    with pytest.raises(ValueError, match="differ in shape"):
        alignment_loss([torch.zeros(2, 4, 8)], [torch.zeros(s) for s in other])


def test_alignment_is_in_fp32():
    f = torch.randn(1, 16, 768, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert alignment_loss([f.float()], [f]).dtype == torch.float32


def test_reconstruction():
    a, b = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5)
    assert reconstruction_loss(a, b) == pytest.approx(0.5)
    assert reconstruction_loss(a, b, "l2") == pytest.approx(0.25)
    with pytest.raises(ValueError, match="unknown reconstruction loss 'l3'; known: l1, l2"):
        reconstruction_loss(a, b, "l3")


def test_kl_of_the_standard_normal_is_zero():
    assert kl_loss(DiagonalGaussian(torch.zeros(2, 8, 4, 4))) == 0
    shifted = torch.cat([torch.ones(2, 4, 4, 4), torch.zeros(2, 4, 4, 4)], dim=1)
    assert kl_loss(DiagonalGaussian(shifted)) == pytest.approx(0.5 * 4 * 4 * 4), "summed over dimensions"


def test_flow_matching_is_not_lowered_to_the_prediction_type():
    target = torch.full((1, 1, 1, 1), 1.001)
    assert flow_matching_loss(torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), target) == pytest.approx(1e-6, rel=1e-2)


def test_hinge_is_zero_beyond_the_margin():
    assert hinge_discriminator_loss(torch.tensor([1.5]), torch.tensor([-2.0])) == 0
    assert hinge_discriminator_loss(torch.zeros(3), torch.zeros(3)) == 1


def test_lecam_averages_follow_and_are_saved():
    ema = LeCamEMA(0.9)
    ema.update(torch.tensor([2.0, 4.0]), torch.tensor([-1.0, -1.0]))
    assert ema.state_dict() == pytest.approx({"real": 0.3, "fake": -0.1})
    again = LeCamEMA(0.9)
    again.load_state_dict(ema.state_dict())
    real, fake = torch.tensor([1.0]), torch.tensor([0.0])
    assert torch.equal(again.values, ema.values)
    assert lecam_loss(real, fake, *again.values) == pytest.approx(1.1**2 + 0.3**2)


def test_digits_perceptual():
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(4, 3, 32, 32, generator=g) * 2 - 1, torch.rand(4, 3, 32, 32, generator=g) * 2 - 1
    loss = build_perceptual("digits")
    assert torch.equal(loss(a, a), torch.zeros(4))
    distance = loss(a, b)
    assert distance.shape == (4,)
    assert ((distance > 0) & (distance <= 4)).all()
    torch.testing.assert_close(build_perceptual("digits", double_scale=True)(a, b), loss(2 * a - 1, 2 * b - 1))
    a.requires_grad_()
    loss(a, b).sum().backward()
    assert a.grad is not None
    assert a.grad.abs().sum() > 0
    loss.train()
    assert not any(m.training for m in loss.modules())


def test_perceptual_errors(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="unknown perceptual loss 'vgg'; known: lpips-vgg, lpips-alex, digits"):
        build_perceptual("vgg")
    with pytest.raises(ValueError, match=r"part\.pth: no 'features\.0\.bias'; expected a torchvision vgg file"):
        build_perceptual("lpips-vgg", str(tmp_path / "part.pth"))
    with pytest.raises(ValueError, match=r"part\.pth: does not fit the model"):
        build_perceptual("digits", str(tmp_path / "part.pth"))
