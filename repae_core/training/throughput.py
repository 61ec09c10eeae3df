"""What a run achieves: images/s, model FLOP/s, the share of what this machine can do, memory.

Model FLOPs are those of the mathematics (a recomputed activation counts once), counted on the meta device: stand-ins
of the networks take one real step on tensors that have shapes but no values, so nothing of the training is touched:
no weight, gradient, statistic or random draw.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from repae_core.losses.perceptual import HalfPrecisionTrunk
from repae_core.models.batch_norm import GlobalBatchNorm2d
from repae_core.models.recompute import RecomputableBlock
from repae_core.models.vae import Upsample
from repae_core.training.distributed import Group
from repae_core.training.draws import Draws
from repae_core.training.optim import Network
from repae_core.training.precision import autocast
from repae_core.training.state import Batch, FlowObjective, JointState, LDMState, Metrics
from repae_core.training.timing import PhaseTimer

logger = logging.getLogger("repae_core")

Step = Callable[..., Metrics]  # (state, batch, objective, draws)

_IMAGES = 2  # of the counted step
_WINDOW_SECONDS = 30.0
_PROBE_SECONDS = 0.5
_LARGEST_PRODUCT = 8192


class ThroughputMeter:
    """Speed over the last half minute and over the run, of all workers together.

    image_flops: model FLOPs of an image at a step (index from 0), 0 = not counted; peak: FLOP/s of all workers, 0 =
    not measured.
    """

    def __init__(
        self, start_step: int, batch_size: int, device: torch.device, image_flops: Callable[[int], float], peak: float
    ) -> None:
        self._batch_size, self._device, self._image_flops, self._peak = batch_size, device, image_flops, peak
        self._flops = 0.0
        self._first = (time.monotonic(), start_step, 0.0)
        self._marks = deque([self._first])

    def mark(self, done: int) -> None:
        """After each step; reads only the clock."""
        now = time.monotonic()
        self._flops += self._image_flops(done - 1) * self._batch_size
        self._marks.append((now, done, self._flops))
        while len(self._marks) > 2 and now - self._marks[1][0] > _WINDOW_SECONDS:
            self._marks.popleft()

    def read(self) -> dict[str, float]:
        """Metrics by name: images_per_second is recent; model_tflops, peak_tflops, share_of_peak only where known."""
        (began, first, flops_before), (now, done, flops) = self._marks[0], self._marks[-1]
        seconds = max(now - began, 1e-9)
        rate = (flops - flops_before) / seconds
        values = {
            "images_per_second": (done - first) * self._batch_size / seconds,
            "images_per_second_run": (done - self._first[1]) * self._batch_size / max(now - self._first[0], 1e-9),
            "memory_gib": peak_memory(self._device) / 2**30,
        }
        if rate:
            values["model_tflops"] = rate / 1e12
        if self._peak:
            values["peak_tflops"] = self._peak / 1e12
        if rate and self._peak:
            values["share_of_peak"] = rate / self._peak
        return values


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: allocated on a GPU, else resident of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")  # ru_maxrss counts what the parent had before this program was started
    _, _, own = status.read_text().partition("VmHWM:") if status.exists() else ("", "", "")
    if own:
        return int(own.split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matmul_peak(device: torch.device, mixed_precision: str) -> float:
    """FLOP/s of the fastest square matrix product found within about a second, in the type that training multiplies in.

    Doubles the size until a product takes long enough to be timed well; draws no random numbers.
    """
    size, best, began = 512, 0.0, time.perf_counter()
    with torch.no_grad(), autocast(device, mixed_precision):
        while True:
            a = torch.linspace(-1, 1, size * size, device=device).reshape(size, size)
            a @ a  # the first one chooses a kernel
            _wait(device)
            start = time.perf_counter()
            a @ a
            _wait(device)
            now = time.perf_counter()
            best = max(best, 2 * size**3 / (now - start))
            if now - began > _PROBE_SECONDS:
                return best
            # The next size takes eight times as long, twice.
            if 16 * (now - start) < _PROBE_SECONDS - (now - began) and size < _LARGEST_PRODUCT:
                size *= 2


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def image_flops(
    step: Step, state: LDMState, objective: FlowObjective, encoders: Sequence[nn.Module] = (), *, image_side: int
) -> float:
    """Model FLOPs of an image in `step` (forward and backward of every network in it) and in the frozen encoders.

    image_side: pixels. 0 with a warning where something cannot be run on shapes alone.
    """
    try:
        with FlopCounterMode(display=False) as counter:
            batch = _shapes_of_a_batch(state, image_side)
            for encoder in encoders:
                stand_in(encoder)(batch.images)
            step(_stand_in_state(state), batch, _stand_in_objective(objective), _shapes_of_draws(state))
    except Exception as error:
        logger.warning("model FLOPs are not counted: %s", " ".join(str(error).split())[:200])
        return 0.0
    return counter.get_total_flops() / _IMAGES


def stand_in(module: nn.Module) -> Any:
    """A copy of a network on the meta device: shapes without values, so it costs no memory.

    Batch norms over all workers are left out (they would wait for the others, and normalising counts nothing),
    nothing is computed twice, weights are fp32 (there is no autocast on the meta device), and layers that are computed
    in another way count as they are defined.
    """
    tensors: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, dtype=torch.float32, device="meta"), p.requires_grad)
        for p in module.parameters()
    }
    tensors |= {id(b): b.to("meta") for b in module.buffers()}
    twin = copy.deepcopy(module, tensors)
    for parent in list(twin.modules()):
        if isinstance(parent, RecomputableBlock):
            parent.recompute = False
        elif isinstance(parent, Upsample):
            parent.as_defined = True
        for name, child in list(parent.named_children()):
            if isinstance(child, GlobalBatchNorm2d):
                setattr(parent, name, nn.Identity())
            elif isinstance(child, HalfPrecisionTrunk):
                setattr(parent, name, child.trunk)
    return twin


class _StandInNetwork:
    """A `Network` whose passes are counted and which takes no step."""

    def __init__(self, module: nn.Module) -> None:
        self.module = self.forward = stand_in(module)

    def gradients(self, *, reduce: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, max_grad_norm: float, rate_factor: float = 1.0) -> Tensor:
        return torch.zeros((), device="meta")


class _Alone(Group):
    """A group of one that finds every number finite: shapes have none."""

    rank, world_size = 0, 1

    def all_true(self, flags: Tensor) -> Tensor:
        return torch.ones(flags.shape, dtype=torch.bool)


def _stand_in_state(state: LDMState) -> LDMState:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    twins: dict[str, Any] = {name: stand_in(value) for name, value in fields.items() if isinstance(value, nn.Module)}
    twins |= {name: _StandInNetwork(value.module) for name, value in fields.items() if isinstance(value, Network)}
    if isinstance(state, JointState):
        twins["lecam"] = None  # arithmetic on scalars
    return dataclasses.replace(state, group=_Alone(state.group.accelerator), timer=PhaseTimer(), **twins)


def _stand_in_objective(objective: FlowObjective) -> FlowObjective:
    """The same losses of one micro-batch, without autocast, on the meta device."""
    fields = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    changes: dict[str, Any] = {name: "no" for name in fields if name.endswith("mixed_precision")}
    changes |= {name: stand_in(value) for name, value in fields.items() if isinstance(value, nn.Module)}
    return dataclasses.replace(objective, accumulation_steps=1, **changes)


def _shapes_of_a_batch(state: LDMState, image_side: int) -> Batch:
    sit = state.sit.module
    return Batch(
        labels=torch.zeros(_IMAGES, dtype=torch.int64, device="meta"),
        features=[_shape(sit.num_tokens, width) for width in sit.spec["z_dims"]],
        images=_shape(3, image_side, image_side).to(torch.uint8),
        latents=_shape(sit.in_channels, sit.input_size, sit.input_size),
    )


def _shapes_of_draws(state: LDMState) -> Draws:
    sit = state.sit.module
    noise = _shape(sit.in_channels, sit.input_size, sit.input_size)
    return Draws(noise, _shape(), noise, _shape().bool())


def _shape(*shape: int) -> Tensor:
    return torch.empty(_IMAGES, *shape, device="meta")
