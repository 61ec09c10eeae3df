"""Which class each generated image is asked for (system.md section 5)."""

from __future__ import annotations

import numpy as np
import torch

from repae_core.diffusion import item_generators


def sample_labels(protocol: str, num_images: int, num_classes: int, seed: int) -> np.ndarray:
    """int64 [num_images]: a function of (protocol, seed, index), and for `equal` of num_images too.

    `equal`: the same count a class, shuffled; where num_images is not divisible by num_classes the first
    classes get one more. `random`: uniform, one draw an image. Else a comma-separated list, repeated in its order.

    Raises:
        ValueError: a listed class does not exist.
    """
    if protocol == "equal":
        rng = np.random.Generator(np.random.PCG64([seed, num_images]))
        return rng.permutation(np.arange(num_images, dtype=np.int64) % num_classes)
    if protocol == "random":
        return np.array([_random_label(seed, index, num_classes) for index in range(num_images)], dtype=np.int64)
    listed = np.array([int(part) for part in protocol.split(",")], dtype=np.int64)
    if listed.max() >= num_classes:
        raise ValueError(f"generate.labels: class {listed.max()} does not exist; the model has {num_classes}")
    return np.resize(listed, num_images)


def _random_label(seed: int, index: int, num_classes: int) -> int:
    (generator,) = item_generators(seed, "generate.labels", [index])
    return int(torch.randint(num_classes, (), generator=generator))
