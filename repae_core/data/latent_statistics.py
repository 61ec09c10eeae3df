"""Mean and variance per channel of sampled latents, in one pass and without drawing a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LatentStatistics:
    """Exact moments of z ~ N(mean, std^2) over images and positions (system.md section 3, "Measured statistics").

    E[z] = E[mean];  Var[z] = Var[mean] + E[std^2], population variance, all in float64. Parts measured apart are
    merged with the pairwise update of Chan et al. (1983), which does not cancel where the mean is large.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0  # positions: images x height x width
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._scatter = torch.zeros(channels, dtype=torch.float64)  # sum of (mean - E[mean])^2
        self._noise = torch.zeros(channels, dtype=torch.float64)  # sum of std^2

    def update(self, mean: Tensor, std: Tensor) -> None:
        """Add a batch of posteriors, each [B, C, h, w], on any device."""
        if mean.numel():
            self.merge(self._of_batch(mean, std))

    def _of_batch(self, mean: Tensor, std: Tensor) -> LatentStatistics:
        assert mean.shape == std.shape
        batch = LatentStatistics(mean.shape[1])
        values = mean.detach().double().transpose(0, 1).flatten(1)  # [C, positions]
        center = values.mean(dim=1)
        batch.count = values.shape[1]
        batch._mean = center.cpu()
        batch._scatter = (values - center[:, None]).square().sum(dim=1).cpu()
        batch._noise = std.detach().double().square().sum(dim=(0, 2, 3)).cpu()
        return batch

    def merge(self, other: LatentStatistics) -> None:
        """Add what another one has seen."""
        count = self.count + other.count
        if not count:
            return
        delta = other._mean - self._mean
        self._mean = self._mean + delta * (other.count / count)
        self._scatter = self._scatter + other._scatter + delta.square() * (self.count * other.count / count)
        self._noise = self._noise + other._noise
        self.count = count

    def bias(self) -> Tensor:
        """E[z] per channel, float64 [C]."""
        self._require_data()
        return self._mean.clone()

    def variance(self) -> Tensor:
        """Var[z] per channel, float64 [C]."""
        self._require_data()
        return (self._scatter + self._noise) / self.count

    def scale(self) -> Tensor:
        """Var[z]**-0.5 per channel, float64 [C]."""
        return self.variance() ** -0.5

    def _require_data(self) -> None:
        if not self.count:
            raise ValueError("no latents were measured")

    def state(self) -> dict[str, Any]:
        """JSON-able; Python writes float64 so that it reads back exactly."""
        return {
            "count": self.count,
            "mean": self._mean.tolist(),
            "scatter": self._scatter.tolist(),
            "noise": self._noise.tolist(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> LatentStatistics:
        """The inverse of `state`."""
        statistics = cls(len(state["mean"]))
        statistics.count = state["count"]
        statistics._mean = torch.tensor(state["mean"], dtype=torch.float64)
        statistics._scatter = torch.tensor(state["scatter"], dtype=torch.float64)
        statistics._noise = torch.tensor(state["noise"], dtype=torch.float64)
        return statistics
