"""The 5,000 built-in digits as an image source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from repae_core.data.sources import ImageSource, ItemTable, SourceItem


class DigitsReader:
    """Reads digits; an item's name is its number, zero-padded; the arrays are loaded on first use and never pickled."""

    def __init__(self) -> None:
        self._loaded: tuple[np.ndarray, np.ndarray] | None = None

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [5000, 32, 32, 3] and labels [5000]."""
        if self._loaded is None:
            from repae_core.digits.data import load_digits

            self._loaded = load_digits()
        return self._loaded

    def read(self, item: SourceItem) -> Image.Image:
        """One digit, 32x32."""
        return Image.fromarray(self.arrays()[0][int(item.name)])

    def digest(self, items: Sequence[SourceItem]) -> dict[str, Any]:
        """sha256 of pixels and labels."""
        images, labels = self.arrays()
        content = hashlib.sha256(np.ascontiguousarray(images).tobytes())
        content.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
        return {"content_sha256": content.hexdigest()}

    def __getstate__(self) -> dict[str, Any]:
        return {"_loaded": None}


def open_digits() -> ImageSource:
    """The built-in digits, classes "0" to "9"."""
    reader = DigitsReader()
    images, labels = reader.arrays()
    items = ItemTable(SourceItem(f"{i:05d}", int(label), images[i].nbytes) for i, label in enumerate(labels))
    return ImageSource("digits", reader, [str(digit) for digit in range(10)], items, skipped=[])
