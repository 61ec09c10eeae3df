"""Milliseconds a training step by phase, peak memory and share of this machine's measured peak; ratios from one run.

    python benchmarks/step.py                                  # SiT-B/2, f8d4, 128 px, batch 4: about 18 minutes
    python benchmarks/step.py --quick                          # small sizes, minutes: does it run?
    python benchmarks/step.py --device cuda --model SiT-XL/2 --resolution 256 --batch 32
    python benchmarks/step.py --only ldm --steps 20

Each case runs in a process of its own, which measures the peaks before and after its steps; figures are medians.
The joint step's bf16 over fp32 and the latent-only step's cached over computed features are of steps that take turns,
in processes of their own (one and six): minutes apart, other load on the machine counts for more. Weights are random,
of the real sizes. For scale: the published implementation was measured at 19.0 s a joint step (VAE and its losses
17.4, SiT 1.3, encoder 0.32, discriminator 0.22, EMA 0.036; 7.8 GB) and 1.70 s a latent-only step on a 2-core machine
with peaks of 145-200 GFLOP/s in fp32 and 360-450 in bf16; compare only on a machine with such peaks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from engine import Case, PhaseFlops, Stepper, measured_peaks, state_bytes, write_weights

from repae_core.models.vae import Upsample

PHASES = ("encoder", "vae", "discriminator", "sit", "ema")
TURNS = {"repae": 1, "ldm": 6}  # processes a comparison: each lays its heap out anew, worth 2 % of a latent-only ratio
SETTLING = 8  # short steps before the first timed one: the heap takes as many to find its shape
QUICK = {"model": "SiT-S/2", "vae": "{base_channels: 32, norm_groups: 8}", "resolution": 64, "encoder": "dinov2-vit-b"}


def cases(base: Case) -> dict[str, Case]:
    """What is compared, by name."""
    ldm = dataclasses.replace(base, stage="ldm")
    every = [
        base,
        dataclasses.replace(base, kept_memory=False),
        dataclasses.replace(base, precision="bf16"),
        dataclasses.replace(base, recompute=True),
        ldm,
        dataclasses.replace(ldm, cached=True),
        dataclasses.replace(ldm, precision="bf16"),
        dataclasses.replace(ldm, cached=True, precision="bf16"),
    ]
    return {case.name: case for case in every}


def measure(case: Case, steps: int) -> dict[str, Any]:
    """In the case's own process: median seconds of a step and its phases, memory, peaks, operations, losses."""
    import torch

    from repae_core.training.throughput import peak_memory

    with _memory(case):
        before = _resident_bytes(case)
        peaks = [measured_peaks(case)]
        stepper, metrics = settled(case)
        timer = stepper.state.timer
        taken = [(stepper.timed_step(), timer.take()) for _ in range(steps)]
        memory = peak_memory(torch.device(case.device))
        peaks.append(measured_peaks(case))
        executed, defined = count_flops(stepper)  # last: counting takes memory
    return {
        "step": statistics.median(seconds for seconds, _ in taken),
        "phases": {p: statistics.median(t.get(p, 0.0) for _, t in taken) for p in PHASES},
        "flops": defined,
        "executed": executed,
        "memory": memory,
        "activations": memory - before - state_bytes(stepper.state) - stepper.frozen_bytes,
        "peaks": {name: statistics.mean(each[name] for each in peaks) for name in peaks[0]},
        "losses": {name: float(value) for name, value in metrics.items() if "loss" in name},
    }


def settled(case: Case) -> tuple[Stepper, dict[str, Any]]:
    """A stepper after its untimed steps, and the metrics of its first."""
    import torch

    from repae_core.training.distributed import open_group

    torch.set_num_threads(case.threads)
    stepper = Stepper(case, open_group(use_gpu=case.device != "cpu"))
    metrics = stepper.step()
    for _ in range(1 if case.stage == "repae" else SETTLING):
        stepper.timed_step()
    stepper.state.timer.take()
    return stepper, metrics


def count_flops(stepper: Stepper) -> tuple[dict[str, int], dict[str, int]]:
    """Operations of a step by phase, as computed, and as the models are defined."""
    timer, executed, defined = stepper.state.timer, PhaseFlops(), PhaseFlops()
    stepper.state.timer = executed  # type: ignore[assignment]
    stepper.step()
    stepper.state.timer = defined  # type: ignore[assignment]
    with mock.patch.object(Upsample, "as_defined", True):
        stepper.step()
    stepper.state.timer = timer
    return executed.flops, defined.flops


def in_turns(case: Case, steps: int) -> float:
    """In a process of its own: a stage's ratio of two kinds of steps that take turns."""
    return half_over_single(case, steps) if case.stage == "repae" else cached_over_computed(case, 2 * steps)


def cached_over_computed(case: Case, rounds: int) -> float:
    """Time of steps with cached features over those that compute them; the median round.

    They take turns: a machine that is slower for a minute slows both steps of its rounds. The first step of a turn is
    not timed: the encoder's weights have driven SiT's out of the processor's cache.
    """
    with _memory(case):
        stepper, _ = settled(case)
        return statistics.median(_turn(stepper, True) / _turn(stepper, False) for _ in range(rounds))


def half_over_single(case: Case, rounds: int) -> float:
    """Time of bf16 steps over those in fp32; the median round."""
    with _memory(case):
        single, half = (settled(dataclasses.replace(case, precision=of))[0] for of in ("no", "bf16"))
        return statistics.median(half.timed_step() / single.timed_step() for _ in range(rounds))


def _turn(stepper: Stepper, cached: bool) -> float:
    stepper.cached = cached
    stepper.step()
    return stepper.timed_step() + stepper.timed_step()


def _memory(case: Case) -> contextlib.AbstractContextManager[None]:
    from repae_core.training.host_memory import freed_memory_kept

    return freed_memory_kept() if case.kept_memory and case.device == "cpu" else contextlib.nullcontext()


def environment(case: Case) -> dict[str, str]:
    """Of the case's process: huge pages only with the kept memory, as the stages have them."""
    return {k: v for k, v in os.environ.items() if case.kept_memory or k != "GLIBC_TUNABLES"}


def _resident_bytes(case: Case) -> int:
    return psutil.Process().memory_info().rss if case.device == "cpu" else 0


def in_a_process(case: Case, steps: int, *options: str) -> Any:
    """What the case's process prints last."""
    chosen = ["--steps", str(steps), "--case", json.dumps(dataclasses.asdict(case)), *options]
    done = subprocess.run(
        [sys.executable, __file__, *chosen], stdout=subprocess.PIPE, text=True, check=True, env=environment(case)
    )
    return json.loads(done.stdout.splitlines()[-1])


def show(case: Case, got: dict[str, Any]) -> None:
    """A line a case."""
    peaks = got["peaks"]
    phases = "  ".join(f"{p} {got['phases'][p] * 1000:.0f}" for p in PHASES if got["phases"][p])
    rate = sum(got["flops"].values()) / got["step"] / 1e9
    print(f"{case.name:28} {got['step'] * 1000:6.0f} ms ({phases})", flush=True)
    print(f"{'':28} {got['memory'] / 2**30:.2f} GiB, {got['activations'] / 2**30:.2f} neither weights nor optimizers; "
          f"{rate:.0f} GFLOP/s of {peaks['convolution']:.0f} (convolution), {peaks['product']:.0f} (product)",
          flush=True)  # fmt: skip


def ratios(got: dict[str, dict[str, Any]], turns: dict[str, list[float]]) -> list[str]:
    """The comparisons, as lines; turns: by stage what each process of `in_turns` found."""
    lines = []
    if plain := got.get("repae"):
        vae, executed = (
            plain[of]["vae"] / plain["phases"]["vae"] / 1e9 / plain["peaks"]["convolution"]
            for of in ("flops", "executed")
        )
        lines.append(f"VAE phase / convolution peak                 {vae:.2f}   (the model's FLOPs as the paper's code "
                     f"computes them; of those computed here {executed:.2f})")  # fmt: skip
        half, system, recompute = (got[f"repae {k}"] for k in ("bf16", "system allocator", "recompute"))
        of_peaks = plain["peaks"]["convolution"] / half["peaks"]["convolution"]
        lines += [
            f"joint step, bf16 / fp32                      {statistics.median(turns['repae']):.3f}  "
            f"(steps in turn; of the cases above {half['step'] / plain['step']:.3f}; the machine's convolution peaks: "
            f"{of_peaks:.2f})",
            f"joint step, kept / system allocator          {plain['step'] / system['step']:.2f}   "
            f"memory {plain['memory'] / system['memory']:.2f}",
            f"joint step, recomputed / kept activations    {recompute['step'] / plain['step']:.2f}   "
            f"memory {recompute['activations'] / plain['activations']:.2f}, with weights and optimizers "
            f"{recompute['memory'] / plain['memory']:.2f}",
        ]
    if plain := got.get("ldm"):
        cached, half = got["ldm cached features"], got["ldm bf16"]
        half_cached = got["ldm bf16 cached features"]
        low, *_, high = sorted(turns["ldm"])
        lines.append(f"latent-only step, cached / computed features {statistics.median(turns['ldm']):.2f}   "
                     f"(steps in turn; {len(turns['ldm'])} processes: {low:.3f} to {high:.3f})")  # fmt: skip
        lines.append(f"latent-only step, bf16 / fp32                {half['step'] / plain['step']:.2f}")
        lines.append(f"  the same with cached features              {half_cached['step'] / cached['step']:.2f}")
    return lines


def main() -> None:
    """Run the cases one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-B/2")
    parser.add_argument("--vae", default="f8d4", help="architecture: f8d4, f16d32")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="timed steps a case, after untimed ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=("repae", "ldm"))
    parser.add_argument("--compile", action="store_true", help="every case with torch.compile")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        case = Case(**json.loads(chosen.case))
        print(json.dumps((in_turns if chosen.turns else measure)(case, chosen.steps)))
        return
    sizes = {
        name: getattr(chosen, name) for name in ("model", "vae", "resolution", "batch", "threads", "device", "compile")
    }
    got = {}
    with tempfile.TemporaryDirectory(prefix="repae-bench-") as scratch:
        base = Case(**(sizes | (QUICK if chosen.quick else {})), weights=scratch)
        write_weights(Path(scratch), base.encoder)
        print(
            f"{base.model}, {base.vae}, {base.resolution} px, batch {base.batch}, {base.threads} threads, {base.device}"
        )
        for case in cases(base).values():
            if chosen.only in (None, case.stage):
                got[case.name.replace(" compile", "")] = result = in_a_process(case, chosen.steps)
                show(case, result)
        turns = {
            stage: [
                in_a_process(dataclasses.replace(base, stage=stage), chosen.steps, "--turns")
                for _ in range(TURNS[stage])
            ]
            for stage in TURNS
            if stage in got
        }
    print("\n".join(["", *ratios(got, turns)]))
    if "repae" in got:
        print("losses of the first step, fp32 and bf16:")
        for name, value in got["repae"]["losses"].items():
            print(f"  {name:16} {value:9.5f} {got['repae bf16']['losses'][name]:9.5f}")


if __name__ == "__main__":
    main()
