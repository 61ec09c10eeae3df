"""torch.compile of the blocks that repeat: each kind is compiled once, whatever the depth of the network."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch._dynamo.config
from torch import nn

from repae_core.models.recompute import RecomputableBlock
from repae_core.training.distributed import Group

_GRAPHS = 64  # of one kind of block: a VAE's has a graph a width and resolution, more than torch's limit of 8
logger = logging.getLogger("repae_core")


def compile_blocks(*networks: nn.Module) -> None:
    """Have the blocks inside compiled at their first pass; names in the state dict stay."""
    torch._dynamo.config.recompile_limit = _GRAPHS
    for block in _blocks(*networks):
        block.compile(dynamic=False)


def keep_if_it_compiles(trial: Callable[[], None], group: Group, *networks: nn.Module) -> None:
    """Make a pass of this rank alone; where it fails on any, warn once and go on uncompiled on all.

    It fails without a C compiler or on an operator that the compiler does not know.
    """
    failure = None
    try:
        trial()
    except Exception as error:
        # What follows is advice to torch's developers.
        told = " ".join(str(error).split("Set TORCH")[0].split())
        failure = told[:300] or type(error).__name__
    if group.all_true(torch.tensor([failure is None], device=group.device)).item():
        return
    reason = failure or "on another worker, whose log says why"
    logger.warning("torch.compile failed (%s); training goes on without it", reason)
    for block in _blocks(*networks):
        block._compiled_call_impl = None


def is_compiled(network: nn.Module) -> bool:
    """Whether blocks inside run compiled, which differs from the config where the compiler has failed."""
    return any(block._compiled_call_impl is not None for block in _blocks(network))


def _blocks(*networks: nn.Module) -> list[nn.Module]:
    return [module for network in networks for module in network.modules() if isinstance(module, RecomputableBlock)]
