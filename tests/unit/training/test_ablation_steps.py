"""What each ablation trains and leaves alone, and where its gradients come from."""

import numpy as np
import pytest
import tiny
import torch

from repae_core.artifacts import Artifact, Store
from repae_core.training import ablation_steps
from repae_core.training.distributed import open_group
from repae_core.training.joint_run import JointRun
from repae_core.training.ldm_step import ldm_step
from repae_core.training.precision import autocast
from repae_core.training.repae_step import sit_loss, vae_loss


def start(images, tmp_path, *more: str) -> JointRun:
    config = tiny.config("digits", tmp_path, "train_repae.vae_warmup_steps=0", "train_repae.max_steps=2", *more)
    return JointRun(config, images, Artifact(Store(str(tmp_path)), "train-repae", "test"), open_group())


def weights(run: JointRun) -> dict[str, dict[str, torch.Tensor]]:
    state = run.state
    modules = {name: network.module for name, network in state.networks().items()} | {"ema": state.ema}
    return {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in modules.items()}


def changed(before, after) -> set[str]:
    return {n for n, state in before.items() if any(not torch.equal(v, after[n][k]) for k, v in state.items())}


def take_step(run: JointRun):
    before = weights(run)
    metrics = run.step(0, next(run.batches(0)))
    return changed(before, weights(run)), metrics


@pytest.mark.parametrize(
    ("training", "trained"),
    [("repa-e", {"sit", "vae", "discriminator", "ema"}), ("naive", {"sit", "vae", "discriminator", "ema"}),
     ("frozen", {"sit", "ema"})],
)  # fmt: skip
def test_what_is_trained(images, tmp_path, training, trained):
    run = start(images, tmp_path, f"train_repae.vae_training={training}")
    found, metrics = take_step(run)
    assert found == trained
    assert ("vae_loss" in metrics) == (training != "frozen")


def test_frozen_keeps_the_latent_statistics(images, tmp_path):
    run = start(images, tmp_path, "train_repae.vae_training=frozen")
    take_step(run)
    first = run.state.sit.module.latent_stats()
    run.step(1, next(run.batches(1)))
    assert all(torch.equal(a, b) for a, b in zip(first, run.state.sit.module.latent_stats(), strict=True))


def test_frozen_encodes_in_the_vaes_precision(images, tmp_path, monkeypatch):
    """As the other arms do; the posterior, and so z, is fp32 in any case."""
    seen = []

    def spy(state, batch, *args, **more):
        seen.append(batch.latents)
        return ldm_step(state, batch, *args, **more)

    monkeypatch.setattr(ablation_steps, "ldm_step", spy)
    for precision in ("no", "bf16"):
        run = start(images, tmp_path, "train_repae.vae_training=frozen", f"train_repae.vae_mixed_precision={precision}")
        run.start_latent_norm()
        batch, draws = next(run.batches(0))
        run.step(0, (batch, draws))
        with torch.no_grad(), autocast(torch.device("cpu"), precision):
            posterior = run.state.vae.module.encode(batch.images.float() / 127.5 - 1)
        torch.testing.assert_close(seen[-1], posterior.sample(noise=draws.posterior_noise))
    assert seen[0].dtype == seen[1].dtype == torch.float32
    assert not torch.equal(*seen)


def vae_gradients(images, tmp_path, losses: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Gradient of the VAE from these losses alone, each with its own untouched copy of the networks."""
    total: dict[str, torch.Tensor] = {}
    for which in losses:
        run = start(images, tmp_path)
        run.start_latent_norm()
        torch.manual_seed(3)  # the output layer is zero at first: no diffusion loss would come through
        torch.nn.init.normal_(run.state.sit.module.final_layer.linear.weight, std=0.1)
        batch, draws = next(run.batches(0))
        x = batch.images.float() / 127.5 - 1
        posterior, z, recon = run.state.vae.forward(x, draws.posterior_noise)
        if which == "vae":
            loss, _ = vae_loss(run.state, x, posterior, z, recon, batch, draws, run.joint_objective)
        else:
            loss, _ = sit_loss(run.state, run.state.sit.module.train().bn(z), batch, draws, run.joint_objective)
        loss.backward()
        for name, parameter in run.state.vae.module.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + parameter.grad
    return total


def test_naive_sums_both_gradients(images, tmp_path):
    run = start(images, tmp_path, "train_repae.vae_training=naive", "train_repae.max_grad_norm=1e9")
    expected = vae_gradients(images, tmp_path, ("vae", "sit"))
    alone = vae_gradients(images, tmp_path, ("vae",))
    torch.manual_seed(3)
    torch.nn.init.normal_(run.state.sit.module.final_layer.linear.weight, std=0.1)
    caught: dict[str, torch.Tensor] = {}
    step = run.state.vae.step

    def spy(*args):
        caught.update({n: p.grad.clone() for n, p in run.state.vae.module.named_parameters()})
        return step(*args)

    run.state.vae.step = spy
    run.step(0, next(run.batches(0)))
    name = "encoder.conv_out.weight"
    assert not torch.allclose(expected[name], alone[name], rtol=1e-2)
    for name, gradient in expected.items():
        torch.testing.assert_close(caught[name], gradient, rtol=1e-4, atol=1e-6)


def test_without_alignment(images, tmp_path):
    """No encoder at all: no projector, no alignment term, and the joint step still runs."""
    run = start(images, tmp_path, "train_repae.encoder=[]")
    found, metrics = take_step(run)
    assert found == {"sit", "vae", "discriminator", "ema"}
    assert metrics["align_loss"] == metrics["vae_align_loss"] == 0
    assert len(run.state.sit.module.projectors) == 0


def test_several_encoders_and_irepa(images, tmp_path):
    more = [
        'train_repae.encoder=["digits-vit","digits-vit"]',
        "train_repae.projector=conv",
        "train_repae.spatial_norm=0.6",
    ]
    run = start(images, tmp_path, *more)
    sit = run.state.sit.module
    assert [tuple(p.weight.shape) for p in sit.projectors] == [(run.encoders.modules[0].dim, 128, 3, 3)] * 2
    batch, _ = next(run.batches(0))
    assert len(batch.features) == 2
    assert batch.features[0].std(dim=1).mean() == pytest.approx(1, abs=0.05)
    assert np.isfinite(float(take_step(run)[1]["align_loss"]))


def test_any_encoder_depth(images, tmp_path):
    run = start(images, tmp_path, "train_repae.encoder_depth=4")
    assert np.isfinite(float(take_step(run)[1]["sit_loss"]))
    with pytest.raises(ValueError, match="encoder_depth=5 is beyond the 4 blocks"):
        start(images, tmp_path, "train_repae.encoder_depth=5")


def test_naive_with_fp16_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="vae_training=naive sums two losses"):
        start(images, tmp_path, "train_repae.vae_training=naive", "train_repae.mixed_precision=fp16",
              "train_repae.gpus_per_worker=1")  # fmt: skip
