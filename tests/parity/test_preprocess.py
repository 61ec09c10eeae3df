"""The centre crop against the published preprocessing (tests/data/parity/preprocess.*)."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image
from safetensors.numpy import load_file

from repae_core.data.crop import center_crop, to_rgb

DATA = Path(__file__).parents[1] / "data" / "parity"
CASES = json.loads((DATA / "preprocess.json").read_text())["cases"]
THUMBNAILS = load_file(DATA / "preprocess.safetensors")
CHANNELS = {"L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def picture(case: dict) -> Image.Image:
    """The case's image, written to a file and opened again."""
    k = case["k"]
    x, y = np.arange(case["width"])[None, :], np.arange(case["height"])[:, None]
    planes = [
        ((k + 3) * x + (2 * k + 5) * y + 37 * q * (1 + (x // 16 + y // 24) % 2) + (x * y) // (29 + 7 * q + k)) % 256
        for q in range(CHANNELS[case["mode"]])
    ]
    raw = np.stack(planes, axis=-1).astype(np.uint8)
    raw = raw[..., 0] if raw.shape[-1] == 1 else raw
    assert sha256(raw) == case["raw_sha256"]
    image = Image.frombytes(case["mode"], (case["width"], case["height"]), raw.tobytes())
    if case["mode"] == "P":
        image.putpalette([((3, 5, 7)[j] * i + 11 * j) % 256 for i in range(256) for j in range(3)])
    stream = io.BytesIO()
    image.save(stream, "TIFF" if case["file_type"] == "tif" else "PNG")
    opened = Image.open(io.BytesIO(stream.getvalue()))
    assert opened.mode == case["mode"]
    return opened


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['mode']}-{c['width']}x{c['height']}")
def test_every_mode_reads_as_published(case):
    assert sha256(np.asarray(to_rgb(picture(case)))) == case["rgb_after_read_sha256"]


@pytest.mark.parametrize("size", [256, 64])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_crop_equals_published(number, size):
    expected = CASES[number]["out"][str(size)]
    pixels = center_crop(picture(CASES[number]), size)
    assert pixels.shape == (size, size, 3)
    assert pixels.dtype == np.uint8
    # Resampling differs between Pillow versions (one tall picture, by up to 11 levels); two versions' hashes are given.
    hashes = {"11.1.0": expected["sha256"], "13.0.0": expected["sha256_with_pillow_13.0.0"]}
    tolerance = expected["max_abs_pixel_difference_between_the_two_pillow_versions"]
    if PIL.__version__ in hashes:
        assert sha256(pixels) == hashes[PIL.__version__]
    else:
        tolerance += 1
    every = 8 if size == 256 else 4
    thumbnail = THUMBNAILS[f"case{number}.out{size}"]
    assert np.abs(pixels[::every, ::every].astype(int) - thumbnail.astype(int)).max() <= tolerance
    assert pixels.mean(axis=(0, 1)) == pytest.approx(expected["mean"], abs=0.05 if tolerance else 1e-9)
