"""SiT against the published implementation on a small model (sit_small.*)."""

import itertools

import pytest
import torch
from parity.fill import fill, scalars, tensors

from repae_core.diffusion import Interpolant
from repae_core.losses import alignment_loss
from repae_core.models import SiT, drop_labels
from repae_core.models.embeddings import sincos_position_table, timestep_features

T, J = tensors("sit_small"), scalars("sit_small")
CASES = list(itertools.product((0, 1), ("eval", "train"), ("linear", "cosine")))
C = {k: v for k, v in J["constructor"].items() if k != "decoder_hidden_size"}


def build(qk, mode):
    model = fill(SiT(**C, qk_norm=bool(qk), class_dropout_prob=0.1 if mode == "eval" else 0.0))
    return model.train(mode == "train")


def features():
    return [T["in.zs.0"], T["in.zs.1"]]


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize(("qk", "mode", "path"), CASES)
def test_forward_losses_and_gradients(qk, mode, path):
    case, model = f"qk{qk}.{mode}.{path}", build(qk, mode)
    t = T["in.time_input"].flatten()
    x_t, target = Interpolant(path).interpolate(model.bn(T["in.x"]), T["in.noises"], t)
    velocity, projections = model(x_t, t, T["in.y"], with_projections=True)
    per_sample = (velocity - target).square().mean((1, 2, 3))
    align = alignment_loss(features(), projections)
    close(velocity, T[f"{case}.model_output"])
    close(per_sample, T[f"{case}.denoising_loss"])
    close(align, T[f"{case}.proj_loss"])
    for i, projection in enumerate(projections):
        close(projection, T[f"{case}.zs_tilde.{i}"])
    if mode == "train":
        close(model.bn.running_mean, T[f"{case}.bn.running_mean"])
        close(model.bn.running_var, T[f"{case}.bn.running_var"])
    (per_sample.mean() + J["proj_coefficient_for_gradients"] * align).backward()
    norms = J["cases"][case]["grad_l2_norm"]
    for name, p in model.named_parameters():
        if norms.get(name) is None:
            assert p.grad is None or name == "pos_embed", name
        elif not name.endswith("k_norm.bias"):
            assert p.grad.double().norm().item() == pytest.approx(norms[name], rel=1e-4), name


@pytest.mark.parametrize(("qk", "mode", "path"), CASES)
def test_alignment_pass_and_its_gradient(qk, mode, path):
    case, model = f"qk{qk}.{mode}.{path}", build(qk, mode).requires_grad_(False)
    z = T["in.x"].clone().requires_grad_()
    t = T["in.time_input"].flatten()
    x_t, _ = Interpolant(path).interpolate(model.bn(z), T["in.noises"], t)
    align = alignment_loss(features(), model.project(x_t, t, T["in.y"]))
    align.backward()
    close(align.detach(), T[f"{case}.align_proj_loss"])
    close(z.grad, T[f"{case}.align_grad_x"])


@pytest.mark.parametrize("qk", [0, 1])
def test_inference_with_the_null_class(qk):
    model = build(qk, "eval")
    close(model(T["in.x"], T["in.t_inference"].flatten(), T["in.y_inference"]), T[f"qk{qk}.eval.linear.inference"])


@pytest.mark.parametrize("qk", [0, 1])
def test_latent_stats_are_published_ones(qk):
    scale, bias = build(qk, "eval").latent_stats()
    close(scale, T[f"qk{qk}.eval.linear.latents_scale"].flatten())
    close(bias, T[f"qk{qk}.eval.linear.latents_bias"].flatten())


def test_project_stops_after_encoder_depth():
    model = build(0, "eval")
    ran = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.project(T["in.x"], T["in.time_input"].flatten(), T["in.y"])
    assert ran == [0, 1]


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
def test_drawn_times_are_published_ones(weighting, path):
    seeds = {key.split(".")[1] for key in T if key.startswith("sampled.seed")}
    assert seeds
    for seed in seeds:
        prefix = f"sampled.{seed}.{weighting}.{path}"
        generator = torch.Generator().manual_seed(int(seed.removeprefix("seed")))
        t = Interpolant(path).sample_time(len(T["in.x"]), weighting, generator)
        stored = next(v for k, v in T.items() if k.startswith(prefix) and "time" in k)
        close(t, stored.flatten(), atol=1e-7)


def test_label_dropout():
    settings = J["label_dropout"]
    stored = {k.removeprefix("label_dropout."): v for k, v in T.items() if k.startswith("label_dropout.")}
    inputs = next(v for k, v in stored.items() if "in" in k.split("."))
    outputs = next(v for k, v in stored.items() if "in" not in k.split("."))
    generator = torch.Generator().manual_seed(settings["seed"])
    dropped = drop_labels(inputs, settings["prob"], null_class=settings["null_index"], generator=generator)
    assert torch.equal(dropped, outputs)


def test_embeddings():
    table = torch.from_numpy(sincos_position_table(64, 4))
    torch.testing.assert_close(table, T["pos_embed.dim64.grid4"], atol=1e-12, rtol=0)
    for key, value in T.items():
        if key.startswith("timestep_embedding.") and ".in." not in key and value.ndim == 2:
            t = next(v for k, v in T.items() if k.startswith("timestep_embedding.in"))
            close(timestep_features(t.flatten(), value.shape[1]), value, atol=1e-6)
