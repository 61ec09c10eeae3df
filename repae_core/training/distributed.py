"""The group of processes that trains together: rank, device, wrapping, reductions."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """One process among `world_size`; a single process when nothing is distributed."""

    accelerator: Accelerator

    @property
    def rank(self) -> int:
        """Index of this process, 0-based."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return torch.device(self.accelerator.device)

    def wrap(self, module: nn.Module) -> nn.Module:
        """DDP around a trained network (the module itself in a single process)."""
        with warnings.catch_warnings():  # torch's new name of broadcast_buffers is unknown to accelerate
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            wrapped: nn.Module = self.accelerator.prepare_model(module)
        return wrapped

    def barrier(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    def mean(self, values: Tensor) -> Tensor:
        """Mean over processes; one all-reduce."""
        if self.world_size == 1:
            return values
        reduced = values.clone()
        dist.all_reduce(reduced)
        return reduced / self.world_size

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensor of every rank, in their order; of equal shapes."""
        if self.world_size == 1:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(gathered, values.contiguous())
        return gathered

    def from_main(self, flag: bool) -> bool:
        """The main rank's flag, on every rank."""
        return bool(self.gather(torch.tensor([float(flag)], device=self.device))[0].item())

    def all_true(self, flags: Tensor) -> Tensor:
        """Elementwise `and` of a bool tensor over processes."""
        if self.world_size == 1:
            return flags
        reduced = flags.to(torch.int32)
        dist.all_reduce(reduced, op=dist.ReduceOp.MIN)
        return reduced.bool()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The tensor there; a copy from the host to a GPU does not wait for what that is still at."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def open_group(*, use_gpu: bool = False) -> Group:
    """Join the process group described by the environment (Ray Train's or torchrun's), or stand alone.

    Autocast is not accelerate's here: it would wrap every network, and the VAE and GAN losses stay fp32
    (system.md section 3). Buffers are not broadcast: SiT's latent norm reduces its own statistics, the
    discriminator's batch norm is per worker.
    """
    if not dist.is_initialized():  # else a second training of this process would get the first one's device
        AcceleratorState._reset_state(reset_partial_state=True)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Group(Accelerator(cpu=not use_gpu, kwargs_handlers=[ddp]))
