"""The joint step against its formulas written out in float64, where the published run's data do not go.

Three encoders, the cosine path, lognormal times, dropped labels, L2, a perceptual network, LeCam, clipping that bites.
"""

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repae_core.diffusion import Interpolant
from repae_core.losses import LeCamEMA
from repae_core.models import KLVAE, PatchGAN, SiT, build_discriminator, build_vae
from repae_core.training.assembly import moving_average
from repae_core.training.distributed import open_group
from repae_core.training.draws import Draws
from repae_core.training.optim import Network
from repae_core.training.repae_step import repae_step
from repae_core.training.state import Batch, JointObjective, JointState

WIDTHS, CLASSES, RATE, CLIP, DECAY = (10, 20, 7), 6, 3e-4, 0.5, 0.9
WEIGHTS = {
    "perceptual_weight": 0.7,
    "kl_weight": 0.01,
    "discriminator_weight": 0.3,
    "vae_align_proj_coeff": 1.2,
    "proj_coeff": 0.8,
}


class Perceptual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.conv(a) - self.conv(b)).square().mean((1, 2, 3)) + 0.1 * (1.7 * a - b).abs().mean((1, 2, 3))


def coefficients(path: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = t.view(-1, 1, 1, 1)
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    a, s = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    return a, s, -math.pi / 2 * s, math.pi / 2 * a


def alignment(features: list[Tensor], projections: list[Tensor]) -> Tensor:
    total = torch.zeros(())
    for f, h in zip(features, projections, strict=True):
        total = total - (f * h).sum(-1).div(f.norm(dim=-1) * h.norm(dim=-1)).mean() / len(WIDTHS)
    return total


@dataclass
class WrittenOut:
    """The three networks with plain AdamW; `step` does what section 3 of the paper says, in its order."""

    sit: SiT
    vae: KLVAE
    discriminator: PatchGAN
    perceptual: nn.Module
    path: str
    l2: bool
    lecam_weight: float
    averages: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def __post_init__(self) -> None:
        trained = ([p for p in m.parameters() if p.requires_grad] for m in (self.vae, self.discriminator, self.sit))
        self.optimizers = [torch.optim.AdamW(p, lr=RATE, weight_decay=0.0, foreach=False) for p in trained]
        self.ema = copy.deepcopy(self.sit.state_dict())

    def step(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        assert batch.images is not None
        x = batch.images.double() / 127.5 - 1
        mean, logvar = self.vae.quant_conv(self.vae.encoder(x)).chunk(2, dim=1)
        z = mean + torch.exp(0.5 * logvar) * draws.posterior_noise
        recon = self.vae.decode(z)
        losses = self.of_vae(x, mean, logvar, z, recon, batch, draws), self.of_discriminator(x, recon.detach())
        losses += (self.of_sit(z.detach(), batch, draws),)
        for optimizer, loss in zip(self.optimizers, losses, strict=True):
            self.update(optimizer, loss)
        for name, value in self.sit.state_dict().items():
            if value.is_floating_point():
                self.ema[name] = self.ema[name] + (1 - DECAY) * (value - self.ema[name])
        return losses

    def of_vae(self, x, mean, logvar, z, recon, batch: Batch, draws: Draws) -> Tensor:
        bias, var = (b.clone().view(1, -1, 1, 1) for b in (self.sit.bn.running_mean, self.sit.bn.running_var))
        a, s, _, _ = coefficients(self.path, draws.t)
        noisy = a * (z - bias) / torch.sqrt(var + 1e-4) + s * draws.noise
        align = alignment(list(batch.features), self.sit.project(noisy, draws.t, batch.labels))
        pixels = (recon - x).square().mean() if self.l2 else (recon - x).abs().mean()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        gan = -self.discriminator.train()(recon).mean()
        return pixels + 0.7 * self.perceptual(recon, x).mean() + 0.01 * kl + 0.3 * gan + 1.2 * align

    def of_discriminator(self, x: Tensor, recon: Tensor) -> Tensor:
        real, fake = self.discriminator(x), self.discriminator(recon)
        ema_real, ema_fake = self.averages
        self.averages = [0.9 * ema_real + 0.1 * real.mean().item(), 0.9 * ema_fake + 0.1 * fake.mean().item()]
        lecam = F.relu(real.mean() - ema_fake) ** 2 + F.relu(ema_real - fake.mean()) ** 2
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) + self.lecam_weight * lecam

    def of_sit(self, z: Tensor, batch: Batch, draws: Draws) -> Tensor:
        bias = z.mean((0, 2, 3), keepdim=True)
        var = (z - bias).square().mean((0, 2, 3), keepdim=True)
        n = z.numel() / z.shape[1]
        self.sit.bn.running_mean.mul_(0.9).add_(0.1 * bias.flatten())
        self.sit.bn.running_var.mul_(0.9).add_(0.1 * var.flatten() * n / (n - 1))
        zbar = (z - bias) / torch.sqrt(var + 1e-4)
        a, s, da, ds = coefficients(self.path, draws.t)
        labels = torch.where(draws.label_drop, CLASSES, batch.labels)
        velocity, projections = self.sit(a * zbar + s * draws.noise, draws.t, labels, with_projections=True)
        target = da * zbar + ds * draws.noise
        return (velocity - target).square().mean() + 0.8 * alignment(list(batch.features), projections)

    @staticmethod
    def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        parameters = optimizer.param_groups[0]["params"]
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * min(1.0, CLIP / (norm + 1e-6))
        optimizer.step()


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def networks() -> tuple[SiT, KLVAE, PatchGAN]:
    sit = SiT(input_size=8, patch_size=2, in_channels=5, hidden_size=48, depth=3, num_heads=4, num_classes=CLASSES,
              encoder_depth=2, z_dims=WIDTHS, projector_dim=16)  # fmt: skip
    for parameter in sit.parameters():
        if parameter.requires_grad:  # so that no modulation is zero
            parameter.data += 0.1 * torch.randn_like(parameter)
    vae = build_vae({"base_channels": 8, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "norm_groups": 4,
                     "latent_channels": 5})  # fmt: skip
    return sit, vae, build_discriminator(8)


def inputs(path: str, size: int = 4) -> tuple[Batch, Draws]:
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(torch.randint(0, CLASSES, (size,)), [torch.randn(size, 16, w) for w in WIDTHS], images=images)
    t = Interpolant(path).sample_time(size, "lognormal")
    return batch, Draws(torch.randn(size, 5, 8, 8), t, torch.randn(size, 5, 8, 8), torch.rand(size) < 0.5)


def same(module: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(
                value, expected[name], rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize(("path", "l2", "lecam_weight"), [("cosine", True, 0.3), ("linear", False, 0.0)])
def test_three_steps(float64, path: str, l2: bool, lecam_weight: float) -> None:
    torch.manual_seed(21)
    sit, vae, discriminator = networks()
    perceptual = Perceptual()
    expected = WrittenOut(*copy.deepcopy((sit, vae, discriminator)), perceptual, path, l2, lecam_weight)
    trained = [Network(module, module, learning_rate=RATE) for module in (sit, vae, discriminator)]
    state = JointState(group=open_group(), sit=trained[0], ema=moving_average(sit), vae=trained[1],
                       discriminator=trained[2], lecam=LeCamEMA(0.9) if lecam_weight else None)  # fmt: skip
    objective = JointObjective(Interpolant(path), perceptual=perceptual, lecam_weight=lecam_weight, ema_decay=DECAY,
                               reconstruction_loss="l2" if l2 else "l1", max_grad_norm=CLIP, **WEIGHTS)  # fmt: skip
    for _ in range(3):
        batch, draws = inputs(path)
        metrics = repae_step(state, batch, objective, draws)
        of_vae, _, of_sit = expected.step(batch, draws)
        torch.testing.assert_close(metrics["vae_loss"], of_vae.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(metrics["sit_loss"], of_sit.detach(), rtol=1e-9, atol=0)
        same(sit, expected.sit.state_dict())
        same(vae, expected.vae.state_dict())
        same(discriminator, expected.discriminator.state_dict())
        same(state.ema, expected.ema)
