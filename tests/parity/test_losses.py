"""VAE, GAN and alignment losses against the published implementation (tests/data/parity/losses.*)."""

import json
import math
from pathlib import Path

import pytest
import torch
from parity.fill import fill
from safetensors.torch import load_file

from repae_core.losses import (
    LeCamEMA,
    alignment_loss,
    generator_loss,
    hinge_discriminator_loss,
    kl_loss,
    lecam_loss,
    reconstruction_loss,
)
from repae_core.models import DiagonalGaussian, PatchGAN, build_discriminator

DATA = Path(__file__).parents[1] / "data" / "parity"
T = load_file(DATA / "losses.safetensors")
J = json.loads((DATA / "losses.json").read_text())
IMAGES = T["in.images"]
VARIANTS = ("l1", "l2", "logvar_half", "disc_starts_at_10")


def close(value: torch.Tensor, expected: float, rel: float = 1e-5) -> None:
    torch.testing.assert_close(value.detach().double(), torch.tensor(expected).double(), rtol=rel, atol=1e-7)


def same(value: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(value, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def filled_discriminator() -> PatchGAN:
    network = build_discriminator().train()
    fill(network)
    return network


def generator_step(variant: str) -> tuple[PatchGAN, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The generator's terms and its gradients with respect to reconstructions and moments."""
    discriminator = filled_discriminator()
    recon, moments = (T[f"in.{name}"].clone().requires_grad_() for name in ("reconstructions", "moments"))
    reconstruction = reconstruction_loss(recon, IMAGES, "l2" if variant == "l2" else "l1")
    if variant == "logvar_half":
        reconstruction = reconstruction / math.exp(0.5)
    started = variant != "disc_starts_at_10"
    terms = {
        "reconstruction_loss": reconstruction,
        "kl_loss": 1e-6 * kl_loss(DiagonalGaussian(moments)),
        # the published module does not even run the discriminator before it starts
        "weighted_gan_loss": 0.1 * generator_loss(discriminator(recon)) if started else torch.zeros(()),
    }
    terms["total_loss"] = sum(terms.values(), torch.zeros(()))
    grad_recon, grad_moments = torch.autograd.grad(terms["total_loss"], (recon, moments))
    return discriminator, terms, grad_recon, grad_moments


def same_buffers(discriminator: PatchGAN, prefix: str) -> None:
    buffers = dict(discriminator.named_buffers())
    expected = {k.removeprefix(prefix): v for k, v in T.items() if k.startswith(prefix)}
    assert expected
    for name, value in expected.items():
        same(buffers[name], value)


def test_hinge_and_lecam() -> None:
    real, fake = T["in.logits_real"], T["in.logits_fake"]
    close(hinge_discriminator_loss(real, fake), J["hinge_d_loss"])
    close(lecam_loss(real, fake, J["lecam"]["ema_real"], J["lecam"]["ema_fake"]), J["lecam"]["value"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_generator(variant: str) -> None:
    discriminator, terms, grad_recon, grad_moments = generator_step(variant)
    for name, value in terms.items():
        close(value, J[f"generator.{variant}"][name])
    same(grad_recon, T[f"generator.{variant}.grad_reconstructions"])
    same(grad_moments / 1e-6, T[f"generator.{variant}.grad_moments_divided_by_kl_weight"])
    if variant in ("l1", "disc_starts_at_10"):  # those whose buffers are in the data
        same_buffers(discriminator, f"generator.{variant}.disc_after.")


def test_kl_per_sample() -> None:
    for value, expected in zip(DiagonalGaussian(T["in.moments"]).kl(), J["kl_per_sample"], strict=True):
        close(value, expected)


def test_discriminator_after_generator() -> None:
    """Three forwards in train mode, hence three updates of the batch-norm statistics."""
    discriminator, *_ = generator_step("l1")
    discriminator.zero_grad()
    expected = J["discriminator_after_generator.l1"]
    real, fake = discriminator(IMAGES), discriminator(T["in.reconstructions"])
    loss = hinge_discriminator_loss(real, fake)
    loss.backward()
    close(loss, expected["discriminator_loss"])
    close(real.mean(), expected["logits_real"])
    close(fake.mean(), expected["logits_fake"])
    for name, parameter in discriminator.named_parameters():
        close(parameter.grad.norm(), expected["grad_l2_norm"][name], rel=1e-4)
    same_buffers(discriminator, "discriminator_after_generator.l1.disc_after.")
    updates = [b for name, b in discriminator.named_buffers() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in updates} == {expected["num_batches_tracked"]}


def test_lecam_over_two_calls() -> None:
    """The regulariser reads the averages as they were before the call."""
    settings = J["lecam_two_calls"]
    discriminator, ema = filled_discriminator(), LeCamEMA(settings["decay"])
    for call in settings["calls"]:
        real, fake = discriminator(IMAGES), discriminator(T["in.reconstructions"])
        lecam = settings["weight"] * lecam_loss(real, fake, *ema.values)
        ema.update(real, fake)
        close(lecam, call["lecam_loss"])
        close(hinge_discriminator_loss(real, fake) + lecam, call["discriminator_loss"])
        for side in ("real", "fake"):
            close(torch.as_tensor(ema.state_dict()[side]), call[f"ema_{side}_after"])


def test_alignment() -> None:
    expected = J["generator_alignment"]
    features = [T["in.zs.0"], T["in.zs.1"]]
    projections = [T[f"in.zs_tilde.{i}"].clone().requires_grad_() for i in range(2)]
    loss = alignment_loss(features, projections)
    close(loss, expected["proj_loss"])
    total = generator_step("l1")[1]["total_loss"] + expected["proj_coef"] * loss
    close(total, expected["total_loss"])
    for i, gradient in enumerate(torch.autograd.grad(expected["proj_coef"] * loss, projections)):
        same(gradient, T[f"generator_alignment.grad_zs_tilde.{i}"])
