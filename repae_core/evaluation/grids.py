"""Pictures of many images at once."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_GAP = 2
_BACKGROUND = 255


def image_grid(images: Tensor, *, columns: int, scale: int = 1, labels: Sequence[str] = ()) -> Image.Image:
    """uint8 [N,3,H,W] row by row; scale: whole-number enlargement; labels: names left of the rows."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    cell_h, cell_w = height * scale + _GAP, width * scale + _GAP
    font = ImageFont.load_default(size=max(10, min(16, height * scale // 2)))
    margin = int(max((font.getlength(name) for name in labels), default=-8)) + 8
    canvas = Image.new("RGB", (margin + columns * cell_w + _GAP, rows * cell_h + _GAP), (_BACKGROUND,) * 3)
    for index, image in enumerate(images.cpu()):
        row, column = divmod(index, columns)
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        canvas.paste(picture, (margin + _GAP + column * cell_w, _GAP + row * cell_h))
    draw = ImageDraw.Draw(canvas)
    for row, name in enumerate(labels):
        draw.text((4, _GAP + row * cell_h + cell_h // 2), name, fill=(0, 0, 0), font=font, anchor="lm")
    return canvas


def comparison_strip(originals: Tensor, reconstructions: Tensor, *, columns: int = 16, scale: int = 2) -> Image.Image:
    """Pairs of rows: originals above, reconstructions below; both uint8 [N,3,H,W]."""
    rows = []
    for start in range(0, len(originals), columns):
        for images in (originals, reconstructions):
            part = images[start : start + columns].cpu()
            padding = torch.full((columns - len(part), *part.shape[1:]), _BACKGROUND, dtype=torch.uint8)
            rows.append(torch.cat([part, padding]))
    return image_grid(torch.cat(rows), columns=columns, scale=scale)


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
