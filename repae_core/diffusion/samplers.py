"""ODE and SDE samplers with guidance (system.md section 5)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from repae_core.diffusion.interpolant import Interpolant

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x [B,C,H,W], t [B], y [B]) -> [B,C,H,W]
StepCallback = Callable[[int, int], None]  # (steps done, all steps)

SDE_LAST_TIME = 0.04  # the SDE's last step goes from here to 0


@torch.no_grad()
def ode_sample(
    velocity: Velocity,
    noise: Tensor,
    y: Tensor,
    *,
    steps: int,
    heun: bool = False,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    null_class: int,
    guide: Velocity | None = None,
    progress: StepCallback | None = None,
) -> Tensor:
    """Integrate dx/dt = v from t=1 (noise) to 0 on linspace(1, 0, steps+1); float64 [B,C,H,W].

    heun: trapezoidal corrector, skipped on the last step; it is guided as its predictor was.
    guidance: v_u + g (v_c - v_u) where interval[0] <= t <= interval[1], t being the start of the step; elsewhere, and
    at g = 1, only v_c is computed; at g = 0 only v_u (or the guide).
    guide: a second model in place of the unconditional half (autoguidance).
    """
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    guided = _Guided(velocity, y, noise.dtype, guidance, interval, null_class, guide)
    x = noise.double()
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        dt = t_next - t
        v = guided(x, t, t)
        x_next = x + dt * v
        if heun and i < steps - 1:
            x_next = x + dt * (0.5 * v + 0.5 * guided(x_next, t_next, t))
        x = x_next
        if progress:
            progress(i + 1, steps)
    return x


@torch.no_grad()
def sde_sample(
    velocity: Velocity,
    noise: Tensor,
    y: Tensor,
    *,
    steps: int,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    null_class: int,
    path: str = "linear",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    guide: Velocity | None = None,
    progress: StepCallback | None = None,
) -> Tensor:
    """Euler-Maruyama with w(t) = 2t on linspace(1, 0.04, steps), then 0: exactly `steps` model calls; float64.

    Drift v - w score/2, guided as in `ode_sample`; one float64 draw a step before the model call, none in the
    last step. generator: one, or one an image.
    """
    interpolant = Interpolant(path)
    times = torch.linspace(1, SDE_LAST_TIME, steps, dtype=torch.float64)
    times = torch.cat([times, torch.zeros(1, dtype=torch.float64)])

    def drift(v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return v - 0.5 * diffusion(t) * interpolant.score(v, x, t)

    guided = _Guided(velocity, y, noise.dtype, guidance, interval, null_class, guide, drift)
    x = noise.double()
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        dt, last = t_next - t, i == steps - 1
        eps = None if last else _draw(x, generator)
        x = x + dt * guided(x, t, t)
        if eps is not None:
            x = x + torch.sqrt(diffusion(t) * dt.abs()) * eps
        if progress:
            progress(i + 1, steps)
    return x


def diffusion(t: Tensor) -> Tensor:
    """w(t) = 2t, for both paths."""
    return 2 * t


class _Guided:
    """The guided drift (or velocity): the second half is computed only where guidance is on."""

    def __init__(
        self,
        velocity: Velocity,
        y: Tensor,
        dtype: torch.dtype,
        guidance: float,
        interval: tuple[float, float],
        null_class: int,
        guide: Velocity | None,
        drift: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda v, x, t: v,
    ) -> None:
        self.velocity, self.guide, self.drift = velocity, guide, drift
        self.y, self.null = y, torch.full_like(y, null_class)
        self.dtype, self.guidance, self.interval = dtype, guidance, interval

    def __call__(self, x: Tensor, t: Tensor, t_cur: Tensor) -> Tensor:
        """Drift at (x, t); whether it is guided depends on `t_cur`, the start of the step."""
        n = len(x)
        low, high = self.interval
        on = self.guidance != 1.0 and low <= float(t_cur) <= high
        if not on:
            return self.drift(self._call(self.velocity, x, t, self.y), x, t)
        if self.guidance == 0.0:  # nothing of the conditional half is left
            weaker = self._call(self.guide, x, t, self.y) if self.guide else self._call(self.velocity, x, t, self.null)
            return self.drift(weaker, x, t)
        if self.guide is not None:
            v_c, v_u = self._call(self.velocity, x, t, self.y), self._call(self.guide, x, t, self.y)
        else:
            both = self._call(self.velocity, torch.cat([x, x]), t, torch.cat([self.y, self.null]))
            v_c, v_u = both[:n], both[n:]
        d_c, d_u = self.drift(v_c, x, t), self.drift(v_u, x, t)
        return d_u + self.guidance * (d_c - d_u)

    def _call(self, model: Velocity, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        times = torch.full((len(x),), float(t), dtype=self.dtype, device=x.device)
        return model(x.to(self.dtype), times, y).double()


def _draw(x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    if isinstance(generator, Sequence):
        rows = [torch.randn(x.shape[1:], generator=g, dtype=torch.float64) for g in generator]
        return torch.stack(rows).to(x.device)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
