"""Mean and covariance of features, gathered in float64 and merged over batches, shards and workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """count images, their mean [D] and scatter [D,D] (the sum of outer products of what differs from the mean).

    Centred sums are merged as Chan et al. (1983) do: no cancellation as with raw second moments.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: Tensor | np.ndarray) -> Self:
        """Moments of features [N,D], N >= 1."""
        values = np.asarray(features.detach().cpu() if isinstance(features, Tensor) else features, dtype=np.float64)
        mean = values.mean(axis=0)
        centred = values - mean
        return cls(len(values), mean, centred.T @ centred)

    def merged(self, other: Moments) -> Moments:
        """Moments of both sets together.

        Raises:
            ValueError: other features: their number differs.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of {len(self.mean)} and of {len(other.mean)} features cannot be merged")
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        cross = np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + cross)

    @property
    def covariance(self) -> np.ndarray:
        """[D,D], ddof 1.

        Raises:
            ValueError: fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)


def merge_moments(parts: list[Moments]) -> Moments:
    """All parts together, in their order."""
    total, *others = parts
    for part in others:
        total = total.merged(part)
    return total


def moments(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D,D] (ddof 1) of features [N,D], in float64.

    Raises:
        ValueError: fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {len(features)}")
    found = Moments.of(features)
    return found.mean, found.covariance
