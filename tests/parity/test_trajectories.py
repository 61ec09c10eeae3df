"""Five joint steps and five latent-only steps, replayed with the published run's draws."""

from typing import Any

import pytest
import torch
from parity.fill import fill, scalars, tensors
from torch import Tensor

from repae_core.diffusion import Interpolant
from repae_core.models import SiT, build_discriminator, build_vae
from repae_core.training.assembly import moving_average
from repae_core.training.distributed import open_group
from repae_core.training.draws import Draws
from repae_core.training.ldm_step import ldm_step
from repae_core.training.optim import Network
from repae_core.training.repae_step import repae_step
from repae_core.training.state import Batch, FlowObjective, JointObjective, JointState, LDMState

NAMES = {
    "recon_loss": "reconstruction_loss",
    "gan_loss": "gan_loss",
    "vae_align_loss": "vae_align_proj_loss",
    "vae_loss": "vae_total",
    "grad_norm_vae": "grad_norm_vae",
    "disc_loss": "d_loss",
    "logits_real": "logits_real",
    "logits_fake": "logits_fake",
    "grad_norm_discriminator": "grad_norm_disc",
    "flow_loss": "denoising_loss",
    "align_loss": "proj_loss",
    "sit_loss": "sit_total",
    "grad_norm_sit": "grad_norm_sit",
}


def network(module: Any) -> Network[Any]:
    return Network(module, module, learning_rate=1e-4)


def filled_sit(spec: dict[str, Any], t: dict[str, Tensor]) -> SiT:
    spec = {name: value for name, value in spec.items() if name != "decoder_hidden_size"}
    sit = SiT(**spec)
    fill(sit)
    sit.set_latent_stats(scale=t["in.init_latents_scale"], bias=t["in.init_latents_bias"])
    return sit


def same(value: Any, expected: Any, step: int) -> None:
    rel, absolute = (1e-4, 1e-5) if step < 2 else (2e-3, 1e-3)
    torch.testing.assert_close(
        torch.as_tensor(value, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=rel,
        atol=absolute,
    )


@pytest.mark.parametrize("trainable_pos_embed", [False, True])
def test_joint_steps(trainable_pos_embed: bool) -> None:
    t, j = tensors("train_trajectory"), scalars("train_trajectory")
    sit = filled_sit(j["settings"]["sit"], t)
    sit.pos_embed.requires_grad_(trainable_pos_embed)
    vae, discriminator = build_vae("f8d4"), build_discriminator()
    fill(vae)
    fill(discriminator)
    state = JointState(
        group=open_group(),
        sit=network(sit),
        ema=moving_average(sit),
        vae=network(vae),
        discriminator=network(discriminator),
    )
    objective = JointObjective(Interpolant("linear"), perceptual_weight=0.0)
    expected = j["steps" if trainable_pos_embed else "steps_if_pos_embed_is_kept_frozen"]
    # With the table fixed, a LeakyReLU of the discriminator sits so close to its kink at step 3 that rounding
    # decides its slope (deviation 1e-7 before, 3e-3 at step 4): the last step is compared with the table trained.
    compared = 5 if trainable_pos_embed else 4
    for i in range(5):
        features = [t["in.zs.0"][i], t["in.zs.1"][i]]
        batch = Batch(t["in.labels"][i], features, images=t["in.raw_images"][i])
        draws = Draws(
            t["in.posterior_noise"][i],
            t["in.time_input"][i].flatten(),
            t["in.noises"][i],
            torch.zeros(2, dtype=torch.bool),
        )
        metrics = repae_step(state, batch, draws, objective)
        if i >= compared:
            continue
        for ours, theirs in NAMES.items():
            same(metrics[ours], expected[i][theirs], i)
        same(metrics["kl_loss"] * 1e-6, expected[i]["weighted_kl_loss"], i)
        same(sit.bn.running_mean, expected[i]["bn_running_mean"], i)
        same(sit.bn.running_var, expected[i]["bn_running_var"], i)
    check_final_models(state, t, trainable_pos_embed)


def check_final_models(state: JointState, t: dict[str, Tensor], trainable_pos_embed: bool) -> None:
    prefix = "final.probe" if trainable_pos_embed else "if_pos_embed_frozen.final.probe"  # of SiT only
    probe = t["in.probe.latent"], t["in.probe.t"], t["in.probe.y"]
    with torch.no_grad():
        same(state.sit.module.eval()(*probe), t[f"{prefix}.sit_inference"], 4)
        same(state.ema(*probe), t[f"{prefix}.ema_inference"], 4)
        if not trainable_pos_embed:
            return
        posterior = state.vae.module.encode(t["in.probe.image"])
        same(torch.cat([posterior.mean, posterior.logvar], dim=1), t["final.probe.vae_moments"], 4)
        same(state.vae.module.decode(posterior.mean), t["final.probe.vae_recon"], 4)
        same(state.discriminator.module.eval()(t["in.probe.image"]), t["final.probe.disc_logits_eval"], 4)
    for name, value in state.discriminator.module.named_buffers():
        if "running" in name:
            same(value, t[f"final.disc.{name}"], 4)
    for name in ("running_mean", "running_var"):
        same(getattr(state.ema.bn, name), t[f"final.ema.bn.{name}"], 4)


def test_latent_only_steps() -> None:
    t, j = tensors("ldm_only_trajectory"), scalars("ldm_only_trajectory")
    sit = filled_sit(j["settings"]["sit"], t)
    before = sit.bn.running_mean.clone()
    state = LDMState(group=open_group(), sit=network(sit), ema=moving_average(sit))
    for i in range(5):
        mean, std = t["in.latents_mean_std"][i].chunk(2, dim=1)
        z = mean + std * t["in.posterior_noise"][i]
        batch = Batch(t["in.labels"][i], [t["in.zs.0"][i], t["in.zs.1"][i]], latents=z)
        draws = Draws(
            t["in.posterior_noise"][i],
            t["in.time_input"][i].flatten(),
            t["in.noises"][i],
            torch.zeros(3, dtype=torch.bool),
        )
        metrics = ldm_step(state, batch, draws, FlowObjective(Interpolant("linear")))
        for name in ("flow_loss", "align_loss", "sit_loss", "grad_norm_sit"):
            same(metrics[name], j["steps"][i][NAMES[name]], i)
    assert torch.equal(sit.bn.running_mean, before)
    probe = t["in.probe.latent"], t["in.probe.t"], t["in.probe.y"]
    with torch.no_grad():
        same(sit.eval()(*probe), t["final.probe.sit_inference"], 4)
        same(state.ema(*probe), t["final.probe.ema_inference"], 4)
