"""Pipeline-trained models in other people's code: the published layout and the diffusers export give our images."""

import argparse
import os
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from parity.independent_sit import IndependentSiT, euler_latents
from torch import Tensor, nn

from repae_core import load_model
from repae_core.artifact_models import load_latent_stats, load_sit
from repae_core.artifacts import Artifact, RunRecord, Store
from repae_core.config import PipelineConfig
from repae_core.diffusion import item_generators, randn
from repae_core.generation import sample_labels
from repae_core.interop import (
    measured_statistics,
    reference_checkpoint,
    reference_vae_files,
    save_reference_checkpoint,
)
from repae_core.stages.generate import read_samples

# Enough training for labels and guidance to matter in every pixel.
TRAINED = ["max_steps=12", "learning_rate=0.01", "ema_decay=0.5", "lr_warmup_steps=0"]
SAMPLING = ["guidance=2.5", "guidance_interval=[0.1,0.8]", "steps=5"]


class Pipeline(NamedTuple):
    """Finished stages of one config."""

    config: PipelineConfig
    record: RunRecord

    def artifact(self, stage: str) -> Artifact:
        return Artifact(Store(self.config.store), stage, self.record.stages[stage].fingerprint)


@pytest.fixture(scope="module", params=["train-repae", "train-ldm"])
def published(request, original, tmp_path_factory) -> Pipeline:
    """The tiny pipeline under `compat: published`, with samples of the joint or of the latent-only model."""
    place = tmp_path_factory.getbasetemp() / "published"
    before, os.environ["REPAE_HOME"] = os.environ["REPAE_HOME"], str(place / "home")
    sets = [f"{section}.{value}" for section in ("train_repae", "train_ldm") for value in TRAINED]
    sets += [f"generate.{value}" for value in (*SAMPLING, f"model={request.param}")]
    try:
        config = tiny.config(original.images, place / "store", "compat=published", *sets)
        return Pipeline(config, tiny.run_pipeline(config))
    finally:
        os.environ["REPAE_HOME"] = before


def their_files(pipeline: Pipeline, folder: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(checkpoint, VAE) as other people's code reads them from the files we write."""
    model = pipeline.artifact(pipeline.config.generate.model)
    joint = model.stage == "train-repae"
    stats = measured_statistics(model) if joint else None
    save_reference_checkpoint(reference_checkpoint(model, latent_stats=stats), folder / "model.pt")
    save_reference_checkpoint(reference_vae_files(pipeline.artifact("extract-vae"))[""], folder / "vae.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(folder / "model.pt", weights_only=True)
    return content, content["vae"] if joint else torch.load(folder / "vae.pt", weights_only=True)


def their_sit(pipeline: Pipeline, state: dict[str, Tensor]) -> IndependentSiT:
    sit = IndependentSiT(
        side=8, patch=2, channels=4, width=128, depth=4, heads=4, classes=tiny.CLASSES,
        z_dims=[state["projectors.0.4.weight"].shape[0]], projector_dim=32,
    )  # fmt: skip
    sit.load_state_dict(state)
    return sit.eval()


@torch.no_grad()
def their_images(pipeline: Pipeline, sit: IndependentSiT, vae: AutoencoderKL) -> np.ndarray:
    """uint8 [N,H,W,3] by the published sampling, inverse of the latent norm and truncation, from our noise."""
    section, count = pipeline.config.generate, pipeline.config.generate.num_images
    y = torch.from_numpy(sample_labels("random", count, tiny.CLASSES, pipeline.config.seed))
    noise = randn((4, 8, 8), item_generators(pipeline.config.seed, "generate.noise", range(count)))
    low, high = section.guidance_interval
    z = euler_latents(sit, noise, y, steps=section.steps, guidance=section.guidance, low=low, high=high)
    images = vae.decode(z.float()).sample
    return (255 * (images + 1) / 2).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def folder_vae(pipeline: Pipeline) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(f"{pipeline.artifact('extract-vae').uri}/diffusers").eval()


def assert_same_pixels(theirs: np.ndarray, ours: np.ndarray) -> None:
    off = np.abs(theirs.astype(int) - ours.astype(int))
    assert off.max() <= 1  # a level of truncation
    assert (off > 0).mean() < 1e-3


def our_images(pipeline: Pipeline) -> tuple[np.ndarray, np.ndarray]:
    made = pipeline.artifact("generate")
    return read_samples(made, made.read_json("samples.json")["shards"])


def test_the_same_images_from_the_published_layout(published, tmp_path):
    """SiT loads strictly on timm's modules, the VAE through diffusers' own reading of CompVis names."""
    content, state = their_files(published, tmp_path)
    vae = folder_vae(published)
    vae.load_state_dict({name: torch.zeros_like(value) for name, value in vae.state_dict().items()})
    vae.load_state_dict(convert_ldm_vae_checkpoint(dict(state), vae.config))
    sit = their_sit(published, content["ema"])
    theirs, (ours, _) = their_images(published, sit, vae), our_images(published)
    assert_same_pixels(theirs, ours)
    their_sit(published, content["model"])  # the weights that are not averaged load as strictly
    # What is compared depends on every part: labels and guidance through SiT, the statistics.
    for part, change in (
        ("y_embedder.embedding_table.weight", lambda x: x.flip(0)),
        ("blocks.3.attn.qkv.weight", lambda x: x.flip(1)),
        ("bn.running_mean", lambda x: x + 0.2),
        ("bn.running_var", lambda x: x * 1.2),
    ):
        broken = their_sit(published, content["ema"] | {part: change(content["ema"][part])})
        assert (np.abs(their_images(published, broken, vae).astype(int) - ours) > 1).mean() > 1e-3, part


def test_the_same_images_from_the_diffusers_export(published, tmp_path):
    content, _ = their_files(published, tmp_path)
    vae = folder_vae(published)
    theirs = their_images(published, their_sit(published, content["ema"]), vae)
    assert_same_pixels(theirs, our_images(published)[0])
    scale, bias = load_latent_stats(published.artifact("extract-vae"))
    np.testing.assert_allclose(vae.config.latents_mean, bias, rtol=1e-6)
    np.testing.assert_allclose(vae.config.latents_std, 1 / scale, rtol=1e-6)


def test_the_file_holds_the_statistics_that_are_decoded_with(published, tmp_path):
    content, _ = their_files(published, tmp_path)
    used = published.artifact("generate").read_json("samples.json")
    np.testing.assert_allclose(content["ema"]["bn.running_mean"], used["bias"], rtol=1e-6)
    np.testing.assert_allclose(content["ema"]["bn.running_var"].rsqrt(), used["scale"], rtol=1e-6)


def test_our_own_readers_give_the_same_images(published, tmp_path):
    their_files(published, tmp_path)
    section, (ours, labels) = published.config.generate, our_images(published)
    settings = {
        "steps": section.steps, "guidance": section.guidance, "interval": section.guidance_interval,
        "bn_inverse_without_eps": True,
    }  # fmt: skip
    joint = section.model == "train-repae"
    place = tmp_path / "joint.pt"
    if not joint:  # a bare VAE file cannot say how many groups its norms have; a joint checkpoint does
        save_reference_checkpoint(reference_checkpoint(published.artifact("train-repae")), place)
    artifact = published.artifact(section.model)
    model = load_model(tmp_path / "model.pt", vae=None if joint else place, **settings)
    same = load_model(artifact.uri, **settings)
    last = artifact.manifest().checkpoints[-1]
    again = load_model(f"{artifact.uri}/checkpoints/{last}", **settings)
    for generator in (model, same, again):
        images = generator.sample(labels, seed=published.config.seed)
        assert_same_pixels(images.permute(0, 2, 3, 1).numpy(), ours)


def test_the_discriminator_loads_strictly(published, tmp_path):
    part = reference_vae_files(published.artifact("extract-vae"))["-discriminator-ckpt"]
    save_reference_checkpoint(part, tmp_path / "discriminator.pt")
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2)]
    for before, after, stride in ((16, 32, 2), (32, 64, 2), (64, 128, 1)):
        layers += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
    theirs = nn.Module()
    theirs.main = nn.Sequential(*layers, nn.Conv2d(128, 1, 4, 1, 1))
    theirs.load_state_dict(torch.load(tmp_path / "discriminator.pt", weights_only=True))


def stats_of_average(artifact: Artifact) -> tuple[Tensor, Tensor]:
    return load_sit(artifact)[0].latent_stats()


def test_latent_statistics_on_both_sides_of_the_switch(published, original):
    """Published: the moving average's, in every later stage; ours: measured on the extracted VAE, then on the cache."""
    for stage in {"extract-vae", "cache-latents"} & set(published.record.stages):
        for value, average in zip(
            load_latent_stats(published.artifact(stage)),
            stats_of_average(published.artifact("train-repae")),
            strict=True,
        ):
            torch.testing.assert_close(value, average.double(), rtol=1e-6, atol=1e-7)
    used = published.artifact("generate").read_json("samples.json")
    np.testing.assert_allclose(used["scale"], load_latent_stats(published.artifact("extract-vae"))[0], rtol=1e-6)
    ours, average = load_latent_stats(original.artifact("extract-vae")), original.artifact("train-repae")
    assert not torch.allclose(ours[0], stats_of_average(average)[0].double(), rtol=1e-3)
    assert original.artifact("extract-vae").read_json("latent_stats.json")["images"] == 36
    cached = original.artifact("cache-latents")
    assert cached.read_json("latent_stats.json")["images"] == 36
    torch.testing.assert_close(load_latent_stats(cached)[0], ours[0], rtol=1e-4, atol=0)


def test_labels_on_both_sides_of_the_switch(published, original):
    _, labels = our_images(published)
    assert published.config.generate.labels == "equal"
    assert np.array_equal(labels, sample_labels("random", 12, tiny.CLASSES, published.config.seed))
    made = original.artifact("generate")
    assert np.bincount(read_samples(made, made.read_json("samples.json")["shards"])[1]).tolist() == [4, 4, 4]


def test_the_position_table_on_both_sides_of_the_switch(published, original):
    """Trained in the joint loop only under the switch; in latent training never."""
    fresh = load_sit(original.artifact("train-ldm"))[0].pos_embed
    for stage in {"train-repae", "train-ldm"} & set(published.record.stages):
        for weights in ("raw", "ema"):
            table = load_sit(published.artifact(stage), weights=weights)[0].pos_embed
            assert torch.equal(table, fresh) == (stage == "train-ldm"), (stage, weights)
    assert torch.equal(load_sit(original.artifact("train-repae"))[0].pos_embed, fresh)
