import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from repae_core.artifacts import Artifact, Store
from repae_core.data.image_shards import ImageShards
from repae_core.data.latent_shards import LatentShards
from repae_core.data.latent_statistics import LatentStatistics
from repae_core.data.latent_writer import LatentWriter
from repae_core.data.preprocess import preprocess_images
from repae_core.data.sources import open_source

SHAPE = (3, 4, 4)
COUNT = 11


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(COUNT):
        path = folder / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(path)
    made = Artifact(Store(str(tmp_path_factory.mktemp("store"))), "preprocess", "test")
    preprocess_images(open_source(str(folder)), made, resolution=8, images_per_shard=4, seed=0)
    return ImageShards(made)


def random_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(COUNT, *shape, generator=generator)

    values = {name: draw(*SHAPE) * 3 + 1 for name in ("mean", "mean_flip")}
    values |= {name: draw(*SHAPE).exp() for name in ("std", "std_flip")}
    features = {name: [draw(5, 6), draw(5, 2)] for name in ("features", "features_flip")}
    return values, features


def artifact(folder, name="test") -> Artifact:
    return Artifact(Store(str(folder)), "cache-latents", name)


def fill(made, images, *, flip=True, encoders=("one", "two"), dtype="float32", only=None):
    values, features = random_tensors()
    writer = LatentWriter(made, images, dtype=dtype, flip=flip, encoders=encoders, encoder_grid=2)
    for k in writer.missing() if only is None else only:
        rows = images.shard_indices(k)
        given = {name: tensor[rows] for name, tensor in values.items() if flip or "flip" not in name}
        if encoders:
            given |= {
                name: [tensor[rows] for tensor in group]
                for name, group in features.items()
                if flip or "flip" not in name
            }
        writer.write(k, **given)
    return writer


@pytest.fixture(scope="module")
def made(images, tmp_path_factory):
    made = artifact(tmp_path_factory.mktemp("latents"))
    summary = fill(made, images).finish()
    return made, summary


def direct_statistics(mean, std):
    """Var[z] = Var[mean] + E[std^2] in NumPy float64, all values at once."""
    mean, std = mean.double().numpy(), std.double().numpy()
    variance = mean.var(axis=(0, 2, 3)) + (std**2).mean(axis=(0, 2, 3))
    return variance**-0.5, mean.mean(axis=(0, 2, 3))


@pytest.mark.parametrize("memory_bytes", [2**30, 0, COUNT * 2 * 4 * 48 + 10])
def test_what_is_read_is_what_was_written(images, made, memory_bytes):
    values, features = random_tensors()
    latents = LatentShards(made[0], memory_bytes=memory_bytes)
    assert len(latents) == COUNT
    assert latents.keys == images.keys
    assert np.array_equal(latents.labels, images.labels)
    assert (latents.latent_shape, latents.num_classes, latents.flip) == (SHAPE, 2, True)
    assert (latents.encoders, latents.encoder_grid) == (("one", "two"), 2)
    order = np.array([10, 0, 3, 3, 7])
    mean, std = latents.latents(order)
    assert torch.equal(mean, values["mean"][order])
    assert torch.equal(std, values["std"][order])
    for read, written in zip(latents.features(order), features["features"], strict=True):
        assert read.dtype == torch.float32
        assert torch.equal(read, written[order].half().float())


@pytest.mark.parametrize("memory_bytes", [2**30, 0])
def test_mirrored_rows_where_the_mask_says(made, memory_bytes):
    values, features = random_tensors()
    latents = LatentShards(made[0], memory_bytes=memory_bytes)
    order, mask = np.array([2, 9, 4, 2]), np.array([True, False, True, False])
    mean, std = latents.latents(order, mask)
    pick = torch.from_numpy(mask)[:, None, None, None]
    assert torch.equal(mean, torch.where(pick, values["mean_flip"][order], values["mean"][order]))
    assert torch.equal(std, torch.where(pick, values["std_flip"][order], values["std"][order]))
    read = latents.features(order, torch.from_numpy(mask))[1]
    plain, mirrored = features["features"][1][order].half(), features["features_flip"][1][order].half()
    assert torch.equal(read, torch.where(pick[..., 0], mirrored, plain).float())


def test_a_batch_is_the_callers_own(made):
    latents = LatentShards(made[0])
    latents.latents(np.arange(3))[0].zero_()
    assert latents.latents(np.arange(3))[0].any()


def test_shards_are_plain_safetensors(images, made):
    values, _ = random_tensors()
    stored = load(made[0].read_bytes("latents/00001.safetensors"))
    rows = images.shard_indices(1)
    assert torch.equal(stored["mean"], values["mean"][rows])
    assert stored["labels"].tolist() == images.labels[rows].tolist()
    assert stored["features.0"].dtype == torch.float16


def test_stats_equal_the_direct_computation(made):
    values, _ = random_tensors()
    scale, bias = direct_statistics(values["mean"], values["std"])
    latents = LatentShards(made[0])
    assert np.allclose(latents.scale.numpy(), scale, rtol=1e-13, atol=0)
    assert np.allclose(latents.bias.numpy(), bias, rtol=1e-13, atol=0)
    assert made[1]["scale"] == latents.scale.tolist()
    assert made[0].read_json("latent_stats.json")["images"] == COUNT


def test_stats_are_those_of_the_stored_type(images, tmp_path):
    values, _ = random_tensors()
    fill(artifact(tmp_path), images, flip=False, encoders=(), dtype="bfloat16").finish()
    latents = LatentShards(artifact(tmp_path))
    rounded = {name: values[name].bfloat16() for name in ("mean", "std")}
    scale, _ = direct_statistics(rounded["mean"].float(), rounded["std"].float())
    assert np.allclose(latents.scale.numpy(), scale, rtol=1e-13, atol=0)
    assert torch.equal(latents.latents(np.arange(COUNT))[0], rounded["mean"].float())
    assert latents.features(np.arange(2)) == []
    assert latents.encoder_grid is None


def test_stopped_and_resumed_gives_the_same_bytes(images, made, tmp_path):
    other = artifact(tmp_path)
    fill(other, images, only=[2])
    fill(other, images, only=[0])
    whole = {name: made[0].read_bytes(name) for name in made[0].files()}
    other.write_bytes("latents/00001.safetensors", whole["latents/00001.safetensors"])  # killed before its sidecar
    other.write_bytes("latents/00000.safetensors", whole["latents/00000.safetensors"][:-8])  # shorter than stated
    assert LatentWriter(other, images).missing() == [0, 1]
    fill(other, images).finish()
    assert {name: other.read_bytes(name) for name in other.files()} == whole


def test_shards_of_skipped_images_only_are_left_out(tmp_path):
    for name in ("a/0.png", "a/1.png", "b/2.png"):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "source" / "a" / "1.png").write_bytes(b"")
    made = Artifact(Store(str(tmp_path / "store")), "preprocess", "test")
    preprocess_images(
        open_source(str(tmp_path / "source")), made, resolution=8, images_per_shard=1, seed=0, max_skipped_fraction=0.5
    )
    images = ImageShards(made)
    writer = LatentWriter(artifact(tmp_path / "store"), images)
    assert len(writer.missing()) == 2
    for k in writer.missing():
        writer.write(k, mean=torch.full((1, *SHAPE), float(k)), std=torch.ones(1, *SHAPE))
    writer.finish()
    latents = LatentShards(writer.artifact)
    latents.require_same_images(images)
    assert latents.latents(np.arange(2))[0][:, 0, 0, 0].tolist() == [
        k for k in range(3) if len(images.shard_indices(k))
    ]


def test_join_names_the_first_mismatch(images, made):
    latents = LatentShards(made[0])
    latents.require_same_images(images)
    other = copy.copy(images)
    other.keys = images.keys[:5]
    with pytest.raises(ValueError, match=f"holds {COUNT} latents for 5 images"):
        latents.require_same_images(other)
    other.keys = [*images.keys[:3], "00009999", *images.keys[4:]]
    with pytest.raises(ValueError, match=rf"latent 3 is of image {images.keys[3]}.*image 3 is 00009999"):
        latents.require_same_images(other)
    other.keys, other.labels = images.keys, 1 - images.labels
    with pytest.raises(ValueError, match="latent 0 is of image"):
        latents.require_same_images(other)


def test_join_refuses_another_data_set_with_the_same_keys(images, made):
    other = copy.copy(images)
    other.artifact = Artifact(images.artifact.store, "preprocess", "0123456789abcdef")
    with pytest.raises(ValueError, match="not of 0123456789abcdef: made of other images"):
        LatentShards(made[0]).require_same_images(other)


def test_errors(images, tmp_path):
    with pytest.raises(ValueError, match="repae stage cache-latents"):
        LatentShards(artifact(tmp_path))
    fill(artifact(tmp_path), images, flip=False).finish()
    latents = LatentShards(artifact(tmp_path))
    latents.latents(np.arange(2), np.array([False, False]))
    with pytest.raises(ValueError, match=r"cache_latents\.flip=true"):
        latents.latents(np.arange(2), np.array([False, True]))
    with pytest.raises(ValueError, match=r"cache_latents\.flip=true"):
        latents.features(np.arange(2), np.array([False, True]))
    writer = LatentWriter(artifact(tmp_path, "other"), images, dtype="float16")
    with pytest.raises(ValueError, match="latent shard 0: mean has values that are not finite as float16"):
        writer.write(0, mean=torch.full((4, *SHAPE), 1e6), std=torch.ones(4, *SHAPE))
    with pytest.raises(ValueError, match="latent shard 0: mean holds 3 images, expected 4"):
        writer.write(0, mean=torch.ones(3, *SHAPE), std=torch.ones(3, *SHAPE))
    assert writer.artifact.files() == {}


def test_statistics_do_not_depend_on_the_parts():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(40, 3, 5, 5, generator=generator) + 1e4  # a large offset: naive sums would cancel
    std = torch.rand(40, 3, 5, 5, generator=generator)
    scale, bias = direct_statistics(mean, std)
    for sizes in ([40], [1] * 40, [7, 0, 13, 20]):
        streamed, merged = LatentStatistics(3), LatentStatistics(3)
        for part_mean, part_std in zip(mean.split(sizes), std.split(sizes), strict=True):
            streamed.update(part_mean, part_std)
            part = LatentStatistics(3)
            part.update(part_mean, part_std)
            merged.merge(LatentStatistics.from_state(json.loads(json.dumps(part.state()))))
        for statistics in (streamed, merged):
            assert statistics.count == 1000
            assert np.allclose(statistics.scale().numpy(), scale, rtol=1e-12, atol=0)
            assert np.allclose(statistics.bias().numpy(), bias, rtol=1e-13, atol=0)


def test_statistics_are_the_moments_of_samples():
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(200, 2, 16, 16, generator=generator) * torch.tensor([1.0, 4.0])[:, None, None] + 2
    std = torch.rand(200, 2, 16, 16, generator=generator) * 3
    statistics = LatentStatistics(2)
    statistics.update(mean, std)
    z = mean + std * torch.randn(mean.shape, generator=generator)
    assert torch.allclose(statistics.variance().float(), z.var(dim=(0, 2, 3)), rtol=0.03)
    assert torch.allclose(statistics.bias().float(), z.mean(dim=(0, 2, 3)), rtol=0.03)


def test_statistics_of_nothing():
    with pytest.raises(ValueError, match="no latents were measured"):
        LatentStatistics(2).scale()
