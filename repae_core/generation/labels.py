"""Which class each generated image is asked for (system.md section 5)."""

from __future__ import annotations

import numpy as np


def sample_labels(protocol: str, num_images: int, num_classes: int, seed: int) -> np.ndarray:
    """int64 [num_images]: a function of (protocol, seed, num_images, index) only.

    `equal`: the same count a class, shuffled; where num_images is not divisible by num_classes the first
    classes get one more. `random`: uniform. Else a comma-separated list, repeated in its order.

    Raises:
        ValueError: a listed class does not exist.
    """
    rng = np.random.Generator(np.random.PCG64([seed, num_images]))
    if protocol == "equal":
        return rng.permutation(np.arange(num_images, dtype=np.int64) % num_classes)
    if protocol == "random":
        return rng.integers(0, num_classes, num_images, dtype=np.int64)
    listed = np.array([int(part) for part in protocol.split(",")], dtype=np.int64)
    if listed.max() >= num_classes:
        raise ValueError(f"generate.labels: class {listed.max()} does not exist; the model has {num_classes}")
    return np.resize(listed, num_images)
