"""Interpolants, samplers and draws where the parity data does not look."""

import functools
import math

import pytest
import torch

from repae_core.diffusion import Interpolant, item_generators, ode_sample, randn, sde_sample

Y = torch.tensor([0, 1])


class Counted:
    """A velocity that notes (batch, t, labels) of its calls."""

    def __init__(self, value=0.0):
        self.value, self.calls = value, []

    def __call__(self, x, t, y):
        self.calls.append((len(x), float(t[0]), y.tolist()))
        return torch.full_like(x, self.value) * (1 + y.reshape(-1, 1, 1, 1))


def gaussian_velocity(x, t, y):
    """The exact velocity, on the linear path, for latents from N(0, 4)."""
    t = t.reshape(-1, 1, 1, 1)
    return (t - 4 * (1 - t)) / (4 * (1 - t) ** 2 + t**2) * x


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_ends_of_the_path(path):
    z, n = normal(2, 2, 3, 1, 1)
    interpolate = Interpolant(path).interpolate
    torch.testing.assert_close(interpolate(z, n, torch.zeros(2).double())[0], z)
    torch.testing.assert_close(interpolate(z, n, torch.ones(2).double())[0], n)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_target_is_the_derivative_of_the_path(path):
    interpolant, h = Interpolant(path), 1e-6
    z, n = normal(2, 2, 3, 1, 1)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    (low, _), (high, _) = (interpolant.interpolate(z, n, t + d) for d in (-h, h))
    torch.testing.assert_close(interpolant.interpolate(z, n, t)[1], (high - low) / (2 * h), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_score_of_a_standard_normal(path):
    """Latents from N(0,1): x_t ~ N(0, a^2+s^2), score -x/(a^2+s^2), and E[v|x] is known too."""
    interpolant, x = Interpolant(path), normal(5, 1, 1, 1)
    t = torch.tensor(0.6, dtype=torch.float64)
    a, s, da, ds = interpolant.coefficients(t)
    v = (da * a + ds * s) / (a * a + s * s) * x
    torch.testing.assert_close(interpolant.score(v, x, t), -x / (a * a + s * s))


def test_the_ode_turns_noise_into_the_gaussian():
    noise = normal(2, 1, 2, 2)
    out = ode_sample(gaussian_velocity, noise, Y, steps=400, heun=True, null_class=9)
    torch.testing.assert_close(out, 2 * noise, rtol=1e-3, atol=1e-4)


def test_the_sde_samples_the_gaussian():
    y = torch.zeros(4000, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    out = sde_sample(gaussian_velocity, normal(4000, 1, 1, 1), y, steps=200, null_class=9, generator=generator)
    assert float(out.std()) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("heun", "calls"), [(False, 5), (True, 9)])
def test_model_calls_of_the_ode(heun, calls):
    model, seen = Counted(), []
    start = torch.zeros(2, 1, 2, 2)
    ode_sample(model, start, Y, steps=5, heun=heun, null_class=9, progress=lambda *s: seen.append(s))
    assert len(model.calls) == calls
    assert all(n == 2 for n, _, _ in model.calls), "no guidance, no second half"
    assert seen == [(i, 5) for i in range(1, 6)]


def test_model_calls_of_the_sde():
    model = Counted()
    out = sde_sample(model, torch.zeros(2, 1, 2, 2), Y, steps=7, null_class=9)
    assert len(model.calls) == 7
    assert model.calls[0][1] == 1
    assert model.calls[-1][1] == pytest.approx(0.04)
    assert out.dtype == torch.float64


def test_guidance_only_inside_its_interval():
    model = Counted()
    ode_sample(model, torch.zeros(2, 1, 2, 2), Y, steps=4, guidance=2.0, interval=(0.4, 0.8), null_class=9)
    assert [(n, t) for n, t, _ in model.calls] == [(2, 1.0), (4, 0.75), (4, 0.5), (2, 0.25)]
    assert model.calls[1][2] == [0, 1, 9, 9]


def test_guidance_moves_away_from_the_guide():
    """v_c = 1*(1+y), guide = 0.5*(1+y), g = 3: 0.5 + 3*0.5 = 2, times 1+y, over time -1."""
    weak = Counted(0.5)
    out = ode_sample(Counted(1.0), torch.zeros(2, 1, 1, 1), Y, steps=3, guidance=3.0, null_class=9, guide=weak)
    torch.testing.assert_close(out.flatten(), torch.tensor([-2.0, -4.0], dtype=torch.float64))


def test_draws_belong_to_the_image():
    together = randn((3,), item_generators(7, "noise", [4, 5]))
    alone = randn((3,), item_generators(7, "noise", [5]))
    assert torch.equal(together[1:], alone)
    assert not torch.equal(alone, randn((3,), item_generators(7, "labels", [5])))
    assert not torch.equal(alone, randn((3,), item_generators(8, "noise", [5])))


def test_sde_noise_belongs_to_the_image():
    def sample(positions):
        generators = item_generators(0, "sde", positions)
        noise = randn((1, 2, 2), item_generators(0, "noise", positions))
        y = torch.zeros(len(positions), dtype=torch.long)
        return sde_sample(Counted(0.3), noise, y, steps=5, null_class=9, generator=generators)

    torch.testing.assert_close(sample([0, 1, 2])[2:], sample([2]))


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_training_times(path):
    g = torch.Generator().manual_seed(0)
    uniform = Interpolant(path).sample_time(20000, generator=g)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    lognormal = Interpolant(path).sample_time(20000, "lognormal", generator=g)
    assert ((lognormal > 0) & (lognormal < 1)).all()
    assert float(lognormal.median()) == pytest.approx(0.5, abs=0.01)
    sigma = {"linear": lognormal / (1 - lognormal), "cosine": torch.tan(lognormal * math.pi / 2)}[path]
    assert float(sigma.log().std()) == pytest.approx(1, abs=0.02)


def test_unknown_names():
    with pytest.raises(ValueError, match="path='straight'; known: linear, cosine"):
        Interpolant("straight")
    with pytest.raises(ValueError, match="weighting='logit'; known: uniform, lognormal"):
        Interpolant().sample_time(2, "logit")


def calls_of(sampler, *, guide=None, **settings):
    """(rows, time) of every call of the model."""
    model = Counted()
    sampler(model, torch.zeros(2, 1, 2, 2), Y, null_class=9, guide=guide, **settings)
    return [(rows, round(t, 6)) for rows, t, _ in model.calls]


HEUN = functools.partial(ode_sample, heun=True)


@pytest.mark.parametrize(("sampler", "calls"), [(ode_sample, 4), (HEUN, 7), (sde_sample, 4)])
def test_no_more_calls_than_steps(sampler, calls):
    """Heun's corrector is skipped on the last step; the SDE's last step, 0.04 -> 0, is one call."""
    assert [rows for rows, _ in calls_of(sampler, steps=4)] == [2] * calls
    assert [rows for rows, _ in calls_of(sampler, steps=4, guidance=3.0)] == [4] * calls
    assert [rows for rows, _ in calls_of(sampler, steps=4, guidance=0.0)] == [2] * calls
    assert [rows for rows, _ in calls_of(sampler, steps=4, guidance=3.0, interval=(0.1, 0.2))] == [2] * calls
    assert calls_of(sampler, steps=4)[-1][1] == {ode_sample: 0.25, HEUN: 0.25, sde_sample: 0.04}[sampler]


def test_without_guidance_or_without_the_class_one_half_is_enough():
    for scale, labels in ((1.0, Y.tolist()), (0.0, [9, 9])):
        model = Counted()
        ode_sample(model, torch.zeros(2, 1, 2, 2), Y, steps=2, guidance=scale, null_class=9)
        assert [asked for _, _, asked in model.calls] == [labels, labels]


def test_the_interval_skips_the_unconditional_half_outside():
    """Both ends belong to it; the start of a step decides, for Heun's corrector and the SDE's last step too."""
    guided = {"guidance": 2.0, "interval": (0.5, 0.75)}
    assert calls_of(ode_sample, steps=4, **guided) == [(2, 1.0), (4, 0.75), (4, 0.5), (2, 0.25)]
    assert calls_of(HEUN, steps=4, **guided) == [
        (2, 1.0), (2, 0.75),
        (4, 0.75), (4, 0.5),
        (4, 0.5), (4, 0.25),
        (2, 0.25),
    ]  # fmt: skip
    guided["interval"] = (0.04, 0.3)
    assert calls_of(sde_sample, steps=4, **guided) == [(2, 1.0), (2, 0.68), (2, 0.36), (4, 0.04)]


@pytest.mark.parametrize("sampler", [ode_sample, HEUN, sde_sample])
def test_autoguidance_asks_the_guide_only_where_guidance_is_on(sampler):
    guide = Counted(1.0)
    model = calls_of(sampler, steps=4, guidance=2.0, interval=(0.3, 0.8), guide=guide)
    assert {rows for rows, _ in model} == {2}
    steps_inside = {ode_sample: 2, HEUN: 4, sde_sample: 2}[sampler]
    assert [rows for rows, _, _ in guide.calls] == [2] * steps_inside
    unused = Counted()
    calls_of(sampler, steps=4, guidance=1.0, guide=unused)
    assert unused.calls == []
    alone = Counted(1.0)
    assert calls_of(sampler, steps=4, guidance=0.0, guide=alone) == []
    assert [rows for rows, _, _ in alone.calls] == [2] * {ode_sample: 4, HEUN: 7, sde_sample: 4}[sampler]
    assert all(asked == Y.tolist() for _, _, asked in alone.calls)
