"""Interpolants, samplers and their random draws: pure maths."""

from repae_core.diffusion.interpolant import Interpolant
from repae_core.diffusion.randomness import item_generators, rand, randn
from repae_core.diffusion.samplers import ode_sample, sde_sample

__all__ = ["Interpolant", "item_generators", "ode_sample", "rand", "randn", "sde_sample"]
