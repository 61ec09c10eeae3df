"""A trained network with its optimizer, the clipped step, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

M = TypeVar("M", bound=nn.Module)


class Network(Generic[M]):
    """A network that is trained: `module` holds the weights, `forward` is the call that synchronises gradients.

    Under DDP only calls through `forward` reduce gradients over workers; `module` serves frozen passes.
    `grad_scale` on: fp16 training, with a gradient scaler of its own.
    """

    def __init__(
        self,
        module: M,
        forward: Callable[..., Any],
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        grad_scale: bool = False,
    ) -> None:
        self.module = module
        self.forward = forward
        self.learning_rate = learning_rate
        self.optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=learning_rate,
            betas=betas,
            eps=epsilon,
            weight_decay=weight_decay,
            fused=True,
        )
        device = next(module.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=grad_scale)

    def gradients(self, *, reduce: bool) -> AbstractContextManager[object]:
        """Forward and backward passes inside; `reduce` off: their gradients stay local for now."""
        if reduce or not isinstance(self.forward, DistributedDataParallel):
            return nullcontext()
        return self.forward.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient."""
        self.scaler.scale(loss).backward()

    def step(self, max_grad_norm: float, rate_factor: float = 1.0) -> Tensor:
        """Clip, step at `rate_factor` times the base rate, clear; returns the gradient norm before clipping.

        A network that no loss has reached (a frozen VAE) stays as it is.
        """
        for group in self.optimizer.param_groups:  # a frozen network's too: checkpoints hold it
            group["lr"] = self.learning_rate * rate_factor
        if all(p.grad is None for p in self.parameters()):
            return torch.zeros((), device=self.parameters()[0].device)
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.parameters())
        self._clip(norm, max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip(self, norm: Tensor, max_norm: float) -> None:
        """Gradients times min(1, max_norm / norm), as `torch.nn.utils.clip_grad_norm_`.

        The fused AdamW divides them on its way, which saves a pass over all of them. It takes the divisor as fp32, and
        a gradient scaler that is on sets one of its own.
        """
        if norm.dtype == torch.float32 and not self.scaler.is_enabled():
            self.optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)  # type: ignore[attr-defined]
        else:
            clip_grads_with_norm_(self.parameters(), max_norm, norm)

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take over the moments and steps in `optimizer.state_dict()` of this or a foreign run; settings stay ours.

        Moments get their parameter's memory layout (channels-last in the VAE): the fused optimizer goes through memory
        in order, whatever the strides, and published checkpoints are contiguous.

        Raises:
            ValueError: it is of another number of parameters.
        """
        ours = self.optimizer.state_dict()["param_groups"]
        theirs = [index for group in state["param_groups"] for index in group["params"]]
        if len(theirs) != len(self.parameters()):
            raise ValueError(f"the optimizer's state is of {len(theirs)} parameters, ours has {len(self.parameters())}")
        moments_of = {ours_: state["state"][saved] for ours_, saved in enumerate(theirs) if saved in state["state"]}
        self.optimizer.load_state_dict({"state": moments_of, "param_groups": ours})
        for parameter, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(parameter).copy_(moments[name])

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients; 0-dimensional.

    On the CPU over the rows of each first: there torch adds up a whole fp32 matrix of SiT-B's size in one go, which is
    wrong by 1e-4, and slower.
    """
    gradients = [p.grad.squeeze() for p in parameters if p.grad is not None]
    if gradients[0].device.type != "cpu":
        return get_total_norm(gradients)
    return get_total_norm([torch.linalg.vector_norm(g, dim=list(range(1, g.ndim)) or None) for g in gradients])


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """No gradients for these modules' parameters inside; gradients still pass through to the inputs."""
    trainable = [p for m in modules for p in m.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def rate_factor(step: int, *, total_steps: int, warmup_steps: int = 0, decay_fraction: float = 0.0) -> float:
    """Learning rate at 0-based `step` over the base rate: linear warm-up, constant, linear decay to 0 at the end."""
    factor = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    decay_steps = decay_fraction * total_steps
    if decay_steps:
        factor *= min(1.0, (total_steps - step) / decay_steps)
    return factor
