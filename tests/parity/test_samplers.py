"""Samplers and score against the published implementation on a toy field (samplers.*)."""

import pytest
import torch
from parity.fill import scalars, tensors

from repae_core.diffusion import Interpolant, ode_sample, sde_sample
from repae_core.diffusion.samplers import diffusion

T, J = tensors("samplers"), scalars("samplers")
CASES = [k for k in T if k.split(".")[0] in ("f32", "f64")]
NULL = 1000


class ToyField:
    """v = a t x - b tanh(x) + c sin(w y), in x's dtype; notes its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        a, b, c, w = J["toy_coefficients"]
        self.calls.append([len(x), float(t[0])])
        offset = (c * torch.sin(w * y.double())).to(x.dtype).reshape(-1, 1, 1, 1)
        return a * t.reshape(-1, 1, 1, 1) * x - b * torch.tanh(x) + offset


@pytest.mark.parametrize("case", CASES)
def test_end_point_and_calls(case):
    dtype, sampler, guidance, interval, path = case.replace("cfg1.0", "cfg1_0").replace("cfg2.5", "cfg2_5").split(".")
    noise = T["in.latents"].to({"f32": torch.float32, "f64": torch.float64}[dtype])
    field, y = ToyField(), torch.tensor(J["y"])
    common = {
        "guidance": float(guidance.removeprefix("cfg").replace("_", ".")),
        "interval": (J["guidance_low"], J["guidance_high"]) if interval == "interval" else (0.0, 1.0),
        "null_class": NULL,
    }
    if sampler == "sde":
        generator = torch.Generator().manual_seed(J["torch_manual_seed"])
        out = sde_sample(field, noise, y, steps=J["sde_steps"], path=path, generator=generator, **common)
    else:
        steps = J["heun_steps"] if sampler == "heun" else J["ode_steps"]
        out = ode_sample(field, noise, y, steps=steps, heun=sampler == "heun", **common)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, T[case], atol=1e-10 if dtype == "f64" else 1e-5, rtol=0)
    if case in J["calls"]:
        assert [n for n, _ in field.calls] == [n for n, _ in J["calls"][case]]
        assert [t for _, t in field.calls] == pytest.approx([t for _, t in J["calls"][case]], abs=1e-6)


@pytest.mark.parametrize("sample", [ode_sample, sde_sample])
def test_the_state_is_double_from_the_start(sample):
    """Digits of float64 noise that float32 does not hold arrive at the end."""
    ends = []
    for start in (T["in.latents"].double() + 1e-9, T["in.latents"].double()):
        draws = {"generator": torch.Generator().manual_seed(0)} if sample is sde_sample else {}
        ends.append(sample(ToyField(), start, torch.tensor(J["y"]), steps=4, null_class=NULL, **draws))
    difference = (ends[0] - ends[1]).abs()
    assert difference.min() > 1e-11
    assert difference.max() < 1e-7


def test_sde_draws():
    """One float64 draw a step but the last, in order."""
    generator = torch.Generator().manual_seed(J["torch_manual_seed"])
    assert len(T["sde_noise_draws"]) == J["rng_draws_per_sde_run"] == J["sde_steps"] - 1
    for draw in T["sde_noise_draws"]:
        assert torch.equal(torch.randn(draw.shape, generator=generator, dtype=torch.float64), draw)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_score(path, dtype, tolerance):
    v, x, t = (T[f"score.in.{name}"].to(dtype) for name in "vxt")
    expected = T[f"score.{'f64' if dtype == torch.float64 else 'f32'}.{path}"]
    torch.testing.assert_close(Interpolant(path).score(v, x, t), expected, atol=tolerance, rtol=tolerance)


def test_diffusion():
    for t, w in J["diffusion_at_t"].items():
        assert float(diffusion(torch.tensor(float(t), dtype=torch.float64))) == pytest.approx(w, abs=1e-12)
