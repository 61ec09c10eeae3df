"""The sampler against the bare forward passes it needs: SiT-B/2 on 32x32x4 latents, same batch.

    python benchmarks/generate.py                       # guided Euler, Heun and SDE, batch 4
    python benchmarks/generate.py --batch 64 --steps 50 --device cuda --mixed-precision bf16

Rounds of sampling and of bare passes (`sit(x, t, y)` in a loop, as many and as large as the sampler makes) alternate
in one run; the ratio is of the medians (bare time / sampling time: 1 = the sampler costs nothing). Noise and the SDE's
draws are included; the decoder, which runs once an image, is timed apart. On the CPU it is CPU time, which other
programs on the machine disturb less; a GPU's is the clock's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

from flows.environment import unset_threads_and_memory

os.environ.update(unset_threads_and_memory())

import torch

from repae_core.generation import Generator, SamplerSettings
from repae_core.models import build_sit, build_vae

CLASSES = 1000


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of one call: on a GPU the clock's, with an empty queue before and after; on the CPU this process's."""
    if device.type != "cuda":
        before = time.process_time()
        work()
        return time.process_time() - before
    torch.cuda.synchronize()
    before = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - before


def counted_calls(generator: Generator, y: torch.Tensor) -> list[int]:
    """Batch size of every pass of SiT that sampling `y` makes."""
    sizes: list[int] = []
    hook = generator.sit.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    generator.sample_latents(y, seed=0, first=0)
    hook.remove()
    return sizes


@torch.no_grad()
def bare_passes(generator: Generator, sizes: list[int], device: torch.device) -> None:
    """The same passes and nothing else."""
    settings, sit = generator.settings, generator.sit
    inputs = {
        size: (
            torch.randn(size, sit.in_channels, sit.input_size, sit.input_size, device=device),
            torch.full((size,), 0.5, device=device),
            torch.zeros(size, dtype=torch.int64, device=device),
        )
        for size in set(sizes)
    }
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.mixed_precision == "bf16"):
        for size in sizes:
            sit(*inputs[size])


def main() -> None:
    """Print a line a sampler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-B/2")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    sit = build_sit(options.model, input_size=32, in_channels=4, num_classes=CLASSES, z_dims=(768,), encoder_depth=8)
    vae = build_vae("f8d4")
    y = torch.arange(options.batch, device=device) % CLASSES
    print(f"{options.model}, batch {options.batch}, {options.steps} steps, guidance {options.guidance:g}, {device}")
    for sampler in ("ode", "heun", "sde"):
        settings = SamplerSettings(
            sampler, options.steps, options.guidance, (0.0, 0.7), mixed_precision=options.mixed_precision
        )
        generator = Generator(sit, vae, settings).to(device)
        sizes = counted_calls(generator, y)
        ours, bare = [], []
        for _ in range(options.rounds):
            ours.append(seconds(lambda g=generator: g.sample_latents(y, seed=0, first=0), device))  # type: ignore[misc]
            bare.append(seconds(lambda g=generator, s=sizes: bare_passes(g, s, device), device))  # type: ignore[misc]
        ratio = statistics.median(bare) / statistics.median(ours)
        rounds = " ".join(f"{b / o:.3f}" for b, o in zip(bare, ours, strict=True))
        print(f"  {sampler:5} {len(sizes)} passes of {sum(sizes)} rows: {statistics.median(ours):.2f} s, "
              f"ratio {ratio:.3f} (each round: {rounds})", flush=True)  # fmt: skip
    latents = torch.randn(options.batch, 4, 32, 32, device=device)
    print(f"  decoder, once a batch: {seconds(lambda: generator.decode(latents), device):.2f} s")


if __name__ == "__main__":
    main()
