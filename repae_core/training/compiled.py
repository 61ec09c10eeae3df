"""torch.compile of the blocks that repeat: each kind is compiled once, whatever the depth of the network."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch._dynamo.config
from torch import nn

from repae_core.models.recompute import RecomputableBlock

_GRAPHS = 64  # of one kind of block: a VAE's has a graph a width and resolution, more than torch's limit of 8
logger = logging.getLogger("repae_core")


def compile_blocks(*networks: nn.Module) -> None:
    """Have the blocks inside compiled at their first pass; names in the state dict stay."""
    torch._dynamo.config.recompile_limit = _GRAPHS
    for block in _blocks(*networks):
        block.compile(dynamic=False)


def keep_if_it_compiles(first_pass: Callable[[], None], *networks: nn.Module) -> None:
    """Make the first pass; where it fails, warn once and go on uncompiled (no C compiler, an unknown operator)."""
    try:
        first_pass()
    except Exception as error:
        told = " ".join(str(error).split("Set TORCH")[0].split())  # what follows is advice to torch's developers
        logger.warning("torch.compile failed (%s); training goes on without it", told[:300] or type(error).__name__)
        for block in _blocks(*networks):
            block._compiled_call_impl = None
        first_pass()


def is_compiled(network: nn.Module) -> bool:
    """Whether blocks inside run compiled, which differs from the config where the compiler has failed."""
    return any(block._compiled_call_impl is not None for block in _blocks(network))


def _blocks(*networks: nn.Module) -> list[nn.Module]:
    return [module for network in networks for module in network.modules() if isinstance(module, RecomputableBlock)]
