"""From the bytes of any picture to a square RGB array: safe decoding and ADM's centre crop."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from repae_core.data.sources import BadImageError

_EXPECTED = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning)
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
# Pillow knows more, but reads some with programs of the machine (EPS by Ghostscript, WMF by Windows): never for
# anybody's files. A plugin that another package adds (HEIC) would make results differ between machines.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "JPEG2000", "AVIF", "PPM")


def open_image(data: bytes) -> Image.Image:
    """The picture in a file's bytes, of one of FORMATS, whatever the file is called; not yet decoded.

    Raises:
        BadImageError: no picture, or one of more than `Image.MAX_IMAGE_PIXELS` (89 million) pixels; or a PNG with a
            wrong checksum or without its end.
    """
    with _decoding():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format == "PNG":
            # Pillow does not compare the checksums of the pixel data when it decodes.
            image.verify()
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        return image


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Square RGB pixels, uint8 [size, size, 3] (the centre crop of ADM, used for all published figures).

    Box filter to half while the short side is at least 2*size, bicubic until it equals `size`, then the centre.

    Raises:
        BadImageError: as `to_rgb`; or the picture is so long and thin that the enlarged one would pass Pillow's
            limit for decompression bombs.
    """
    image = to_rgb(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > 2 * (Image.MAX_IMAGE_PIXELS or float("inf")):
        raise BadImageError(f"{image.width}x{image.height} pixels are too long and thin to be enlarged to {size}")
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size].copy()


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as people see it, in mode RGB.

    EXIF orientation is applied (a phone's portrait stands upright; an unreadable EXIF block counts as none).
    Alpha is dropped, not blended; palettes are looked up; CMYK by Pillow's conversion, JPEGs with Adobe's inverted
    values; grey is repeated; of 16-bit grey the high byte is kept, as decoders do for 16-bit colour; of an animation
    the first frame.

    Raises:
        BadImageError: the picture's data are damaged, whatever the decoder makes of that; or a floating-point, 32-bit
            integer or LAB picture: they state no range or profile that would define RGB.
    """
    with _decoding():
        image.load()
        _turn_upright(image)
        if image.mode == "RGB":
            return image
        # Of mode I only these state a range: 16 bits, to which Pillow scales the values of a PPM.
        if image.mode in ("F", "LAB") or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            raise BadImageError(f"images of mode {image.mode} have no defined conversion to RGB")
        if image.mode in (*_SIXTEEN_BIT, "I"):
            values = np.asarray(image)  # uint16, or int32 in mode I
            if image.mode == "I":
                values = values.clip(0, 65535)
            image = Image.fromarray((values >> 8).astype(np.uint8))
        if image.mode in ("RGBa", "La"):
            image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
        return image.convert("RGB")


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """What a decoder raises becomes a BadImageError; its warnings are quiet, but that of a decompression bomb counts.

    Decoders raise many types on damaged data (struct.error, IndexError, MemoryError, ...): all mean this file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except BadImageError:
            raise
        except UnidentifiedImageError:
            raise BadImageError("not an image, or damaged at its start") from None
        except Exception as error:
            raise BadImageError(_reason(error)) from None


def _reason(error: Exception) -> str:
    """One short line without addresses in memory: it enters the artifact, which must not differ between runs."""
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))[:200]
    if isinstance(error, _EXPECTED) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _turn_upright(image: Image.Image) -> None:
    # Broken EXIF raises many types (struct.error, SyntaxError, ...); the pixels are sound nevertheless.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)  # else it copies every picture, turned or not
