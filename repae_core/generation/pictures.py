"""Grids of generated images, with nothing left out: the first ones of a class in index order."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from repae_core.evaluation.grids import image_grid

_SMALLEST_SIDE = 64  # pixels of a shown image; smaller ones are enlarged
GRID_ROWS, GRID_COLUMNS = 10, 10
OF_ONE_CLASS = 36


def class_grid(pixels: np.ndarray, labels: np.ndarray) -> Image.Image:
    """One row a class (the first ten that occur) of ten samples; repeated where there are fewer.

    pixels: uint8 [N,H,W,3]; labels [N].
    """
    present = np.unique(labels)[:GRID_ROWS]
    rows = [np.resize(np.flatnonzero(labels == label)[:GRID_COLUMNS], GRID_COLUMNS) for label in present]
    return _grid(pixels[np.concatenate(rows)], GRID_COLUMNS, [str(label) for label in present])


def one_class_grid(pixels: np.ndarray) -> Image.Image:
    """A square of the first samples [N,H,W,3] of one class, at most 36."""
    shown = pixels[:OF_ONE_CLASS]
    return _grid(shown, int(np.ceil(len(shown) ** 0.5)), [])


def _grid(pixels: np.ndarray, columns: int, names: list[str]) -> Image.Image:
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return image_grid(images, columns=columns, scale=max(1, _SMALLEST_SIDE // pixels.shape[1]), labels=names)
