"""Size of the cache before it is made, and shares of several workers."""

import logging
import shutil
from collections import namedtuple

import pytest
import torch

from repae_core.artifacts import Artifact, Store
from repae_core.data import LatentShards
from repae_core.models import build_vae
from repae_core.stages.cache_latents import cache_size, plan_latents, require_space, write_missing_latents

VAE = {
    "base_channels": 8,
    "channel_multipliers": (1, 1, 1),
    "num_res_blocks": 1,
    "latent_channels": 4,
    "norm_groups": 8,
}
SETTINGS = {"dtype": "float16", "flip": True, "encoders": ("digits-vit",), "encoder_grid": 4}


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return build_vae(VAE).eval().requires_grad_(False)


def plan(vae, images, folder, **settings):
    return plan_latents(vae, images, Artifact(Store(str(folder)), "cache-latents", "test"), **SETTINGS | settings)


def write(work, **settings):
    write_missing_latents(work, batch_size=5, progress=lambda done, total: None, **settings)


def test_the_announced_size_is_what_is_written(vae, images, tmp_path, caplog):
    work = plan(vae, images, tmp_path)
    size = cache_size(work)
    assert size == {"latents": 36 * 2 * 2 * 4 * 8 * 8 * 2, "features": 36 * 2 * 16 * 96 * 2}
    with caplog.at_level(logging.INFO, "repae_core"):
        require_space(work)
    assert "features of digits-vit 0.000221 GB" in caplog.text
    write(work)
    work.writer.finish()
    files = work.writer.artifact.files()
    stored = sum(count for name, count in files.items() if name.endswith(".safetensors"))
    assert sum(size.values()) < stored < sum(size.values()) + len(images) * 8 + 3 * 2_000  # labels and headers


def test_a_full_disk_is_said_before_work(vae, images, tmp_path, monkeypatch):
    work = plan(vae, images, tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(ValueError, match=r"1e-06 GB free, the latent cache needs .*leave cache_latents.encoder empty"):
        require_space(work)
    assert work.writer.artifact.files() == {}


def test_shares_join_to_the_whole(vae, images, tmp_path):
    one, shared = plan(vae, images, tmp_path / "one"), plan(vae, images, tmp_path / "shared")
    progress: list[tuple[int, int]] = []
    write(one)
    write_missing_latents(shared, rank=1, world=2, batch_size=5, progress=lambda *at: progress.append(at))
    assert progress[-1] == (16, 36)  # one of the three shards
    write(shared, rank=0, world=2, loader_workers=1)
    assert one.writer.finish() == shared.writer.finish()
    contents = [
        {name: work.writer.artifact.read_bytes(name) for name in work.writer.artifact.files()} for work in (one, shared)
    ]
    assert contents[0] == contents[1]


def test_mirrored_latents_are_those_of_mirrored_images(vae, images, tmp_path):
    work = plan(vae, images, tmp_path, dtype="float32")
    write(work)
    work.writer.finish()
    latents, chosen = LatentShards(work.writer.artifact), images.shard_indices(0)[:5]
    mask = [True, False, True, True, False]
    pixels = images.images(chosen, mask)
    assert torch.equal(pixels[0], images.images(chosen)[0].flip(-1))
    with torch.no_grad():
        posterior = vae.encode(pixels.float() / 127.5 - 1)
    mean, std = latents.latents(chosen, mask)
    torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std, posterior.std, atol=1e-5, rtol=1e-5)
