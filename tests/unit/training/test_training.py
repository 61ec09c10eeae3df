import math
import tempfile

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load as load_safetensors
from scipy import stats

from repae_core.artifact_models import UNTUNED_VAE
from repae_core.artifacts import Artifact, Store
from repae_core.artifacts.checkpoints import (
    CommittedFiles,
    commit_checkpoint,
    committed_checkpoints,
    resolve_checkpoint,
)
from repae_core.config import PipelineConfig
from repae_core.diffusion import Interpolant
from repae_core.training import joint_run
from repae_core.training.checkpoint import load_checkpoint
from repae_core.training.checkpoint_scratch import open_scratch
from repae_core.training.distributed import open_group
from repae_core.training.draws import sample_draws
from repae_core.training.joint_run import JointRun
from repae_core.training.optim import Network, rate_factor
from repae_core.training.precision import NonFiniteLossError, require_finite
from repae_core.training.repae_step import new_draws, repae_step


@pytest.fixture
def config(tmp_path) -> PipelineConfig:
    return tiny.config("digits", tmp_path)


def start(config, images, folder) -> JointRun:
    return JointRun(config, images, folder, open_group())


def train(run: JointRun, guard=lambda: None) -> list[dict[str, float]]:
    return run.run(report=lambda progress: None, guard=guard, record={})


def folder(path) -> Artifact:
    return Artifact(Store(str(path)), "train-repae", "test")


def last_files(out: Artifact) -> dict[str, bytes]:
    images_seen = committed_checkpoints(out)[-1]
    return {
        name: out.read_bytes(f"checkpoints/{images_seen}/{name}") for name in out.files(f"checkpoints/{images_seen}")
    }


class Stopped(Exception):
    pass


def test_the_first_statistics_go_into_the_moving_average_too(config, images, tmp_path):
    run = start(config, images, folder(tmp_path))
    run.start_latent_norm()
    for mine, average in zip(run.state.sit.module.latent_stats(), run.state.ema.latent_stats(), strict=True):
        assert torch.equal(mine, average)
    assert not torch.allclose(average, torch.zeros(4), atol=1e-3)  # measured, not the untouched buffers


@pytest.mark.parametrize("vae_training", ["repa-e", "frozen"])
def test_resume_is_exact(config, images, tmp_path, vae_training):
    """Stopped between checkpoints, in the warm-up and in joint training, a run ends with the same bytes."""
    chosen = {"vae_training": vae_training, "vae_warmup_learning_rate": 5 * config.train_repae.vae_learning_rate}
    if vae_training == "repa-e":  # whatever else a checkpoint may hold
        chosen |= {"vae_ema_decay": 0.9, "lecam_weight": 0.1}
    config = config.model_copy(update={"train_repae": config.train_repae.model_copy(update=chosen)})
    through, stopped = folder(tmp_path / "a"), folder(tmp_path / "b")
    history = train(start(config, images, through))
    for stop_at in (3, 5):
        run = start(config, images, stopped)
        real_step = run.step

        def step(index, item, real_step=real_step, stop_at=stop_at):
            if index == stop_at:
                raise Stopped
            return real_step(index, item)

        run.step = step
        with pytest.raises(Stopped):
            train(run)
    assert committed_checkpoints(stopped) == [16, 32]
    assert train(start(config, images, stopped)) == history
    assert last_files(through) == last_files(stopped)


def test_a_run_continues_from_what_waited_in_scratch(config, images, tmp_path, monkeypatch):
    """As when its process was killed while the store was away: no step that a snapshot holds is trained again."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = folder(tmp_path)
    history, expected = train(start(config, images, out)), last_files(out)
    mine = open_scratch("this one")
    left = mine.rename(mine.with_name(f"{mine.name.rpartition('@')[0]}@999999999"))  # no process has this id
    (left / "32").mkdir()
    for leaf in out.files("checkpoints/32").keys() - {"commit.json"}:
        (left / "32" / leaf).write_bytes(out.read_bytes(f"checkpoints/32/{leaf}"))
    out.delete("checkpoints", recursive=True)
    run = start(config, images, out)
    assert run.run(report=lambda progress: None, guard=lambda: None, record={}, training="this one") == history
    assert run.loop is not None
    assert run.loop.start_step * 8 == 32
    assert last_files(out) == expected


def test_gradient_scales_are_restored(config, images, tmp_path):
    out = folder(tmp_path)
    run, again = start(config, images, out), start(config, images, out)
    for network in run.state.networks().values():
        network.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    train(run)
    for network in again.state.networks().values():
        network.scaler = torch.amp.GradScaler("cpu")
    load_checkpoint(out, 48, again.state)
    for name, network in again.state.networks().items():
        assert network.scaler.get_scale() == 64.0, name


@pytest.mark.parametrize(("content", "told"), [
    ({"latents_scale": torch.ones(1, 32, 1, 1), "latents_bias": torch.zeros(1, 32, 1, 1)},
     r"train_repae.latent_stats: .*stats.pt is of 32 channels, train_repae.vae makes 4$"),
    ([1, 2], r"train_repae.latent_stats: .*stats.pt"),
])  # fmt: skip
def test_wrong_latent_statistics_are_told_before_the_warm_up(config, images, tmp_path, content, told):
    path = tmp_path / "stats.pt"
    torch.save(content, path)
    section = config.train_repae.model_copy(update={"latent_stats": str(path)})
    with pytest.raises(ValueError, match=told):
        start(config.model_copy(update={"train_repae": section}), images, folder(tmp_path))


def test_a_preemption_makes_a_checkpoint_at_once(config, images, tmp_path):
    """One an announcement, however long that lasts; the machine may stay and be announced again."""
    out, answers = folder(tmp_path), iter([False, True, True, False, True, True])

    keep = config.train_repae.model_copy(update={"checkpoint_every": 100, "keep_checkpoints": 9})
    run = start(config.model_copy(update={"train_repae": keep}), images, out)
    run.run(report=lambda progress: None, guard=lambda: None, record={}, preempted=lambda: next(answers))
    assert committed_checkpoints(out) == [2 * 8, 5 * 8, 6 * 8]  # at once twice, and at the end


def test_a_lost_lease_prevents_the_commit(config, images, tmp_path):
    out = folder(tmp_path)

    def guard():
        if any(name.endswith("vae.safetensors") for name in out.files()):
            raise Stopped

    with pytest.raises(Stopped):
        train(start(config, images, out), guard)
    assert any(name.endswith("vae.safetensors") for name in out.files())
    assert committed_checkpoints(out) == []


def test_half_written_checkpoints_do_not_count(config, images, tmp_path):
    out = folder(tmp_path)
    train(start(config, images, out))
    assert committed_checkpoints(out) == [32, 48]
    out.delete("checkpoints/48/ema.safetensors")
    assert resolve_checkpoint(out, "last") == 32
    with pytest.raises(ValueError, match=r"checkpoints/48/ema.safetensors is missing; remove the folder"):
        CommittedFiles(out, 48).read("ema.safetensors")
    with pytest.raises(ValueError, match="no checkpoint '48'; there are: last, 32"):
        resolve_checkpoint(out, "48")


@pytest.mark.parametrize("leaf", ["ema.safetensors", "sit.optimizer.pt", "state.json"])
def test_a_damaged_checkpoint_is_refused_by_name(config, images, tmp_path, leaf):
    out = folder(tmp_path)
    train(start(config, images, out))
    content = bytearray(out.read_bytes(f"checkpoints/48/{leaf}"))
    content[-3] ^= 1
    out.write_bytes(f"checkpoints/48/{leaf}", bytes(content))
    with pytest.raises(ValueError, match=rf"checkpoints/48/{leaf} is damaged.*remove the folder checkpoints/48"):
        train(start(config, images, out))


def test_other_number_of_workers_is_refused(config, images, tmp_path):
    out = folder(tmp_path)
    train(start(config, images, out))
    record = out.read_json("checkpoints/48/state.json")
    out.write_json("checkpoints/48/state.json", record | {"world_size": 2})
    commit_checkpoint(out, "checkpoints/48")
    with pytest.raises(ValueError, match="was written by 2 worker"):
        train(start(config, images, out))


def test_an_overflow_in_fp16_writes_no_norm(config, images, tmp_path):
    """Its norm is infinite, and that update is left out: JSON has no such number."""
    out, factors = folder(tmp_path), iter([math.inf])
    run = start(config, images, out)
    run.state.sit.scaler = torch.amp.GradScaler("cpu")
    run.state.sit.parameters()[0].register_hook(lambda gradient: gradient * next(factors, 1.0))
    first, second = [row for row in train(run) if "sit_loss" in row][:2]
    assert first.keys() == second.keys() - {"grad_norm_sit"}
    assert "Infinity" not in out.read_bytes("checkpoints/48/state.json").decode()


def test_only_the_vae_learns_in_the_warmup(config, images, tmp_path):
    out = folder(tmp_path)
    run = start(config, images, out)
    sit = {k: v.clone() for k, v in run.state.sit.module.state_dict().items()}
    vae = {k: v.clone() for k, v in run.state.vae.module.state_dict().items()}
    batches = run.batches(0)
    run.step(0, next(batches))
    assert all(torch.equal(v, sit[k]) for k, v in run.state.sit.module.state_dict().items())
    assert not torch.equal(run.state.vae.module.decoder.conv_out.weight, vae["decoder.conv_out.weight"])
    run.step(1, next(batches))
    run.step(2, next(batches))
    assert not torch.equal(run.state.sit.module.bn.running_mean, sit["bn.running_mean"])


def test_diffusion_loss_does_not_reach_the_vae(config, images, tmp_path):
    """Only the alignment loss flows into the VAE (REPA-E, section 3): with all VAE weights 0 it stays as it is."""
    off = config.train_repae.model_copy(
        update={"perceptual_weight": 0.0, "kl_weight": 0.0, "discriminator_weight": 0.0, "vae_align_proj_coeff": 0.0}
    )
    config = config.model_copy(update={"train_repae": off})
    run = start(config, images, folder(tmp_path))
    batch, draws = next(run.batches(2))
    batch_again = run.batch(run.read(np.arange(8), None), draws, step=2)
    assert batch_again.features[0].shape == (8, 16, 96)
    seen = []
    run.state.vae.backward = lambda loss: seen.append(torch.autograd.grad(loss, run.state.vae.parameters()[0])[0])
    metrics = repae_step(run.state, batch, run.objective, draws)
    assert float(metrics["vae_loss"]) == pytest.approx(float(metrics["recon_loss"]))
    assert float(metrics["flow_loss"]) > 0
    only_recon = torch.autograd.grad(
        (run.state.vae.forward(batch.images.float() / 127.5 - 1, draws.posterior_noise)[2]
         - (batch.images.float() / 127.5 - 1)).abs().mean(),
        run.state.vae.parameters()[0],
    )[0]  # fmt: skip
    torch.testing.assert_close(seen[0], only_recon)


def test_weights_are_those_of_the_checkpoint(config, images, tmp_path):
    out = folder(tmp_path)
    run = start(config, images, out)
    train(run)
    saved = load_safetensors(out.read_bytes("checkpoints/48/ema.safetensors"))
    assert all(torch.equal(v, saved[k]) for k, v in run.state.ema.state_dict().items())


def test_non_finite_loss_names_the_term_and_updates_nothing(config, images, tmp_path):
    run = start(config, images, folder(tmp_path))
    batch, draws = next(run.batches(2))
    batch = batch.__class__(batch.labels, [torch.full_like(batch.features[0], float("nan"))], images=batch.images)
    before = run.state.vae.module.decoder.conv_out.weight.clone()
    with pytest.raises(NonFiniteLossError, match="align_loss"):
        repae_step(run.state, batch, run.objective, draws)
    assert torch.equal(run.state.vae.module.decoder.conv_out.weight, before)
    require_finite({"a": torch.zeros(())}, run.group)


def test_a_run_that_continues_another_keeps_its_untuned_vae(config, images, tmp_path):
    short, long = (Artifact(Store(str(tmp_path)), "train-repae", name) for name in ("short", "long"))
    train(start(config, images, short))
    more = config.train_repae.model_copy(update={"max_steps": config.train_repae.max_steps + 2})
    continued = start(config.model_copy(update={"train_repae": more}), images, long)
    continued.run(report=lambda progress: None, guard=lambda: None, record={}, init_from=short)
    assert long.read_bytes(UNTUNED_VAE) == short.read_bytes(UNTUNED_VAE)


def test_a_run_that_continues_another_has_its_warm_up(config, images, tmp_path):
    """Steps count from the start of the warm-up: another one would train the VAE alone in the middle of the run."""
    short, long = (Artifact(Store(str(tmp_path)), "train-repae", name) for name in ("short", "long"))
    train(start(config, images, short))
    more = config.train_repae.model_copy(update={"vae_warmup_steps": 9})
    continued = start(config.model_copy(update={"train_repae": more}), images, long)
    with pytest.raises(ValueError, match="written with vae_warmup_steps=2, this run has 9"):
        continued.run(report=lambda progress: None, guard=lambda: None, record={}, init_from=short)
    assert committed_checkpoints(long) == []


def test_a_run_that_continues_another_has_its_batch_size(config, images, tmp_path):
    """Steps are counted in batches: with another one they would be logged twice, and the warm-up come again."""
    short, long = (Artifact(Store(str(tmp_path)), "train-repae", name) for name in ("short", "long"))
    train(start(config, images, short))
    larger = config.train_repae.model_copy(update={"batch_size": 24, "max_steps": 20})
    continued = start(config.model_copy(update={"train_repae": larger}), images, long)
    with pytest.raises(ValueError, match=r"batch_size=8, this run has 24; .* without init_from"):
        continued.run(report=lambda progress: None, guard=lambda: None, record={}, init_from=short)
    assert committed_checkpoints(long) == []


def test_moments_of_another_memory_layout_are_taken_over():
    """Published checkpoints are contiguous, the VAE's kernels channels-last; torch's fused AdamW minds no strides."""
    torch.manual_seed(0)
    kernel = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    networks = []
    for _ in range(2):
        module = torch.nn.ParameterList([torch.nn.Parameter(kernel.clone(memory_format=torch.preserve_format))])
        networks.append(Network(module, module, learning_rate=0.1))
    gradients = torch.randn(2, 4, 3, 2, 2)
    through, continued = networks
    through.parameters()[0].grad = torch.empty_like(kernel).copy_(gradients[0])
    through.step(1e9)
    state = through.optimizer.state_dict()
    moments = state["state"][0]
    contiguous = {name: value.clone(memory_format=torch.contiguous_format) for name, value in moments.items()}
    assert contiguous["exp_avg"].stride() != moments["exp_avg"].stride()
    continued.parameters()[0].data.copy_(through.parameters()[0].data)
    continued.load_optimizer_state({"state": {0: contiguous}, "param_groups": state["param_groups"]})
    for network in networks:
        network.parameters()[0].grad = torch.empty_like(kernel).copy_(gradients[1])
        network.step(1e9)
    assert torch.equal(through.parameters()[0], continued.parameters()[0])


def test_a_foreign_optimizer_state_brings_no_settings():
    """Published checkpoints are of torch's default AdamW, which is not the fused one that clips on its way."""
    torch.manual_seed(0)
    theirs = torch.nn.Linear(3, 2)
    published = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.5, 0.6))
    theirs(torch.randn(4, 3)).sum().backward()
    published.step()
    layer = torch.nn.Linear(3, 2)
    network = Network(layer, layer, learning_rate=0.01, betas=(0.8, 0.9), weight_decay=0.2)
    network.load_optimizer_state(published.state_dict())
    group = network.optimizer.param_groups[0]
    assert (group["fused"], group["betas"], group["weight_decay"]) == (True, (0.8, 0.9), 0.2)
    moments = network.optimizer.state[layer.weight]
    assert torch.equal(moments["exp_avg"], published.state[theirs.weight]["exp_avg"])
    layer(torch.randn(4, 3)).sum().backward()
    network.step(1e-3)
    assert moments["step"] == 2
    with pytest.raises(ValueError, match="of 1 parameters, ours has 2"):
        network.load_optimizer_state({"state": {}, "param_groups": [{"params": [0]}]})


def test_another_architecture_is_one_line(config, images, tmp_path):
    short, other = (Artifact(Store(str(tmp_path)), "train-repae", name) for name in ("short", "other"))
    train(start(config, images, short))
    section = config.train_repae.model_copy(update={"projector_dim": 8, "max_steps": 20})
    run = start(config.model_copy(update={"train_repae": section}), images, other)
    with pytest.raises(ValueError, match=r"of another architecture \(sit\): sit's projector_dim is \d+, this run's 8$"):
        run.run(report=lambda progress: None, guard=lambda: None, record={}, init_from=short)


def test_other_optimizers_and_discriminators_are_one_line(config, images, tmp_path):
    short = Artifact(Store(str(tmp_path)), "train-repae", "short")
    train(start(config, images, short))
    longer = config.train_repae.model_copy(update={"max_steps": 20})
    wider = longer.model_copy(update={"discriminator_filters": 24, "class_dropout_prob": 0.3})
    learned = config.compat.model_copy(update={"trainable_pos_embed": True})
    for name, update, told in (
        ("wider", {"train_repae": wider},
         r"\(discriminator\): size mismatch.*; is train_repae.discriminator_filters another\?$"),
        ("learned", {"train_repae": longer, "compat": learned},
         r"short: checkpoint 48 does not fit sit: the optimizer's state is of \d+ parameters"
         r".*compat.trainable_pos_embed"),
        ("empty", {"train_repae": longer}, "init_from: .*/nothing has no whole checkpoint"),
    ):  # fmt: skip
        run = start(config.model_copy(update=update), images, Artifact(Store(str(tmp_path)), "train-repae", name))
        source = short if name != "empty" else Artifact(Store(str(tmp_path)), "train-repae", "nothing")
        with pytest.raises(ValueError, match=told):
            run.run(report=lambda progress: None, guard=lambda: None, record={}, init_from=source)


def test_pictures_do_not_count_as_a_step_that_hangs(config, images, tmp_path, monkeypatch):
    section = config.train_repae.model_copy(update={"preview_every": 1000})
    run = start(config.model_copy(update={"train_repae": section}), images, folder(tmp_path))
    told = []
    monkeypatch.setattr(run, "alive", lambda: told.append(1))
    train(run)
    assert len(told) >= 20  # the sampler's steps of the last step's pictures
    plain = start(config.model_copy(update={"train_repae": section.model_copy(update={"preview_every": 0})}), images,
                  Artifact(Store(str(tmp_path)), "train-repae", "plain"))  # fmt: skip
    train(plain)
    assert not any(name.startswith("previews/") for name in plain.folder.files())


def test_pictures_without_a_null_class_are_unguided(config, images, tmp_path):
    """SiT without label dropout has no row for it; `generate`, which would need one, may be of another model."""
    section = config.train_repae.model_copy(update={"class_dropout_prob": 0.0, "preview_every": 1000})
    assert config.generate.guidance != 1.0
    run = start(config.model_copy(update={"train_repae": section}), images, folder(tmp_path))
    train(run)
    assert any(name.endswith("samples.png") for name in run.folder.files())


def test_pictures_are_of_the_vaes_average_where_there_is_one(config, images, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(joint_run, "draw_previews", lambda **given: drawn.append(given["vae"]) or {})
    section = config.train_repae.model_copy(update={"vae_ema_decay": 0.9})
    averaged = start(config.model_copy(update={"train_repae": section}), images, folder(tmp_path))
    plain = start(config, images, folder(tmp_path))
    warmup = config.train_repae.vae_warmup_steps
    for run in (averaged, plain):
        run.preview(warmup + 1)
        run.preview(warmup)  # the average starts after it
    assert averaged.state.vae_ema is not None
    assert drawn == [averaged.state.vae_ema, averaged.state.vae.module, plain.state.vae.module, plain.state.vae.module]


def test_a_checkpoint_dropped_while_it_is_looked_at_is_none(config, images, tmp_path, monkeypatch):
    out = folder(tmp_path)
    train(start(config, images, out))
    read = out.read_json

    def read_json(name):
        if name.startswith("checkpoints/32/"):
            raise FileNotFoundError(name)
        return read(name)

    monkeypatch.setattr(out, "read_json", read_json)
    assert committed_checkpoints(out) == [48]


def test_a_network_that_no_loss_has_reached_stays(config, images, tmp_path):
    vae = start(config, images, folder(tmp_path)).state.vae
    before = vae.module.decoder.conv_out.weight.clone()
    assert float(vae.step(1.0)) == 0
    assert torch.equal(vae.module.decoder.conv_out.weight, before)


@pytest.mark.parametrize(
    ("weight", "sit_step", "value"),
    [
        ("final_layer.linear.weight", 2, float("nan")),  # in the checkpoint's own step, the run's fourth
        ("y_embedder.embedding_table.weight", 1, float("inf")),  # before; no later loss sees this label's row
    ],
)
def test_weights_spoilt_by_a_gradient_are_not_kept(config, images, tmp_path, weight, sit_step, value):
    """All losses are finite, only a gradient is not."""
    out = folder(tmp_path)
    run = start(config, images, out)
    passes = []

    def spoil(gradient):
        passes.append(1)
        if len(passes) != sit_step:
            return gradient
        spoilt = gradient.clone()
        spoilt[-1] = value
        return spoilt

    run.state.sit.module.get_parameter(weight).register_hook(spoil)
    with pytest.raises(NonFiniteLossError, match="step 4: non-finite gradient of sit"):
        train(run)
    assert committed_checkpoints(out) == [16]


def test_a_step_draws_what_it_is_not_given(config, images, tmp_path):
    """t, noises and dropped labels: each given one is taken, the others come from the generator (or torch's own)."""
    run = start(config, images, folder(tmp_path))
    batch, _ = next(run.batches(2))
    drawn = new_draws(run.state, batch, run.objective, generator=torch.Generator().manual_seed(3))
    again = new_draws(run.state, batch, run.objective, generator=torch.Generator().manual_seed(3))
    shape = (8, run.state.sit.module.in_channels, 8, 8)
    assert (drawn.noise.shape, drawn.posterior_noise.shape, drawn.t.shape) == (shape, shape, (8,))
    assert len(drawn.t.unique()) == 8
    assert all(torch.equal(value, vars(again)[name]) for name, value in vars(drawn).items())
    one_an_image = [torch.Generator().manual_seed(i) for i in range(8)]
    given = {"t": torch.full((8,), 0.25), "label_drop": torch.ones(8, dtype=torch.bool)}
    mixed = new_draws(run.state, batch, run.objective, generator=one_an_image, **given)
    assert all(torch.equal(vars(mixed)[name], value) for name, value in given.items())
    torch.testing.assert_close(
        mixed.posterior_noise[3], torch.randn(shape[1:], generator=torch.Generator().manual_seed(3))
    )
    torch.manual_seed(5)
    free = repae_step(run.state, batch, run.objective)
    run = start(config, images, folder(tmp_path))
    torch.manual_seed(5)
    replayed = repae_step(run.state, batch, run.objective, new_draws(run.state, batch, run.objective))
    assert free["sit_loss"] == replayed["sit_loss"]


def test_draws_depend_on_position_only():
    settings = {"seed": 3, "stream": "s", "latent_shape": (2, 4, 4), "interpolant": Interpolant("linear"),
                "weighting": "uniform", "drop_prob": 0.5, "device": torch.device("cpu")}  # fmt: skip
    whole = sample_draws(range(10, 18), **settings)
    part = sample_draws(range(13, 15), **settings)
    for name in ("posterior_noise", "t", "noise", "label_drop"):
        assert torch.equal(getattr(whole, name)[3:5], getattr(part, name))
    other = sample_draws(range(10, 18), **(settings | {"seed": 4}))
    assert not torch.equal(whole.noise, other.noise)
    assert 0 < int(whole.label_drop.sum()) < 8


@pytest.mark.parametrize(("path", "weighting", "quantile"), [
    ("linear", "uniform", lambda u: u),
    ("linear", "lognormal", lambda u: 1 / (1 + np.exp(-stats.norm.ppf(u)))),
    ("cosine", "lognormal", lambda u: 2 / np.pi * np.arctan(np.exp(stats.norm.ppf(u)))),
])  # fmt: skip
def test_times_follow_the_weighting(path, weighting, quantile):
    """Uniform, or log sigma normal with t = sigma/(1+sigma) (cosine: 2/pi atan(sigma)): three quantiles."""
    settings = {"seed": 0, "stream": "s", "latent_shape": (1, 1, 1), "interpolant": Interpolant(path), "drop_prob": 0.1,
                "device": torch.device("cpu")}  # fmt: skip
    t = sample_draws(range(4000), weighting=weighting, **settings).t.numpy()
    for u in (0.1, 0.5, 0.9):
        assert np.mean(t < quantile(u)) == pytest.approx(u, abs=0.02)


def test_learning_rate_schedule():
    rates = [rate_factor(step, total_steps=10, warmup_steps=2, decay_fraction=0.5) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert rate_factor(7, total_steps=10) == 1


def test_step_clips_and_reports_the_norm_before():
    layer = torch.nn.Linear(1, 1, bias=False)
    network = Network(layer, layer, learning_rate=0.1)
    network.backward(100 * network.forward(torch.ones(1, 1)).sum())
    assert float(network.step(1.0)) == pytest.approx(100)
    assert layer.weight.grad is None


@pytest.mark.parametrize("norm", [0.5, 1.0, 4.0])
def test_clipping_is_torchs(norm):
    """Above and below the limit; matrices, channels-last kernels, vectors and scalars."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(5, 3), (4, 3, 2, 2), (7,), ()]]
    parameters[1].data = parameters[1].data.to(memory_format=torch.channels_last)
    module = torch.nn.ParameterList(parameters)
    network = Network(module, module, learning_rate=0.1, epsilon=1.0)
    for p in parameters:
        p.grad = torch.randn_like(p)
    whole = torch.cat([p.grad.flatten().double() for p in parameters]).norm()
    expected = []
    for p in parameters:
        p.grad.mul_(norm / whole)
        expected.append(p.grad.double() * min(1.0, 1 / norm))
    assert float(network.step(1.0)) == pytest.approx(norm, rel=1e-6)
    for p, g in zip(parameters, expected, strict=True):  # AdamW's first step
        torch.testing.assert_close(p.data.double(), -0.1 * g / (g.abs() + 1), rtol=1e-5, atol=1e-9)


def test_fewer_classes_than_the_data_are_refused(config, images, tmp_path):
    section = config.train_repae.model_copy(update={"num_classes": 2})
    with pytest.raises(ValueError, match="num_classes=2, but the data set has 3 classes"):
        start(config.model_copy(update={"train_repae": section}), images, folder(tmp_path))
