"""The samplers against their formulas written out, at step numbers and guidance intervals that the data do not hold."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from repae_core.diffusion import ode_sample, sde_sample

NULL, LABELS = 9, torch.tensor([1, 7])
INTERVALS = [(1.0, (0.0, 1.0)), (2.7, (0.0, 0.73)), (0.0, (0.3, 0.3)), (1.8, (0.5, 0.825)), (3.1, (0.04, 0.04))]


def field(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    assert x.dtype == t.dtype
    t, y = t.view(-1, 1, 1, 1), y.view(-1, 1, 1, 1).to(x.dtype)
    return torch.sin(3 * x) * t + 0.3 * x + 0.01 * y


def drift(x: Tensor, t: float, y: Tensor, dtype: torch.dtype, path: str | None) -> Tensor:
    """The velocity; with a path, the reverse SDE's drift v - t score, the score as minus noise over s."""
    v = field(x.to(dtype), torch.full((len(x),), t, dtype=dtype), y).double()
    if path is None:
        return v
    a, s, da, ds = 1 - t, t, -1.0, 1.0
    if path == "cosine":
        a, s = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
        da, ds = -math.pi / 2 * s, math.pi / 2 * a
    noise = (a * v - da * x) / (a * ds - da * s)  # x = a z + s n and v = a' z + s' n, solved for n
    return v + t * noise / s


def written_out(noise: Tensor, times: list[float], g: float, interval: tuple[float, float], path, heun, seed):
    x, generator, steps = noise.double(), torch.Generator().manual_seed(seed), len(times) - 1
    for i, (t, after) in enumerate(itertools.pairwise(times)):
        guided = interval[0] <= t <= interval[1]

        def rate(x: Tensor, at: float, guided: bool = guided) -> Tensor:
            conditional = drift(x, at, LABELS, noise.dtype, path)
            if not guided:
                return conditional
            free = drift(x, at, torch.full_like(LABELS, NULL), noise.dtype, path)
            return free + g * (conditional - free)

        last, dt = i == steps - 1, after - t
        eps = torch.randn(x.shape, dtype=torch.float64, generator=generator) if path and not last else 0.0
        first = rate(x, t)
        if heun and not last:
            first = (first + rate(x + dt * first, after)) / 2
        x = x + dt * first + math.sqrt(2 * t * abs(dt)) * eps
    return x


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("guidance", "interval"), INTERVALS)
def test_samplers(dtype: torch.dtype, tolerance: float, guidance: float, interval: tuple[float, float]) -> None:
    noise = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    common = {"guidance": guidance, "interval": interval, "null_class": NULL}
    for steps, heun in ((7, False), (9, True)):
        times = [1 - i / steps for i in range(steps)] + [0.0]
        expected = written_out(noise, times, guidance, interval, None, heun, 0)
        found = ode_sample(field, noise, LABELS, steps=steps, heun=heun, **common)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    for path in ("linear", "cosine"):
        times = [*torch.linspace(1, 0.04, 13, dtype=torch.float64).tolist(), 0.0]
        expected = written_out(noise, times, guidance, interval, path, False, 5)
        generator = torch.Generator().manual_seed(5)
        found = sde_sample(field, noise, LABELS, steps=13, path=path, generator=generator, **common)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
