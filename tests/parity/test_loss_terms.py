"""The losses as the steps put them together: each term, its weight, and whom its gradient reaches.

The trajectories leave out LPIPS and LeCam, and their KL is too small to be missed in a sum: here each term is seen by
the gradient of an input that only it reaches.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.fill import fill, scalars, tensors
from torch import Tensor, nn

from repae_core.config import load_config
from repae_core.config.pipeline import CompatConfig
from repae_core.diffusion import Interpolant
from repae_core.losses import LeCamEMA, build_perceptual
from repae_core.models import DiagonalGaussian, SiT, build_discriminator, build_vae
from repae_core.training.assembly import joint_objective, moving_average
from repae_core.training.distributed import open_group
from repae_core.training.draws import Draws
from repae_core.training.optim import Network
from repae_core.training.repae_step import autoencoder_loss, discriminator_loss, sit_phase, vae_loss
from repae_core.training.state import Batch, FlowObjective, JointObjective, JointState

LPIPS_T, LPIPS_J = tensors("lpips"), scalars("lpips")
LOSS_T, LOSS_J = tensors("losses"), scalars("losses")
RUN_T, RUN_J = tensors("train_trajectory"), scalars("train_trajectory")
X, RECON = LPIPS_T["in.images"], LPIPS_T["in.reconstructions"]
PUBLISHED = {
    "kl_weight": 1e-6,
    "perceptual_weight": 1.0,
    "discriminator_weight": 0.1,
    "vae_align_proj_coeff": 1.5,
    "proj_coeff": 0.5,
    "lecam_weight": 0.0,
    "discriminator_start": 0,
    "max_grad_norm": 1.0,
    "ema_decay": 0.9999,
    "reconstruction_loss": "l1",
}
OTHER = {"kl_weight": 0.02, "perceptual_weight": 3.0, "discriminator_weight": 0.7, "vae_align_proj_coeff": 0.4}


def network(module: nn.Module) -> Network[Any]:
    return Network(module, module, learning_rate=1e-4)


def state() -> JointState:
    spec = {name: value for name, value in RUN_J["settings"]["sit"].items() if name != "decoder_hidden_size"}
    sit = fill(SiT(**spec | {"class_dropout_prob": 0.1}))
    vae = build_vae({"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_groups": 4})
    return JointState(
        group=open_group(),
        sit=network(sit),
        ema=moving_average(sit),
        vae=network(vae),
        discriminator=network(fill(build_discriminator())),
    )


def batch() -> Batch:
    return Batch(RUN_T["in.labels"][0], [RUN_T["in.zs.0"][0], RUN_T["in.zs.1"][0]])


def draws(drop: bool = False) -> Draws:
    t = RUN_T["in.time_input"][0].flatten()
    return Draws(RUN_T["in.posterior_noise"][0], t, RUN_T["in.noises"][0], torch.full((2,), drop))


def gradients(backbone: Path, objective: JointObjective, *, double_scale: bool) -> dict[str, Tensor]:
    """L_vae and its gradient on reconstructions, moments and z, with a real LPIPS."""
    perceptual = build_perceptual("lpips-vgg", str(backbone), double_scale=double_scale)
    objective = dataclasses.replace(objective, perceptual=perceptual)
    recon, moments = RECON.clone().requires_grad_(), LOSS_T["in.moments"].clone().requires_grad_()
    z = RUN_T["step0.z"].clone().requires_grad_()
    # Labels are dropped in SiT's phase only: these marks must change nothing here.
    loss, metrics = vae_loss(state(), X, DiagonalGaussian(moments), z, recon, batch(), draws(drop=True), objective)
    loss.backward()
    assert recon.grad is not None
    assert moments.grad is not None
    assert z.grad is not None
    return metrics | {"recon.grad": recon.grad, "moments.grad": moments.grad, "z.grad": z.grad}


def adversarial() -> tuple[Tensor, Tensor]:
    """-mean(logits) of the reconstructions and its gradient."""
    recon = RECON.clone().requires_grad_()
    loss = -fill(build_discriminator()).train()(recon).mean()
    return loss.detach(), torch.autograd.grad(loss, recon)[0]


def alignment() -> tuple[Tensor, Tensor]:
    """Minus the mean cosine of features and projections at step 0's draws, written out, and its gradient."""
    sit, z = state().sit.module.eval(), RUN_T["step0.z"].clone().requires_grad_()
    t, noise = draws().t.view(-1, 1, 1, 1), draws().noise
    projections = sit.project((1 - t) * sit.bn(z) + t * noise, t.flatten(), RUN_T["in.labels"][0])
    cosines = [
        nn.functional.cosine_similarity(f, h, dim=-1) for f, h in zip(batch().features, projections, strict=True)
    ]
    loss = -torch.stack([c.mean() for c in cosines]).mean()
    return loss.detach(), torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("weights", [{}, OTHER], ids=["published weights", "other weights"])
@pytest.mark.parametrize("double_scale", [True, False])
def test_every_term_of_the_vae_loss(backbone: Path, weights: dict[str, float], double_scale: bool) -> None:
    objective = JointObjective(Interpolant("linear"), **weights)
    found = gradients(backbone, objective, double_scale=double_scale)
    used = PUBLISHED | weights
    kl = torch.tensor(LOSS_J["kl_per_sample"]).mean()
    name = "package_lpips_on_2x_minus_1_of_minus1_1_images" if double_scale else "package_lpips_on_minus1_1_images"
    lpips = torch.tensor(LPIPS_J[name]).mean()
    (gan, gan_grad), (align, align_grad) = adversarial(), alignment()
    total = (RECON - X).abs().mean() + used["perceptual_weight"] * lpips + used["kl_weight"] * kl
    total = total + used["discriminator_weight"] * gan + used["vae_align_proj_coeff"] * align
    torch.testing.assert_close(found["vae_loss"], total, rtol=2e-6, atol=1e-6)
    moments_grad = used["kl_weight"] * LOSS_T["generator.l1.grad_moments_divided_by_kl_weight"]
    torch.testing.assert_close(found["moments.grad"], moments_grad, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(found["z.grad"], used["vae_align_proj_coeff"] * align_grad, rtol=1e-4, atol=1e-8)
    if double_scale:  # the one whose gradient is in the data
        expected = torch.sign(RECON - X) / X.numel() + used["discriminator_weight"] * gan_grad
        expected += used["perceptual_weight"] * LPIPS_T["grad_of_mean_wrt_reconstructions"]
        torch.testing.assert_close(found["recon.grad"], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("weights", [{}, OTHER], ids=["published weights", "other weights"])
def test_warm_up_has_the_same_terms_without_gan_and_alignment(backbone: Path, weights: dict[str, float]) -> None:
    objective = JointObjective(
        Interpolant("linear"), perceptual=build_perceptual("lpips-vgg", str(backbone)), **weights
    )
    loss, _ = autoencoder_loss(X, RECON, DiagonalGaussian(LOSS_T["in.moments"]), objective)
    used = PUBLISHED | weights
    total = (RECON - X).abs().mean() + used["kl_weight"] * torch.tensor(LOSS_J["kl_per_sample"]).mean()
    total = total + used["perceptual_weight"] * torch.tensor(LPIPS_J["package_lpips_on_minus1_1_images"]).mean()
    torch.testing.assert_close(loss, total, rtol=2e-6, atol=1e-6)


def test_l2_reconstruction(backbone: Path) -> None:
    objective = JointObjective(Interpolant("linear"), reconstruction_loss="l2")
    found = gradients(backbone, objective, double_scale=False)
    torch.testing.assert_close(found["recon_loss"], (RECON - X).square().mean())


def test_discriminator_before_its_start(backbone: Path) -> None:
    """Neither network feels the adversarial loss."""
    objective = JointObjective(Interpolant("linear"), discriminator_start=10)
    found = gradients(backbone, objective, double_scale=True)
    expected = torch.sign(RECON - X) / X.numel() + LPIPS_T["grad_of_mean_wrt_reconstructions"]
    torch.testing.assert_close(found["recon.grad"], expected, rtol=1e-4, atol=1e-8)
    waiting = state()
    loss, _ = discriminator_loss(waiting, X, RECON, objective)
    waiting.discriminator.backward(loss)
    assert all(p.grad is None or not p.grad.any() for p in waiting.discriminator.parameters())


def test_lecam_in_the_discriminator_phase() -> None:
    """Two calls as in the data; the gradient is of hinge + weight * regulariser at the averages before the call."""
    settings, joint = LOSS_J["lecam_two_calls"], state()
    joint.lecam = LeCamEMA(settings["decay"])
    objective = JointObjective(Interpolant("linear"), lecam_weight=settings["weight"])
    twin, averages = fill(build_discriminator()).train(), (0.0, 0.0)
    for call in settings["calls"]:
        loss, found = discriminator_loss(joint, LOSS_T["in.images"], LOSS_T["in.reconstructions"], objective)
        joint.discriminator.backward(loss)
        lecam = settings["weight"] * found["lecam_loss"]
        assert lecam.item() == pytest.approx(call["lecam_loss"], rel=1e-5)
        assert (found["disc_loss"] + lecam).item() == pytest.approx(call["discriminator_loss"], rel=1e-5)
        real, fake = twin(LOSS_T["in.images"]), twin(LOSS_T["in.reconstructions"])
        hinge = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
        regulariser = torch.relu(real.mean() - averages[1]) ** 2 + torch.relu(averages[0] - fake.mean()) ** 2
        expected = torch.autograd.grad(hinge + settings["weight"] * regulariser, list(twin.parameters()))
        for parameter, gradient in zip(joint.discriminator.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
        joint.discriminator.optimizer.zero_grad()
        averages = call["ema_real_after"], call["ema_fake_after"]


@pytest.mark.parametrize("coefficient", [0.5, 2.0, 0.0])
@pytest.mark.parametrize("train_norm", [True, False])
def test_sit_loss(coefficient: float, train_norm: bool) -> None:
    """Flow matching and weighted alignment on the same noisy latents; dropped labels are the null class."""
    objective = FlowObjective(Interpolant("linear"), proj_coeff=coefficient)
    z, twin = RUN_T["step0.z"], state().sit.module
    loss = sit_phase(state(), [(batch(), draws(drop=True))], z, objective, train_norm=train_norm)["sit_loss"]
    twin.bn.train(train_norm)
    zbar, t, noise = twin.bn(z), draws().t.view(-1, 1, 1, 1), draws().noise
    null = torch.full((2,), twin.num_classes)
    velocity, projections = twin((1 - t) * zbar + t * noise, t.flatten(), null, with_projections=True)
    cosines = [
        nn.functional.cosine_similarity(f, h, dim=-1) for f, h in zip(batch().features, projections, strict=True)
    ]
    expected = (velocity - (noise - zbar)).square().mean() - coefficient * torch.stack(
        [c.mean() for c in cosines]
    ).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_published_weights_are_the_defaults() -> None:
    """Of the objective, of the config it is made from, and of the optimizers."""
    objective = JointObjective(Interpolant("linear"))
    config = load_config("imagenet256-sdvae", ["train_repae.perceptual_loss=none"]).train_repae
    configured = joint_objective(config, CompatConfig(), torch.device("cpu"))
    for name, value in PUBLISHED.items():
        assert getattr(objective, name) == value, name
        assert getattr(configured, name) == value, name
    (group,) = network(nn.Linear(1, 1)).optimizer.param_groups
    published = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    assert {name: group[name] for name in published} == published
    rates = config.learning_rate, config.vae_learning_rate, config.disc_learning_rate
    assert rates == (1e-4, 1e-4, 1e-4)
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.weight_decay) == (0.9, 0.999, 1e-8, 0)
    assert (config.batch_size, config.encoder_depth, config.class_dropout_prob) == (256, 8, 0.1)


@pytest.mark.parametrize("published", [True, False])
def test_the_lpips_switch_reaches_the_network(backbone: Path, published: bool) -> None:
    """compat `lpips_double_scale`, on both sides, from the config to the loss."""
    config = load_config("imagenet256-sdvae", [f"train_repae.perceptual_weights={backbone}"]).train_repae
    objective = joint_objective(config, CompatConfig(lpips_double_scale=published), torch.device("cpu"))
    assert objective.perceptual is not None
    name = "package_lpips_on_2x_minus_1_of_minus1_1_images" if published else "package_lpips_on_minus1_1_images"
    with torch.no_grad():
        torch.testing.assert_close(objective.perceptual(RECON, X), torch.tensor(LPIPS_J[name]), rtol=1e-5, atol=0)


def test_configured_weights_reach_the_objective() -> None:
    sets = [f"train_repae.{name}={value}" for name, value in OTHER.items()]
    sets += ["train_repae.lecam_weight=0.3", "train_repae.proj_coeff=0.25", "train_repae.max_grad_norm=2.5"]
    config = load_config("quickstart", sets).train_repae
    configured = joint_objective(config, CompatConfig(), torch.device("cpu"))
    for name, value in (OTHER | {"lecam_weight": 0.3, "proj_coeff": 0.25, "max_grad_norm": 2.5}).items():
        assert getattr(configured, name) == value, name
