import io

import numpy as np
import pytest
import torch

from repae_core.artifacts import Artifact, Store
from repae_core.config import GenerateConfig
from repae_core.generation import Generator, SamplerSettings, sample_labels, to_uint8
from repae_core.generation.load import load_model, open_artifact_uri
from repae_core.generation.pictures import class_grid, one_class_grid
from repae_core.generation.sample_file import write_sample_file
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


def test_images_that_are_not_finite_are_refused(models):
    sit, vae = models
    noise = torch.zeros(3, 4, 8, 8)
    noise[1, 0, 0, 0] = float("nan")
    made = Generator(sit, vae, SamplerSettings(steps=3, guidance=2.0), origin="checkpoint 5 of x")
    with pytest.raises(ValueError, match=r"image 8 of checkpoint 5 of x is not finite .* steps=3, guidance=2:"):
        made.sample([0, 1, 2], first=7, noise=noise)


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
    some = sample_labels("random", 100, 3, seed=0)
    assert set(some) == {0, 1, 2}
    assert some.dtype == np.int64
    assert np.array_equal(some[:7], sample_labels("random", 7, 3, seed=0)), "of (seed, i), not of how many there are"
    assert not np.array_equal(some, sample_labels("random", 100, 3, seed=1))
    counts = np.bincount(sample_labels("random", 3000, 3, seed=0))
    assert np.abs(counts - 1000).max() < 130  # five standard deviations
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


def test_a_guide_takes_the_unconditional_half(models):
    sit, vae = models
    torch.manual_seed(1)
    weaker = build_sit("SiT-Tiny/2", input_size=8, in_channels=4, num_classes=3, z_dims=(8,), encoder_depth=2)
    settings = SamplerSettings(steps=3, guidance=2.0)
    free = Generator(sit, vae, settings).sample([0, 1])
    assert not torch.equal(Generator(sit, vae, settings, guide=weaker).sample([0, 1]), free)
    itself = Generator(sit, vae, settings, guide=sit).sample([0, 1])
    unguided = Generator(sit, vae, SamplerSettings(steps=3)).sample([0, 1])
    assert int((itself.int() - unguided.int()).abs().max()) <= 1
    other = build_sit("SiT-Tiny/2", input_size=8, in_channels=4, num_classes=4, z_dims=(8,), encoder_depth=2)
    with pytest.raises(ValueError, match=r"generate\.guide: its SiT has num_classes=4, the model's 3"):
        Generator(sit, vae, settings, guide=other)


def test_bf16_is_of_sits_products_only(models):
    sit, vae = models
    types = []
    hooks = [sit.blocks[0].mlp.fc1.register_forward_hook(lambda *a: types.append(a[2].dtype)),
             vae.decoder.register_forward_hook(lambda *a: types.append(a[2].dtype))]  # fmt: skip
    rough = generator(models, mixed_precision="bf16").sample([0, 1])
    for hook in hooks:
        hook.remove()
    assert types == [torch.bfloat16] * 3 + [torch.float32]
    exact = generator(models).sample([0, 1])
    assert not torch.equal(rough, exact)
    assert float((rough.float() - exact.float()).abs().mean()) < 5


def test_sample_file_is_written_in_parts():
    """What NumPy writes in one go is read the same, and the parts leave no trace."""
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    files = []
    for cuts in ([], [3], [1, 2, 6]):
        stream = io.BytesIO()
        write_sample_file(stream, 7, np.split(images, cuts))
        files.append(stream.getvalue())
    assert files[0] == files[1] == files[2]
    with np.load(io.BytesIO(files[0]), allow_pickle=False) as loaded:
        assert loaded.files == ["arr_0"]
        assert np.array_equal(loaded["arr_0"], images)
    with pytest.raises(ValueError, match="7 images for a file of 8"):
        write_sample_file(io.BytesIO(), 8, [images])


def test_grids_show_the_first_samples_of_classes_that_occur():
    labels = np.array([207, 3, 207, 3, 3])
    pixels = np.stack([np.full((64, 64, 3), 40 * i, dtype=np.uint8) for i in range(5)])
    grid = np.asarray(class_grid(pixels, labels))
    margin = grid.shape[1] - 10 * 66 - 2
    rows = [[int(grid[row * 66 + 30, margin + column * 66 + 30, 0]) for column in range(4)] for row in range(2)]
    assert rows == [[40, 120, 160, 40], [0, 80, 0, 80]]  # class 3, then class 207; few are repeated
    assert one_class_grid(pixels[:3]).size[1] < one_class_grid(np.concatenate([pixels] * 2)).size[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guide": "latest"}, "guide is given, but guidance=1 never calls it"),
        ({"guide": "train-repae", "guidance": 2.0}, "another stage than model='train-ldm'"),
        ({"guidance_interval": (0.7, 0.1)}, "0 <= low <= high <= 1"),
        ({"labels": "cats"}, "a list of class numbers"),
        ({"mixed_precision": "fp8"}, "'no' or 'bf16'"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**settings)
