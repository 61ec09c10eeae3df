"""iREPA's normalisation on features out of the cache: the same as on features computed from the images."""

import numpy as np
import pytest
import torch

from repae_core.artifact_models import load_vae
from repae_core.artifacts import Artifact
from repae_core.data import ImageShards, LatentShards
from repae_core.encoders import build_encoder
from repae_core.training.distributed import open_group
from repae_core.training.ldm_run import LDMRun


@pytest.mark.parametrize("coefficient", [None, 0.6])
def test_spatial_norm_is_applied_once(finished, coefficient):
    config = finished.configure(*([] if coefficient is None else [f"train_ldm.spatial_norm={coefficient}"]))
    latents = LatentShards(finished.artifact("cache-latents"))
    assert tuple(latents.encoders) == ("digits-vit",)
    vae, out = load_vae(finished.artifact("extract-vae")), Artifact(finished.store, "train-ldm", "test")
    run = LDMRun(config, latents, None, vae, out, open_group())
    chosen = np.arange(8)
    batch = run.batch(run.read(chosen, None), run.draws(chosen), 0)
    images = ImageShards(finished.artifact("preprocess")).images(chosen)
    expected = build_encoder("digits-vit", grid=4, spatial_norm=coefficient)(images)
    torch.testing.assert_close(batch.features[0].float(), expected, rtol=5e-3, atol=5e-3)  # stored as fp16


def test_a_run_that_continues_another_has_the_statistics_of_its_own_cache(finished):
    """SiT may have been trained on another VAE's latents before."""
    latents = LatentShards(finished.artifact("cache-latents"))
    latents.scale = latents.scale * 3
    vae, out = load_vae(finished.artifact("extract-vae")), Artifact(finished.store, "train-ldm", "other-latents")
    run = LDMRun(finished.configure("train_ldm.max_steps=5"), latents, None, vae, out, open_group())
    before = finished.artifact("train-ldm")
    run.run(report=lambda progress: None, guard=lambda: None, record={}, init_from=before)
    assert run.loop.start_step == 4
    for sit in (run.state.sit.module, run.state.ema):
        torch.testing.assert_close(sit.latent_stats()[0], latents.scale, check_dtype=False)


def test_the_cache_serves_every_coefficient(finished):
    """Only latent training and what follows depends on it."""
    again = finished.run("train_ldm.spatial_norm=0.6")
    states = {stage: record.status for stage, record in again.stages.items()}
    assert states["cache-latents"] == "skipped"
    assert states["train-ldm"] == "made"
