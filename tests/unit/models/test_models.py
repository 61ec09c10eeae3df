"""Models where the parity data does not look: initial state, errors, gradients, round trips."""

import pytest
import torch

from repae_core.models import DiagonalGaussian, LatentNorm, build_discriminator, build_sit, build_vae, drop_labels
from repae_core.models.batch_norm import GlobalBatchNorm2d
from repae_core.models.vae import Upsample

SIT = {"input_size": 8, "in_channels": 4, "num_classes": 10, "z_dims": [12, 7], "encoder_depth": 2}
TINY_VAE = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_groups": 4}


@pytest.fixture
def sit():
    torch.manual_seed(0)
    return build_sit("SiT-Tiny/2", **SIT, projector_dim=16)


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 8, 8, generator=g), torch.rand(3, generator=g), torch.tensor([0, 9, 10])


def test_fresh_sit_predicts_zero(sit, inputs):
    velocity, projections = sit(*inputs, with_projections=True)
    assert torch.equal(velocity, torch.zeros(3, 4, 8, 8))
    assert [p.shape for p in projections] == [(3, 16, 12), (3, 16, 7)]


def test_sit_keeps_patches_in_place(sit):
    """A token's outputs land on its own pixels, row by row."""
    tokens = torch.zeros(1, 16, 16)
    tokens[0, 6] = 1  # row 1, column 2
    image = sit.unpatchify(tokens)
    assert image[0, :, 2:4, 4:6].eq(1).all()
    assert image.sum() == 16


def test_project_is_the_early_part_of_forward(sit, inputs):
    _, projections = sit(*inputs, with_projections=True)
    for early, full in zip(sit.project(*inputs), projections, strict=True):
        torch.testing.assert_close(early, full)


def test_positions_are_fixed(sit):
    assert not sit.pos_embed.requires_grad
    assert sit.pos_embed.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("SiT-XXL/2", {}, "SiT-XXL/2"),
        ("SiT-Tiny/8", {"input_size": 12}, "patch_size=8 does not divide input_size=12"),
        ("SiT-Tiny/2", {"encoder_depth": 99}, "encoder_depth=99 must be between 1 and the depth"),
        ("SiT-Tiny/2", {"projector": "huge"}, "huge"),
    ],
)
def test_sit_errors(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build_sit(name, **SIT | changes)


def test_vae_round_trip_of_shapes():
    vae = build_vae(TINY_VAE | {"latent_channels": 3})
    x = torch.zeros(2, 3, 16, 24)
    posterior, z, recon = vae(x, torch.zeros(2, 3, 8, 12))
    assert vae.downsample_factor == 2
    assert torch.equal(z, posterior.mode())
    assert recon.shape == x.shape


@pytest.mark.parametrize(
    ("architecture", "message"),
    [("f4d9", "unknown VAE 'f4d9'; known: "), (TINY_VAE | {"norm_groups": 3}, "norm_groups=3 does not divide")],
)
def test_vae_errors(architecture, message):
    with pytest.raises(ValueError, match=message):
        build_vae(architecture)


def test_upsample_is_doubling_and_a_convolution():
    """Output and every gradient, on an image that is not square."""
    torch.manual_seed(0)
    layer, x = Upsample(5).double(), torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    found = []
    for layer.as_defined in (False, True):
        y = layer(x)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        found.append([y, *torch.autograd.grad((y * weights).sum(), [x, layer.conv.weight, layer.conv.bias])])
    assert found[0][0].shape == (2, 5, 6, 8)
    torch.testing.assert_close(found[0], found[1], atol=1e-13, rtol=0)


def test_gaussian_draws_belong_to_the_image():
    posterior = DiagonalGaussian(torch.zeros(2, 4, 3, 3))
    both = posterior.sample([torch.Generator().manual_seed(s) for s in (5, 6)])
    alone = DiagonalGaussian(torch.zeros(1, 4, 3, 3)).sample([torch.Generator().manual_seed(6)])
    torch.testing.assert_close(both[1:], alone)
    assert posterior.kl(posterior).tolist() == [0, 0]


def test_latent_norm():
    z = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 5 + 2
    norm = LatentNorm(3, momentum=1.0).train()
    out = norm(z)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(norm.running_var, z.var((0, 2, 3)), rtol=1e-4, atol=0)
    norm.eval()
    torch.testing.assert_close(norm.denormalize(norm(z)), z, atol=1e-4, rtol=1e-4)
    assert not list(norm.parameters())


def test_global_batch_norm_of_one_rank_is_torchs():
    """Values, gradients and running statistics; how it sums over several: `tests/distributed/test_ranks.py`."""
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 2
    results = []
    for norm in (torch.nn.BatchNorm2d(3).double(), GlobalBatchNorm2d(3).double()):
        torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
        given = x.clone().requires_grad_()
        y = norm(given)
        y.pow(3).sum().backward()
        results.append(
            [y, given.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var, norm.eval()(x)]
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_global_batch_norm_keeps_the_type_and_takes_a_single_value():
    norm = GlobalBatchNorm2d(3)
    for training in (True, False):
        assert norm.train(training)(torch.ones(1, 3, 1, 1).bfloat16()).dtype == torch.bfloat16
    assert norm.running_var.isfinite().all()


def test_latent_statistics_can_be_set_back(sit):
    sit.bn.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5, 0.0]))
    sit.bn.running_var.copy_(torch.tensor([4.0, 0.25, 1.0, 9.0]))
    scale, bias = sit.latent_stats()
    sit.set_latent_stats(scale=scale.view(1, 4, 1, 1), bias=bias.view(1, 4, 1, 1))
    torch.testing.assert_close(sit.bn.running_var, torch.tensor([4.0, 0.25, 1.0, 9.0]))
    with pytest.raises(ValueError, match="latent statistics of 3 channels, the model has 4"):
        sit.set_latent_stats(scale=torch.ones(3), bias=torch.ones(3))


def test_drop_labels():
    y = torch.arange(10)
    assert torch.equal(drop_labels(y, 0.0, null_class=10), y)
    assert drop_labels(y, 1.0, null_class=10).eq(10).all()
    mask = y < 3
    assert drop_labels(y, 0.0, null_class=10, mask=mask).tolist() == [10, 10, 10, *range(3, 10)]
    many = drop_labels(torch.zeros(10000, dtype=torch.long), 0.1, null_class=1, generator=torch.Generator())
    assert many.float().mean() == pytest.approx(0.1, abs=0.01)


def test_discriminator_gives_a_logit_a_patch():
    logits = build_discriminator(num_filters=8)(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 1, 2, 2)


def test_convolution_projector_on_the_token_grid(inputs):
    """Tokens are row-major, padding is zeros: token (i, j) of a 4x4 grid, written out."""
    torch.manual_seed(0)
    sit = build_sit("SiT-Tiny/2", **SIT | {"z_dims": [12]}, projector="conv")
    tokens = []
    sit.blocks[1].register_forward_hook(lambda _, __, out: tokens.append(out.detach()))
    (found,) = sit.project(*inputs)
    (projector,) = sit.projectors
    for i, j in ((0, 0), (0, 2), (2, 1), (3, 3)):
        expected = projector.bias.expand(3, -1)
        for di, dj in ((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
            if 0 <= i + di < 4 and 0 <= j + dj < 4:
                neighbour = tokens[0][:, 4 * (i + di) + j + dj]
                expected = expected + neighbour @ projector.weight[:, :, di + 1, dj + 1].T
        torch.testing.assert_close(found[:, 4 * i + j], expected, rtol=1e-4, atol=1e-5)
