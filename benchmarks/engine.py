"""What step.py and scaling.py time: real training steps on random images, with random weights of the real sizes."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.environment import unset_threads_and_memory

os.environ.update(unset_threads_and_memory())

import torch

from repae_core.config import PipelineConfig, load_config
from repae_core.training.assembly import (
    Encoders,
    flow_objective,
    joint_objective,
    new_joint_state,
    new_ldm_state,
    new_sit,
)
from repae_core.training.distributed import Group
from repae_core.training.ldm_step import ldm_step
from repae_core.training.repae_step import new_draws, repae_step
from repae_core.training.state import Batch, LDMState

CLASSES = 1000


@dataclass(frozen=True)
class Case:
    """One way to take a step.

    stage: repae | ldm; precision: no | bf16, of SiT, encoder and (repae) VAE; cached: features come from a cache.
    """

    stage: str = "repae"
    model: str = "SiT-B/2"
    vae: str = "f8d4"
    resolution: int = 128
    batch: int = 4
    precision: str = "no"
    encoder: str = "dinov2-vit-b"
    recompute: bool = False
    compile: bool = False
    cached: bool = False
    threads: int = 2
    device: str = "cpu"
    kept_memory: bool = True
    weights: str = ""  # folder of `write_weights`

    @property
    def name(self) -> str:
        """Short description."""
        marks = [("bf16", self.precision == "bf16"), ("recompute", self.recompute), ("compile", self.compile),
                 ("cached features", self.cached), ("system allocator", not self.kept_memory)]  # fmt: skip
        return " ".join([self.stage, *(mark for mark, on in marks if on)])

    def config(self) -> PipelineConfig:
        """The pipeline config that a run would have."""
        section = "train_repae" if self.stage == "repae" else "train_ldm"
        sets = {
            "model": self.model, "encoder": self.encoder, "batch_size": self.batch, "mixed_precision": self.precision,
            "activation_checkpointing": self.recompute, "compile": self.compile,
            "encoder_weights": f"{self.weights}/encoder.safetensors", "workers": 1, "gradient_accumulation_steps": 1,
        }  # fmt: skip
        if self.stage == "repae":
            sets |= {"vae_mixed_precision": self.precision, "perceptual_weights": f"{self.weights}/vgg.pth"}
        values = [f"{section}.{name}={value}" for name, value in sets.items()]
        return load_config(
            "imagenet256-invae", [f"preprocess.resolution={self.resolution}", f"train_repae.vae={self.vae}", *values]
        )


def write_weights(folder: Path, encoder: str) -> None:
    """Random weights of the encoder and of VGG16, where a hub's cannot be had: the time is the same."""
    import timm
    from safetensors.torch import save_file
    from torchvision.models import vgg16

    from repae_core.config.encoders import ENCODERS

    network = timm.create_model(ENCODERS[encoder].architecture, pretrained=False, num_classes=0)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "encoder.safetensors")
    trunk = {k: v for k, v in vgg16(weights=None).state_dict().items() if k.startswith("features.")}
    torch.save(trunk, folder / "vgg.pth")


@dataclass
class Stepper:
    """Takes steps of a case; built once, so that only steps are timed."""

    case: Case
    group: Group
    state: LDMState = field(init=False)
    frozen_bytes: int = field(init=False, default=0)  # of encoders and the perceptual network
    cached: bool = field(init=False)  # latent-only: features come from the cache
    step: Callable[[], dict[str, torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.cached = self.case.cached
        build = self._joint if self.case.stage == "repae" else self._latent_only
        self.state, self.step = build(self.case.config())

    def _joint(self, config: PipelineConfig) -> tuple[LDMState, Callable[[], dict[str, torch.Tensor]]]:
        section, device = config.train_repae, self.group.device
        state = new_joint_state(
            section, config.compat, self.group, seed=0, latent_size=config.latent_size, num_classes=CLASSES
        )
        objective = joint_objective(section, config.compat, device)
        encoders = Encoders(section, grid=config.token_grid("train_repae"), device=device)
        pixels, labels = self._inputs()
        self.frozen_bytes = sum(
            p.nbytes for m in (*encoders.modules, objective.perceptual) if m for p in m.parameters()
        )

        def step() -> dict[str, torch.Tensor]:
            with state.timer("encoder"):
                features = encoders(pixels)
            batch = Batch(labels, features, images=pixels)
            return repae_step(state, batch, objective, new_draws(state, batch, objective))

        return state, step

    def _latent_only(self, config: PipelineConfig) -> tuple[LDMState, Callable[[], dict[str, torch.Tensor]]]:
        section, device, side = config.train_ldm, self.group.device, config.latent_size
        channels = config.train_repae.vae.latent_channels
        torch.manual_seed(0)
        sit = new_sit(section, latent_size=side, latent_channels=channels, num_classes=CLASSES)
        state, objective = new_ldm_state(section, self.group, sit), flow_objective(section)
        encoders = Encoders(section, grid=config.token_grid("train_ldm"), device=device)
        pixels, labels = self._inputs()
        self.frozen_bytes = sum(p.nbytes for m in encoders.modules for p in m.parameters())
        z = torch.randn(len(labels), channels, side, side, device=device)
        cached = encoders(pixels)

        def step() -> dict[str, torch.Tensor]:
            with state.timer("encoder"):
                features = cached if self.cached else encoders(pixels)
            batch = Batch(labels, features, latents=z)
            return ldm_step(state, batch, objective, new_draws(state, batch, objective))

        return state, step

    def _inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        count = self.case.batch // self.group.world_size
        generator = torch.Generator().manual_seed(self.group.rank)
        side, device = self.case.resolution, self.group.device
        pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
        return pixels.to(device), torch.arange(count, device=device)

    def timed_step(self) -> float:
        """Seconds of one step, with an empty queue before and after on a GPU."""
        self._wait()
        began = time.perf_counter()
        self.step()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.group.device.type == "cuda":
            torch.cuda.synchronize()


def measured_peaks(case: Case) -> dict[str, float]:
    """GFLOP/s of a 3x3 convolution 128 -> 128 at the case's resolution and batch, and of a 2048^3 product."""
    device = torch.device(case.device)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    x = torch.randn(case.batch, 128, case.resolution, case.resolution, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(128, 128, 3, padding=1, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        works = {"convolution": (lambda: conv(x), 2 * x.numel() * 128 * 9), "product": (lambda: a @ b, 2 * 2048**3)}
        return {name: flops / _median_seconds(work, device) / 1e9 for name, (work, flops) in works.items()}


def _median_seconds(work: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(9):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def state_bytes(state: LDMState) -> int:
    """Bytes of weights, gradients, optimizer states and averages, which a step needs whatever it keeps besides."""
    total = 0
    for network in state.networks().values():
        trained = sum(p.nbytes for p in network.parameters())
        total += sum(t.nbytes for t in network.module.state_dict().values()) + 3 * trained  # gradient, two moments
    averages = [state.ema, getattr(state, "vae_ema", None)]
    return total + sum(t.nbytes for m in averages if m is not None for t in m.state_dict().values())


class PhaseFlops:
    """Stands in for a state's timer during one step: floating point operations by phase."""

    def __init__(self) -> None:
        self.flops: dict[str, int] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block's operations, forward and backward."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            yield
        self.flops[phase] = self.flops.get(phase, 0) + counter.get_total_flops()
