"""The memorisation check: copies near 0, fresh draws near 1, whatever the width and however many are compared."""

import pytest
import torch

from repae_core.stages import latent_pictures
from repae_core.stages.latent_pictures import memorised, nearest_distances, nearest_neighbours


def draws(count, width, seed):
    # Far from zero, as features after a ReLU are: there the matrix-product shortcut loses small distances.
    return 5 + torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def found(samples, real, **settings):
    return memorised(nearest_distances(samples, real), real, **settings)


@pytest.mark.parametrize("width", [8, 64, 2048])
@pytest.mark.parametrize("most", [50, 2000])
def test_copies_and_fresh_draws(width, most):
    real = draws(400, width, 0)
    assert found(draws(200, width, 1), real, most=most)["ratio"] == pytest.approx(1, abs=0.15)
    assert found(real[:200], real, most=most)["ratio"] == 0
    near = real[:200] + 1e-4 * torch.randn(200, width, generator=torch.Generator().manual_seed(2))
    assert 0 < found(near, real, most=most)["ratio"] < 1e-3


def test_among_real_images_only_the_image_itself_is_left_out(monkeypatch):
    """By its index, in every part of the rows: a duplicate is a neighbour at distance 0."""
    monkeypatch.setattr(latent_pictures, "CHUNK", 3)
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0], [15.0], [31.0], [63.0]])
    assert nearest_distances(real, real).tolist() == [0.0] * 7
    assert nearest_distances(real, real, itself=True).tolist() == [1, 1, 2, 4, 8, 16, 32]
    assert nearest_distances(real[:5], real, itself=True).tolist() == [1, 1, 2, 4, 8]
    assert memorised(torch.tensor([2.0]), real) == {"sample_to_real": 2, "real_to_real": 4, "ratio": 0.5}
    doubled = torch.cat([real, real])
    assert nearest_distances(doubled, doubled, itself=True).tolist() == [0.0] * 14
    assert memorised(torch.tensor([2.0]), doubled)["ratio"] is None  # real images are copies of one another


def test_nearest_neighbours_in_parts_are_those_of_the_whole(monkeypatch):
    samples, real = draws(11, 16, 0), draws(30, 16, 1)
    pictures = torch.zeros(7, 3, 4, 4, dtype=torch.uint8)
    expected = torch.cdist(samples[:7].double(), real.double()).topk(5, dim=1, largest=False)
    monkeypatch.setattr(latent_pictures, "CHUNK", 3)
    indices, distances = nearest_neighbours(pictures, samples, real, count=5)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(distances, expected.values)
