import dataclasses
import time

import pytest
import tiny
import torch

from repae_core.artifacts import Artifact, Store
from repae_core.artifacts.checkpoints import committed_checkpoints
from repae_core.diffusion import Interpolant
from repae_core.models import SiT
from repae_core.training.ablation_steps import frozen_vae_step, naive_end_to_end_step
from repae_core.training.assembly import joint_objective, new_joint_state, train_network
from repae_core.training.distributed import open_group
from repae_core.training.joint_run import JointRun
from repae_core.training.ldm_step import ldm_step
from repae_core.training.optim import Network
from repae_core.training.repae_step import repae_step, vae_warmup_step
from repae_core.training.state import FlowObjective, LDMState
from repae_core.training.throughput import ThroughputMeter, image_flops, matmul_peak, peak_memory, stand_in
from repae_core.training.timing import PhaseTimer

CPU = torch.device("cpu")


def small_sit() -> SiT:
    return SiT(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=2, num_classes=10,
               encoder_depth=2, z_dims=[24], projector_dim=48)  # fmt: skip


def small_state() -> LDMState:
    sit = small_sit()
    return LDMState(open_group(), Network(sit, sit, learning_rate=1e-3), ema=small_sit())


def linear(tokens: int, inputs: int, outputs: int) -> int:
    """FLOPs of y = xW: a multiplication and an addition for each weight and token."""
    return 2 * tokens * inputs * outputs


def hand_count() -> tuple[int, int]:
    """Forward FLOPs of an image in `small_sit`, and those of layers whose input needs no gradient."""
    width, tokens, patch, blocks = 32, 16, 2 * 2 * 4, 3
    attention = 2 * 2 * tokens * tokens * width  # scores, and their sum of values
    block = (
        linear(1, width, 6 * width)
        + linear(tokens, width, 3 * width)
        + attention
        + linear(tokens, width, width)
        + linear(tokens, width, 4 * width)
        + linear(tokens, 4 * width, width)
    )
    projector = linear(tokens, width, 48) + linear(tokens, 48, 48) + linear(tokens, 48, 24)
    final = linear(1, width, 2 * width) + linear(tokens, width, patch)
    of_constants = linear(tokens, patch, width) + linear(1, 256, width)  # patches; frequencies of t
    return of_constants + linear(1, width, width) + blocks * block + projector + final, of_constants


def test_the_count_is_that_by_hand():
    """Backward costs twice the forward pass, but for inputs without a gradient."""
    forward, of_constants = hand_count()
    counted = image_flops(ldm_step, small_state(), FlowObjective(Interpolant("linear")), image_side=32)
    assert counted == pytest.approx(3 * forward - of_constants, rel=0.02)
