import subprocess
import sys
import time

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from repae_core.artifacts import Artifact, Store
from repae_core.artifacts.checkpoints import committed_checkpoints
from repae_core.diffusion import Interpolant
from repae_core.models import SiT
from repae_core.models.recompute import recompute_activations
from repae_core.models.vae import Upsample
from repae_core.training.ablation_steps import frozen_vae_step, naive_end_to_end_step
from repae_core.training.compiled import compile_blocks
from repae_core.training.distributed import open_group
from repae_core.training.joint_run import JointRun
from repae_core.training.ldm_step import ldm_step
from repae_core.training.optim import Network
from repae_core.training.repae_step import repae_step, vae_warmup_step
from repae_core.training.state import FlowObjective, LDMState
from repae_core.training.throughput import ThroughputMeter, image_flops, matmul_peak, peak_memory, stand_in
from repae_core.training.timing import PhaseTimer

CPU = torch.device("cpu")


def small_sit() -> SiT:
    return SiT(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=2, num_classes=10,
               encoder_depth=2, z_dims=[24], projector_dim=48)  # fmt: skip


def small_state() -> LDMState:
    sit = small_sit()
    return LDMState(open_group(), Network(sit, sit, learning_rate=1e-3), ema=small_sit())


def linear(tokens: int, inputs: int, outputs: int) -> int:
    """FLOPs of y = xW: a multiplication and an addition for each weight and token."""
    return 2 * tokens * inputs * outputs


def hand_count() -> tuple[int, int]:
    """Forward FLOPs of an image in `small_sit`, and those of layers whose input needs no gradient."""
    width, tokens, patch, blocks = 32, 16, 2 * 2 * 4, 3
    attention = 2 * 2 * tokens * tokens * width  # scores, and their sum of values
    block = (
        linear(1, width, 6 * width)
        + linear(tokens, width, 3 * width)
        + attention
        + linear(tokens, width, width)
        + linear(tokens, width, 4 * width)
        + linear(tokens, 4 * width, width)
    )
    projector = linear(tokens, width, 48) + linear(tokens, 48, 48) + linear(tokens, 48, 24)
    final = linear(1, width, 2 * width) + linear(tokens, width, patch)
    of_constants = linear(tokens, patch, width) + linear(1, 256, width)  # patches; frequencies of t
    return of_constants + linear(1, width, width) + blocks * block + projector + final, of_constants


def test_the_count_is_that_by_hand():
    """Backward costs twice the forward pass, but for inputs without a gradient."""
    forward, of_constants = hand_count()
    counted = image_flops(ldm_step, small_state(), FlowObjective(Interpolant("linear")), image_side=32)
    assert counted == 3 * forward - of_constants


def test_recomputed_activations_count_once_and_nothing_is_compiled():
    state = small_state()
    recompute_activations(state.sit.module)
    compile_blocks(state.sit.module)
    objective = FlowObjective(Interpolant("linear"))
    assert image_flops(ldm_step, state, objective, image_side=32) == 3 * hand_count()[0] - hand_count()[1]


def test_a_layer_computed_in_a_shorter_way_counts_as_defined():
    with FlopCounterMode(display=False) as counter:
        stand_in(Upsample(4))(torch.empty(1, 4, 8, 8, device="meta"))
    assert counter.get_total_flops() == linear(16 * 16, 9 * 4, 4)


@pytest.fixture
def joint_run(images, tmp_path) -> JointRun:
    return JointRun(tiny.config("digits", tmp_path), images, folder(tmp_path), open_group())


def folder(path) -> Artifact:
    return Artifact(Store(str(path)), "train-repae", "test")


def test_every_kind_of_step_is_counted(joint_run, caplog):
    count = {
        step: image_flops(step, joint_run.state, joint_run.objective, joint_run.encoders.modules, image_side=32)
        for step in (repae_step, naive_end_to_end_step, frozen_vae_step, vae_warmup_step)
    }
    assert caplog.text == ""
    assert 0 < count[frozen_vae_step] < count[repae_step]
    assert 0 < count[vae_warmup_step] < count[repae_step]
    assert count[naive_end_to_end_step] == pytest.approx(count[repae_step], rel=0.02)  # the gradient through patches
    without = image_flops(repae_step, joint_run.state, joint_run.objective, image_side=32)
    assert 0 < without < count[repae_step]


def test_a_step_without_alignment_is_counted(images, tmp_path, caplog):
    run = JointRun(tiny.config("digits", tmp_path, "train_repae.encoder=[]"), images, folder(tmp_path), open_group())
    assert image_flops(repae_step, run.state, run.objective, image_side=32) > 0
    assert caplog.text == ""


def test_counting_touches_nothing(joint_run):
    state = joint_run.state
    modules = [network.module for network in state.networks().values()] + [state.ema]
    before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]
    modes = [[m.training for m in module.modules()] for module in modules]
    generator = torch.get_rng_state()
    assert joint_run.image_flops(0) > 0
    assert joint_run.image_flops(5) > joint_run.image_flops(0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert state.step == 0
    for module, kept, mode in zip(modules, before, modes, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in module.state_dict().items())
        assert all(p.grad is None and not p.is_meta for p in module.parameters())
        assert [m.training for m in module.modules()] == mode


def test_what_cannot_be_counted_is_a_warning(caplog):
    def step(state, batch, objective, draws):
        return {"loss": batch.latents.sum().item()}

    assert image_flops(step, small_state(), FlowObjective(Interpolant("linear")), image_side=32) == 0
    assert caplog.text.count("model FLOPs are not counted") == 1


class Unmeasured(JointRun):
    def meter(self, start_step):
        return None


@pytest.mark.parametrize("more", [[], ["train_repae.preview_every=2"]])
def test_measuring_and_previews_do_not_change_the_training(images, tmp_path, more):
    """The same bytes in the last checkpoint: weights, optimizers, moving average, statistics, history."""
    ends = []
    for kind, name, settings in (
        (JointRun, "measured", ["train_repae.measure_peak=true", *more]),
        (Unmeasured, "plain", ["train_repae.preview_every=0"]),
    ):
        out, reports = folder(tmp_path / name), []
        run = kind(tiny.config("digits", tmp_path, *settings), images, out, open_group())
        run.run(report=reports.append, guard=lambda: None, record={})
        last = f"checkpoints/{committed_checkpoints(out)[-1]}"
        ends.append({file: out.read_bytes(f"{last}/{file}") for file in out.files(last) if file != "commit.json"})
        # The very last report may only say that a picture has arrived.
        logged = [progress for progress in reports if progress.metrics][-1]
        performance = logged.performance
        phases = ("data", "encoder", "vae", "discriminator", "sit", "ema", "logging")
        assert {f"seconds/{phase}" for phase in phases} <= performance.keys()
        if kind is JointRun:
            assert performance["share_of_peak"] == pytest.approx(
                performance["model_tflops"] / performance["peak_tflops"], rel=1e-6
            )
        else:
            assert {name for name in performance if not name.startswith("seconds/")} == {"checkpoint_seconds"}
    assert ends[0] == ends[1]


def test_speed_over_the_window_and_over_the_run(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter = ThroughputMeter(10, 8, CPU, lambda index: 1e12 if index < 70 else 2e12, peak=64e12)
    for done in range(11, 71):
        now += 1.0
        meter.mark(done)
    for done in range(71, 171):
        now += 0.5
        meter.mark(done)
    values = meter.read()
    assert values["images_per_second"] == pytest.approx(16, rel=0.05)
    assert values["images_per_second_run"] == pytest.approx(160 * 8 / 110)
    assert values["model_tflops"] == pytest.approx(32, rel=0.05)
    assert values["share_of_peak"] == pytest.approx(0.5, rel=0.05)
    assert values["memory_gib"] > 0.05


def test_what_is_not_known_is_left_out():
    for flops, peak, known in ((0.0, 1e12, {"peak_tflops"}), (1e9, 0.0, {"model_tflops"})):
        meter = ThroughputMeter(0, 8, CPU, lambda index, flops=flops: flops, peak)
        meter.mark(1)
        assert meter.read().keys() == {"images_per_second", "images_per_second_run", "memory_gib"} | known


def test_the_peak_is_plausible_and_draws_nothing():
    generator = torch.get_rng_state()
    assert 1e8 < matmul_peak(CPU, "no") < 1e15
    assert torch.equal(torch.get_rng_state(), generator)
    assert peak_memory(CPU) > 2**26


def test_the_peak_memory_is_not_that_of_the_program_that_started_this_one():
    child = (
        "import torch; from repae_core.training.throughput import peak_memory; print(peak_memory(torch.device('cpu')))"
    )
    parent = f"import subprocess, sys; block = b'1' * 2**30; subprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 2**26 < int(done.stdout) < 2**30


def test_a_phase_inside_another_counts_for_itself(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    timer = PhaseTimer()
    with timer("data"):
        now += 1
        with timer("encoder"):
            now += 5
        now += 2
    with timer("encoder"):
        now += 1
    with pytest.raises(ZeroDivisionError), timer("vae"):
        raise ZeroDivisionError
    with timer("sit"):
        now += 4
    assert timer.take() == {"data": 3, "encoder": 6, "sit": 4}
    assert timer.take() == {}
