"""One folder with every kind of odd and bad file, and what must become of each."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

RED, BLUE = (200, 40, 30), (20, 60, 180)

# Images that must be read, and the colour of their middle.
GOOD = {
    "bad/sound.png": RED,
    "odd/Plain.png": BLUE,  # beside plain.png: names that differ only in case are two images
    "odd/alpha.png": RED,
    "odd/broken-exif.jpg": RED,
    "odd/cmyk.jpg": RED,
    "odd/cmyk.tif": RED,
    "odd/grey-alpha.png": (77, 77, 77),
    "odd/grey16.png": (128, 128, 128),
    "odd/grey16.tif": (128, 128, 128),
    "odd/line\nbreak.png": RED,
    "odd/moving.gif": RED,
    "odd/moving.png": RED,
    "odd/moving.webp": RED,
    "odd/one-bit.png": (255, 255, 255),
    "odd/palette-alpha.png": RED,
    "odd/palette-alpha.tif": RED,
    "odd/palette.png": RED,
    "odd/plain.jpg": RED,
    "odd/plain.png": RED,
    "odd/png-named.jpg": RED,
    "odd/rgb16.png": RED,
    "odd/rgb16.tif": RED,
    "odd/turned.jpg": RED,
    "odd/ünï\u0301 漢字 😀.png": RED,
}
# The same, but links and names that only a local folder has.
LINKED = {"odd/linked-out.png": BLUE, "odd/bytes-\udcff\udcfe.png": RED}

# Failures, and a part of the reason given.
BAD = {
    "bad/bomb-at-the-warning.png": "exceeds limit",
    "bad/bomb.png": "exceeds limit",
    "bad/cut.gif": "",
    "bad/cut.jpg": "truncated",
    "bad/cut.png": "Truncated",
    "bad/cut.tif": "",
    "bad/cut.webp": "",
    "bad/empty.jpg": "the file is empty",
    "bad/drawing.jpg": "not an image, or damaged at its start",
    "bad/float.tif": "mode F",
    "bad/int32.tif": "mode I",
    "bad/page.png": "not an image, or damaged at its start",
    "bad/phone.heic": "not an image, or damaged at its start",
    "bad/sliver.png": "too long and thin",
    "bad/text.jpg": "not an image, or damaged at its start",
    "bad/without-end.png": "truncated",
    "bad/wrong-crc.png": "bad header checksum",
}
LINKED_BAD = {"bad/dangling.png": "a link to nothing", "bad/pipe.jpg": "a pipe, socket or device"}
EMPTY_CLASS = {"nothing/": "class folder without images"}

# Not meant to be images: listed, no failure.
OTHER = {
    "bad/Thumbs.db": "suffix .db",
    "bad/noname": "suffix missing",
    "nothing/notes.txt": "suffix .txt",
}


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def rgb16_png(colour: tuple[int, int, int], side: int = 20) -> bytes:
    """A PNG of 16 bits a channel; low bytes are 255, so that rounding instead of the high byte would show."""
    row = b"\0" + b"".join(bytes([value, 255]) for value in colour) * side
    header = struct.pack(">IIBBBBB", side, side, 16, 2, 0, 0, 0)
    content = zlib.compress(row * side)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", content) + png_chunk(b"IEND", b"")


def rgb16_tiff(colour: tuple[int, int, int], side: int = 20) -> bytes:
    """A little-endian TIFF of 16 bits a channel, one strip."""
    pixels = b"".join(bytes([255, value]) for value in colour) * side * side
    bits = 8 + len(pixels)
    tags = [
        (256, 3, 1, side), (257, 3, 1, side), (258, 3, 3, bits), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 8), (277, 3, 1, 3), (278, 3, 1, side), (279, 4, 1, len(pixels)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", bits + 6) + pixels + struct.pack("<HHH", 16, 16, 16) + directory


def good_files() -> dict[str, bytes]:
    red, blue = Image.new("RGB", (20, 20), RED), Image.new("RGB", (20, 20), BLUE)
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, *RED])
    grey16 = Image.fromarray(np.full((20, 20), 128 * 256 + 255, dtype=np.uint16))
    half = np.zeros((20, 60, 3), dtype=np.uint8)
    half[:, :40] = RED
    turned = Image.Exif()
    turned[0x0112] = 6
    palette_alpha = Image.new("PA", (20, 20), (1, 0))
    palette_alpha.putpalette([0, 0, 0, *RED])
    return {
        "bad/sound.png": encoded(red, "PNG"),
        "odd/Plain.png": encoded(blue, "PNG"),
        "odd/alpha.png": encoded(Image.new("RGBA", (20, 20), (*RED, 0)), "PNG"),
        "odd/broken-exif.jpg": encoded(red, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage"),
        "odd/cmyk.jpg": encoded(red.convert("CMYK"), "JPEG", quality=95),
        "odd/cmyk.tif": encoded(red.convert("CMYK"), "TIFF"),
        "odd/grey-alpha.png": encoded(Image.new("LA", (20, 20), (77, 0)), "PNG"),
        "odd/grey16.png": encoded(grey16, "PNG"),
        "odd/grey16.tif": encoded(grey16, "TIFF"),
        "odd/line\nbreak.png": encoded(red, "PNG"),
        "odd/moving.gif": encoded(red, "GIF", save_all=True, append_images=[blue]),
        "odd/moving.png": encoded(red, "PNG", save_all=True, append_images=[blue]),
        "odd/moving.webp": encoded(red, "WEBP", save_all=True, append_images=[blue], lossless=True),
        "odd/one-bit.png": encoded(Image.new("1", (20, 20), 1), "PNG"),
        "odd/palette-alpha.png": encoded(palette, "PNG", transparency=1),
        "odd/palette-alpha.tif": encoded(palette_alpha, "TIFF"),
        "odd/palette.png": encoded(palette, "PNG"),
        "odd/plain.jpg": encoded(red, "JPEG", quality=95),
        "odd/plain.png": encoded(red, "PNG"),
        "odd/png-named.jpg": encoded(red, "PNG"),
        "odd/rgb16.png": rgb16_png(RED),
        "odd/rgb16.tif": rgb16_tiff(RED),
        "odd/turned.jpg": encoded(Image.fromarray(half), "JPEG", quality=95, exif=turned),
        "odd/ünï\u0301 漢字 😀.png": encoded(red, "PNG"),
    }


def bad_files() -> dict[str, bytes]:
    def cut(content: bytes) -> bytes:
        return content[: len(content) // 2]

    png = encoded(noise(), "PNG")
    wrong = bytearray(png)
    wrong[-16] ^= 1  # the last byte before IEND's 12: the checksum of the pixel data
    wrong[-13] ^= 1
    return {
        "bad/bomb-at-the-warning.png": encoded(Image.new("1", (10_000, 10_000)), "PNG"),
        "bad/bomb.png": encoded(Image.new("1", (20_000, 20_000)), "PNG"),
        "bad/cut.gif": cut(encoded(noise(), "GIF")),
        "bad/cut.jpg": cut(encoded(noise(), "JPEG")),
        "bad/cut.png": cut(png),
        "bad/cut.tif": cut(encoded(noise(), "TIFF", compression="tiff_lzw")),
        "bad/cut.webp": cut(encoded(noise(), "WEBP")),
        "bad/empty.jpg": b"",
        "bad/drawing.jpg": encoded(Image.new("RGB", (8, 8)), "EPS"),
        "bad/int32.tif": encoded(Image.new("I", (8, 8), 2**30), "TIFF"),
        "bad/float.tif": encoded(Image.new("F", (8, 8)), "TIFF"),
        "bad/page.png": b"<!DOCTYPE html><html><body>404 not found</body></html>",
        "bad/phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
        "bad/sliver.png": encoded(Image.new("1", (1, 3_000_000)), "PNG"),
        "bad/text.jpg": b"this is no picture",
        "bad/without-end.png": png[:-12],
        "bad/wrong-crc.png": bytes(wrong),
    }


def other_files() -> dict[str, bytes]:
    return {"bad/Thumbs.db": b"x", "bad/noname": b"x", "nothing/notes.txt": b"x"}


def all_files() -> dict[str, bytes]:
    """Every kind of file that an archive can hold too, by its name."""
    return good_files() | bad_files() | other_files()


def write_folder(folder: Path) -> Path:
    """All of them as class folders, with links, a pipe, and a name that is no UTF-8."""
    for name, content in all_files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    outside = folder.parent / f"{folder.name}-elsewhere.png"
    outside.write_bytes(good_files()["odd/Plain.png"])
    os.symlink(outside, folder / "odd" / "linked-out.png")
    (folder / "odd" / "bytes-\udcff\udcfe.png").write_bytes(good_files()["odd/plain.png"])
    os.symlink("nowhere", folder / "bad" / "dangling.png")
    os.mkfifo(folder / "bad" / "pipe.jpg")
    return folder
