"""From any picture to a square RGB array: ADM's centre crop."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

# What Pillow's decoders raise on damaged data; Image.DecompressionBombError: over twice MAX_IMAGE_PIXELS.
DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Square RGB pixels, uint8 [size, size, 3] (the centre crop of ADM, used for all published figures).

    Box filter to half while the short side is at least 2*size, bicubic until it equals `size`, then the centre.

    Raises:
        ValueError: the picture's mode has no defined way to RGB, see `to_rgb`; or it is so long and thin that the
            enlarged picture would pass Pillow's limit for decompression bombs.
        OSError: the picture's data are damaged.
    """
    image = to_rgb(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > 2 * (Image.MAX_IMAGE_PIXELS or float("inf")):
        raise ValueError(f"{image.width}x{image.height} pixels are too long and thin to be enlarged to {size}")
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size].copy()


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as people see it, in mode RGB.

    EXIF orientation is applied (a phone's portrait stands upright; an unreadable EXIF block counts as none).
    Alpha is dropped, not blended; palettes are looked up; CMYK by Pillow's conversion; grey is repeated;
    of 16-bit grey the high byte is kept, as decoders do for 16-bit colour; of an animation the first frame.

    Raises:
        ValueError: floating-point or LAB pictures: they state no range or profile that would define RGB.
        OSError: the picture's data are damaged.
    """
    image.load()
    image = _upright(image)
    if image.mode == "RGB":
        return image
    if image.mode in ("F", "LAB"):
        raise ValueError(f"images of mode {image.mode} have no defined conversion to RGB")
    if image.mode in _SIXTEEN_BIT:
        high_byte = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        image = Image.fromarray(high_byte.astype(np.uint8))
    if image.mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # Broken EXIF raises many types (struct.error, SyntaxError, ...); the pixels are sound nevertheless.
        return image
