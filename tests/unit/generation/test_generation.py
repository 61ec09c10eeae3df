import numpy as np
import pytest
import torch

from repae_core.artifacts import Artifact, Store
from repae_core.generation import Generator, SamplerSettings, sample_labels, to_uint8
from repae_core.generation.load import load_model, open_artifact_uri
from repae_core.models import build_sit, build_vae

VAE = {"base_channels": 16, "channel_multipliers": (1, 2), "num_res_blocks": 1, "latent_channels": 4, "norm_groups": 16}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    sit = build_sit("SiT-Tiny/2", input_size=8, in_channels=4, num_classes=3, z_dims=(8,), encoder_depth=2)
    for parameter in sit.parameters():  # a fresh SiT predicts zero, whatever its inputs
        torch.nn.init.normal_(parameter, std=0.1)
    return sit, build_vae(VAE)


def generator(models, **settings) -> Generator:
    return Generator(*models, SamplerSettings(steps=3, **settings))


@pytest.mark.parametrize("sampler", ["ode", "heun", "sde"])
def test_an_image_depends_on_its_place_not_on_its_batch(models, sampler):
    made = generator(models, sampler=sampler, guidance=2.0)
    whole = made.sample([0, 1, 2, 0], seed=5)
    assert whole.dtype == torch.uint8
    assert whole.shape == (4, 3, 16, 16)
    part = made.sample([2, 0], seed=5, first=2)
    difference = (whole[2:].int() - part.int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 1e-3
    assert not torch.equal(whole[0], whole[3])  # same class, other noise
    assert not torch.equal(made.sample([0], seed=6), whole[:1])


def test_guidance_and_interval_matter(models):
    labels = [0, 1, 2]
    plain = generator(models).sample(labels)
    guided = generator(models, guidance=3.0).sample(labels)
    assert not torch.equal(plain, guided)
    never = generator(models, guidance=3.0, interval=(0.01, 0.02)).sample(labels)
    assert torch.equal(plain, never)


def test_labels_outside_the_classes_are_refused(models):
    for wrong in ([3], [-1]):
        with pytest.raises(ValueError, match=r"labels must be in 0\.\.2"):
            generator(models).sample(wrong)


def test_decode_inverts_the_latent_norm(models):
    sit, vae = models
    sit.set_latent_stats(scale=torch.full((4,), 2.0), bias=torch.full((4,), 3.0))
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    made = Generator(sit, vae)
    torch.testing.assert_close(made.decode(sit.eval().bn(z)), vae.decode(z), rtol=1e-4, atol=1e-4)


def test_uint8():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 127, 254, 255, 255]
    assert to_uint8(values, "round").tolist() == [0, 0, 128, 255, 255, 255]


def test_equal_labels():
    labels = sample_labels("equal", 30, 3, seed=0)
    assert np.bincount(labels).tolist() == [10, 10, 10]
    assert labels.tolist() != sorted(labels.tolist())
    assert np.array_equal(labels, sample_labels("equal", 30, 3, seed=0))
    assert not np.array_equal(labels, sample_labels("equal", 30, 3, seed=1))
    assert np.bincount(sample_labels("equal", 31, 3, seed=0)).tolist() == [11, 10, 10]


def test_other_labels():
    assert sample_labels("2,0", 5, 3, seed=0).tolist() == [2, 0, 2, 0, 2]
    assert set(sample_labels("random", 100, 3, seed=0)) == {0, 1, 2}
    with pytest.raises(ValueError, match=r"generate\.labels: class 3 does not exist"):
        sample_labels("3", 5, 3, seed=0)


def test_loading_what_is_not_a_model(tmp_path):
    with pytest.raises(ValueError, match="not a finished artifact"):
        load_model(f"{tmp_path}/train-ldm/abc")
    with pytest.raises(ValueError, match="not an artifact folder"):
        open_artifact_uri("abc")
    other = Artifact(Store(str(tmp_path)), "preprocess", "abc")
    other.commit(version=1, config={}, inputs={}, started_at="", seconds=0)
    with pytest.raises(
        ValueError, match="expected an artifact of train-repae, train-ldm or generate, not of preprocess"
    ):
        load_model(other.uri)
