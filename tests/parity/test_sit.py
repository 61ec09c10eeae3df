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
    loss = per_sample.mean() + J["proj_coefficient_for_gradients"] * align
    assert loss.item() == pytest.approx(J["cases"][case]["loss"], rel=1e-5)
    assert int(model.bn.num_batches_tracked) == J["cases"][case]["bn_num_batches_tracked_after"]
    loss.backward()
    norms = J["cases"][case]["grad_l2_norm"]
    for name, p in model.named_parameters():
        if norms.get(name) is None:
            assert p.grad is None or name == "pos_embed", name
        elif not name.endswith("k_norm.bias"):
            close(p.grad.double().norm() / norms[name], torch.tensor(1.0, dtype=torch.float64), atol=1e-4)


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
def test_tokens_after_a_block(qk):
    """Tokens of the inference pass after block `feat_depth`."""
    model, tokens = build(qk, "eval"), []
    model.blocks[J["feat_depth"] - 1].register_forward_hook(lambda _, __, out: tokens.append(out))
    model(T["in.x"], T["in.t_inference"].flatten(), T["in.y_inference"])
    close(tokens[0], T[f"qk{qk}.eval.linear.forward_feats"])


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


SAMPLED = sorted({tuple(key.split(".")[1:4]) for key in T if key.startswith("sampled.")})


@pytest.mark.parametrize(("seed", "weighting", "path"), SAMPLED)
def test_drawn_time_and_noise(seed, weighting, path):
    """Time first, then noise, from one generator; and the loss at those draws."""
    prefix = f"sampled.{seed}.{weighting}.{path}"
    generator = torch.Generator().manual_seed(int(seed.removeprefix("seed")))
    t = Interpolant(path).sample_time(len(T["in.x"]), weighting, generator)
    noise = torch.randn(T["in.x"].shape, generator=generator)
    close(t, T[f"{prefix}.time_input"].flatten(), atol=1e-7)
    assert torch.equal(noise, T[f"{prefix}.noises"])
    model = build(0, "eval")
    x_t, target = Interpolant(path).interpolate(model.bn(T["in.x"]), noise, t)
    velocity = model(x_t, t, T["in.y"])
    close((velocity - target).square().mean((1, 2, 3)), T[f"{prefix}.denoising_loss"])


def test_label_dropout():
    settings = J["label_dropout"]
    inputs, outputs = T["label_dropout.in.y"], T["label_dropout.kept_or_null"]
    generator = torch.Generator().manual_seed(settings["seed"])
    dropped = drop_labels(inputs, settings["prob"], null_class=settings["null_index"], generator=generator)
    assert torch.equal(dropped, outputs)


def test_embeddings():
    table = torch.from_numpy(sincos_position_table(64, 4))
    torch.testing.assert_close(table, T["pos_embed.dim64.grid4"], atol=1e-12, rtol=0)
    for dim in (256, 7):
        features = timestep_features(T["timestep_embedding.in.t"], dim)
        close(features, T[f"timestep_embedding.dim{dim}"], atol=1e-6)
