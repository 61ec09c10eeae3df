"""Settings that change how a step is computed, not what: recomputed activations, compilation, half precision."""

import logging
import subprocess
import sys
import textwrap

import pytest
import tiny
import torch
from torch._inductor import config as inductor

from repae_core.artifacts import Artifact, Store
from repae_core.losses import build_perceptual
from repae_core.models import build_vae
from repae_core.models.recompute import recompute_activations
from repae_core.training import assembly
from repae_core.training.distributed import open_group
from repae_core.training.joint_run import JointRun
from repae_core.training.repae_step import repae_step
from repae_core.training.throughput import image_flops

CPU = torch.device("cpu")


def joint_run(images, path, *settings) -> JointRun:
    config = tiny.config("digits", path, *(f"train_repae.{s}" for s in settings))
    return JointRun(config, images, Artifact(Store(str(path)), "train-repae", "test"), open_group())


def after_two_steps(run: JointRun) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Weights of all networks, and the metrics of each step, from the first joint step on."""
    batches, metrics = run.batches(2), []
    for _ in range(2):
        batch, draws = next(batches)
        metrics.append(repae_step(run.state, batch, run.joint_objective, draws))
    weights = {f"{n}.{k}": v for n, net in run.state.networks().items() for k, v in net.module.state_dict().items()}
    return weights, metrics


def kept_bytes(vae: torch.nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass, weights apart."""
    sizes: dict[int, int] = {}
    own = {p.data_ptr() for p in vae.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        vae(torch.randn(2, 3, 32, 32), torch.randn(2, 4, 4, 4))
    return sum(sizes.values())


def test_recomputed_activations_give_the_same_bits(images, tmp_path):
    plain, plain_metrics = after_two_steps(joint_run(images, tmp_path / "a"))
    run = joint_run(images, tmp_path / "b", "activation_checkpointing=true")
    recomputed, metrics = after_two_steps(run)
    assert run.state.sit.module.blocks[0].recompute
    assert metrics == plain_metrics
    assert all(torch.equal(value, plain[name]) for name, value in recomputed.items())


def test_recomputing_keeps_less():
    spec = {"base_channels": 32, "norm_groups": 8, "latent_channels": 4}
    vae = build_vae(spec)
    before = kept_bytes(vae)
    recompute_activations(vae)
    assert kept_bytes(vae) < 0.5 * before


@pytest.mark.slow
def test_compiled_training_gives_nearly_the_same(images, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "repae_core"):
        run = joint_run(images, tmp_path / "a", "compile=true")
        _, metrics = after_two_steps(run)
    assert "torch.compile failed" not in caplog.text
    assert run.state.sit.module.blocks[0]._compiled_call_impl is not None
    assert run.state.ema.blocks[0]._compiled_call_impl is None
    _, plain = after_two_steps(joint_run(images, tmp_path / "b"))
    for ours, theirs in zip(metrics, plain, strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)


def test_a_compiler_that_is_missing_is_one_warning(images, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    torch._dynamo.reset()  # the test stands behind the one that compiles: torch remembers that there is no compiler
    with caplog.at_level(logging.WARNING, "repae_core"):
        weights, _ = after_two_steps(joint_run(images, tmp_path / "a", "compile=true"))
    assert sum("torch.compile failed" in record.message for record in caplog.records) == 1
    plain, _ = after_two_steps(joint_run(images, tmp_path / "b"))
    assert all(torch.equal(value, plain[name]) for name, value in weights.items())


def test_a_compiler_that_fails_in_the_runs_precision_is_found_before_training(images, tmp_path, monkeypatch, caplog):
    """And the checkpoints say that they were written without it: a compiled run does not continue them."""

    def backend(graph, inputs):
        if any(x.dtype == torch.bfloat16 for x in inputs if isinstance(x, torch.Tensor)):
            raise RuntimeError("no bf16 kernel")
        return graph.forward

    by_inductor = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: by_inductor(self, backend=backend, **kw))
    sets = ("compile=true", "vae_mixed_precision=bf16", "max_steps=2")
    with caplog.at_level(logging.WARNING, "repae_core"):
        quiet(joint_run(images, tmp_path, *sets))
    assert sum("no bf16 kernel" in record.message for record in caplog.records) == 1
    monkeypatch.setattr(torch.nn.Module, "compile", by_inductor)
    monkeypatch.setattr(assembly, "keep_if_it_compiles", lambda *_: None)
    with pytest.raises(ValueError, match="compile=False, this run has True; set it to False"):
        quiet(joint_run(images, tmp_path, *sets))


def quiet(run: JointRun) -> None:
    run.run(report=lambda progress: None, guard=lambda: None, record={})


def test_other_rounding_is_refused_by_name(images, tmp_path):
    quiet(joint_run(images, tmp_path, "max_steps=2"))
    with pytest.raises(ValueError, match="gradient_accumulation_steps=1, this run has 2; set it to 1"):
        quiet(joint_run(images, tmp_path, "gradient_accumulation_steps=2"))


def test_a_half_precision_vae_still_has_full_precision_losses(images, tmp_path):
    """bf16 changes losses by rounding only; losses, weights and optimizer states are fp32."""
    _, plain = after_two_steps(joint_run(images, tmp_path / "a"))
    run = joint_run(images, tmp_path / "b", "mixed_precision=bf16", "vae_mixed_precision=bf16")
    weights, metrics = after_two_steps(run)
    assert {value.dtype for step in metrics for value in step.values()} == {torch.float32}
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
    for name in ("recon_loss", "perceptual_loss", "vae_align_loss", "flow_loss", "align_loss"):
        assert metrics[0][name] == pytest.approx(float(plain[0][name]), rel=0.03, abs=0.01)
        assert metrics[0][name] != plain[0][name]


def test_lpips_with_a_half_precision_trunk(vgg_weights):
    """Distances in fp32, near those of the whole in fp32; the gradient reaches the image."""
    a, b = torch.rand(2, 3, 32, 32) * 2 - 1, (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    whole = build_perceptual("lpips-vgg", vgg_weights)(a, b)
    half = build_perceptual("lpips-vgg", vgg_weights, trunk_dtype=torch.bfloat16)(a, b)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, rtol=0.05, atol=1e-3)
    half.sum().backward()
    assert float(b.grad.abs().sum()) > 0


def test_encoders_hold_what_autocast_would_round(images, tmp_path):
    """In bf16 a frozen encoder's products are held rounded: half the bytes and the same features, to the last bit."""
    whole, half = (
        assembly.Encoders(joint_run(images, tmp_path / p, f"mixed_precision={p}").joint, grid=4, device=CPU)
        for p in ("no", "bf16")
    )
    x = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = whole.modules[0](x).float()
    torch.testing.assert_close(half(x)[0], expected, rtol=0, atol=0)
    sizes = [sum(p.nbytes for p in encoders.modules[0].parameters()) for encoders in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]


def test_model_flops_do_not_depend_on_the_precision(images, tmp_path):
    """Networks that are held in half precision count as in fp32."""
    flops = set()
    for precision in ("no", "bf16"):
        run = joint_run(images, tmp_path / precision, f"mixed_precision={precision}")
        modules = run.encoders.modules
        flops.add(image_flops(repae_step, run.state, run.joint_objective, modules, image_side=32))
    assert len(flops) == 1
    assert flops.pop() > 0


@pytest.fixture
def vgg_weights(tmp_path) -> str:
    """A file in torchvision's layout, of random but well-scaled weights."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    network = vgg16(weights=None)
    torch.save({k: v for k, v in network.state_dict().items() if k.startswith("features")}, tmp_path / "vgg.pth")
    return str(tmp_path / "vgg.pth")


def test_freed_memory_is_kept_inside_and_given_back_after():
    """In a process of its own: a heap that earlier tests left holes in serves from those, whatever the settings.

    That it is faster is measured by benchmarks/step.py.
    """
    script = textwrap.dedent("""
        import psutil
        from repae_core.training.host_memory import freed_memory_kept

        def freed_megabytes():
            process, block = psutil.Process(), b"x" * 80_000_000
            before = process.memory_info().rss
            del block
            return (before - process.memory_info().rss) / 1e6

        print(freed_megabytes())
        with freed_memory_kept():
            print(freed_megabytes())
        print(freed_megabytes())
    """)
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    before, inside, after = map(float, out.split())
    assert before > 60
    assert inside < 10
    assert after > 60


def test_the_vae_average_follows_the_joint_steps(images, tmp_path):
    """It starts at the VAE that the warm-up leaves, moves a step at a time, and is in the checkpoint."""
    run = joint_run(images, tmp_path, "vae_ema_decay=0.5")
    wanted = {}
    real_step = run.step

    def step(index, item):
        if index == 2:
            wanted.update({k: v.clone() for k, v in run.state.vae.module.state_dict().items()})
        metrics = real_step(index, item)
        if index >= 2:
            for k, v in run.state.vae.module.state_dict().items():
                wanted[k] = wanted[k] + 0.5 * (v - wanted[k])
        return metrics

    run.step = step
    run.run(report=lambda progress: None, guard=lambda: None, record={})
    for name, value in run.state.vae_ema.state_dict().items():
        torch.testing.assert_close(value, wanted[name])
    assert run.folder.exists("checkpoints/48/vae_ema.safetensors")
    again = joint_run(images, tmp_path, "vae_ema_decay=0.5", "max_steps=5")
    again.run(report=lambda progress: None, guard=lambda: None, record={})
    without = joint_run(images, tmp_path / "none", "max_steps=2")
    without.run(report=lambda progress: None, guard=lambda: None, record={})
    with pytest.raises(ValueError, match="no moving average of the VAE; set vae_ema_decay=0"):
        joint_run(images, tmp_path / "none", "vae_ema_decay=0.5").run(
            report=lambda progress: None, guard=lambda: None, record={}
        )
