import io

import numpy as np
import pytest
from PIL import Image

from repae_core.data.crop import center_crop, open_image, to_rgb
from repae_core.data.sources import BadImageError


def stored(image: Image.Image, kind: str, **options) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return open_image(stream.getvalue())


def test_crop_of_the_right_size_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(center_crop(Image.fromarray(pixels), 32), pixels)


def test_crop_is_centred():
    pixels = np.zeros((32, 96, 3), dtype=np.uint8)
    pixels[:, 32:64] = 200
    assert (center_crop(Image.fromarray(pixels), 32) == 200).all()


def test_exif_orientation_is_applied():
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:10] = 255  # upper half white; orientation 6 turns it to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = to_rgb(stored(Image.fromarray(pixels), "PNG", exif=exif))
    assert upright.size == (20, 40)
    assert (np.asarray(upright)[:, 10:] == 255).all()
    assert (np.asarray(upright)[:, :10] == 0).all()


@pytest.mark.filterwarnings("error")
def test_damaged_exif_counts_as_none():
    image = stored(Image.new("RGB", (8, 4), (1, 2, 3)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert to_rgb(image).size == (8, 4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_the_high_byte(kind):
    values = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    rgb = np.asarray(to_rgb(stored(Image.fromarray(values), kind)))
    assert np.array_equal(rgb[..., 0], values >> 8)
    assert np.array_equal(rgb[..., 0], rgb[..., 2])


def test_sixteen_bit_pgm_keeps_the_high_byte():
    values = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    image = open_image(b"P5 3 2 65535\n" + values.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(to_rgb(image))[..., 0], values >> 8)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PDF"])
def test_other_formats_are_no_images_whatever_programs_are_there(kind, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("an external program was started"))
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, kind)
    with pytest.raises(BadImageError, match=r"^not an image, or damaged at its start$"):
        center_crop(open_image(stream.getvalue()), 8)


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "JPEG2000", "AVIF", "PPM"])
def test_every_stated_format_is_read(kind):
    options = {"save_all": True, "append_images": [Image.new("RGB", (16, 16))]} if kind == "MPO" else {}
    assert center_crop(stored(Image.new("RGB", (16, 16)), kind, **options), 8).shape == (8, 8, 3)


def test_alpha_is_dropped_not_blended():
    pixels = np.full((4, 4, 4), (10, 20, 30, 0), dtype=np.uint8)
    assert (np.asarray(to_rgb(stored(Image.fromarray(pixels), "PNG"))) == (10, 20, 30)).all()
    grey = np.full((4, 4, 2), (77, 0), dtype=np.uint8)
    assert (np.asarray(to_rgb(stored(Image.fromarray(grey), "PNG"))) == 77).all()


def test_palette_with_transparency():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    assert (np.asarray(to_rgb(stored(image, "PNG", transparency=1))) == (9, 8, 7)).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_defined_mode_becomes_rgb(mode):
    assert center_crop(Image.new(mode, (20, 10)), 8).shape == (8, 8, 3)


@pytest.mark.parametrize("mode", ["F", "LAB", "I"])
def test_undefined_modes_are_refused_by_name(mode):
    with pytest.raises(ValueError, match=f"mode {mode}"):
        to_rgb(Image.new(mode, (4, 4)))


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (40, 200)]
    image = stored(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert (center_crop(image, 8) == (40, 0, 0)).all()


def test_a_sliver_is_refused_before_memory_is_filled():
    with pytest.raises(ValueError, match="too long and thin"):
        center_crop(Image.new("RGB", (1, 60_000)), 256)


def test_truncated_file_is_an_error():
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    with pytest.raises(BadImageError, match="truncated"):
        center_crop(Image.open(io.BytesIO(stream.getvalue()[:1500])), 32)
