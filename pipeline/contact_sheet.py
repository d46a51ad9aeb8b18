"""The answers of a query as one picture: a square grid of thumbnails, each with its score and label.

Of one that holds `CELLS_MAX` the pixels take 25 MB; one of 5,000 would take 1.2 GB, and JPEG ends at 65,535 pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from pipeline.batch import BadImage
from pipeline.rendering import render

CELLS_MAX = 100  # ten by ten, 2,648 x 3,132 pixels: more would have to be zoomed into and scrolled
CELL_PX, CAPTION_PX, GAP_PX = 256, 44, 8
JPEG_QUALITY = 95
PAPER, INK, FAINT = (250, 250, 248), (24, 24, 24), (110, 110, 110)


class Cell(NamedTuple):
    encoded: bytes | None  # None: the picture can no longer be read
    caption: str
    score: float


def contact_sheet(title: str, cells: Iterable[Cell], count: int, first: int = 1) -> Image.Image:
    """RGB picture with the title on top and `count` cells row by row, best first, the first of them numbered `first`.
    `cells` are asked for one by one: their pictures need not be in memory together.

    Raises:
        ValueError: more than `CELLS_MAX`, or other than `count` cells.
    """
    if count > CELLS_MAX:
        raise ValueError(f"{count} cells; expected at most {CELLS_MAX} on one sheet, make several")
    columns = math.ceil(math.sqrt(count)) if count else 1
    lines = math.ceil(count / columns)
    pitch_x, pitch_y = CELL_PX + GAP_PX, CELL_PX + CAPTION_PX + GAP_PX
    sheet = Image.new("RGB", (columns * pitch_x + GAP_PX, lines * pitch_y + CAPTION_PX + GAP_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP_PX, 10), _fit(draw, title, sheet.width - 2 * GAP_PX, 20), INK, ImageFont.load_default(20))
    for number, cell in zip(range(count), cells, strict=True):
        x = GAP_PX + number % columns * pitch_x
        y = CAPTION_PX + number // columns * pitch_y
        _paste(sheet, cell.encoded, x, y)
        draw.text((x, y + CELL_PX + 2), f"{first + number}.  {cell.score:.3f}", FAINT, ImageFont.load_default(13))
        draw.text((x, y + CELL_PX + 19), _fit(draw, cell.caption, CELL_PX, 14), INK, ImageFont.load_default(14))
    return sheet


def _paste(sheet: Image.Image, encoded: bytes | None, x: int, y: int) -> None:
    box = (x, y, x + CELL_PX - 1, y + CELL_PX - 1)
    try:
        small = Image.open(io.BytesIO(render(encoded or b"", CELL_PX, "jpeg", JPEG_QUALITY)))
    except BadImage:
        ImageDraw.Draw(sheet).rectangle(box, outline=FAINT)
        ImageDraw.Draw(sheet).text((x + 12, y + 12), "cannot be read now", FAINT, ImageFont.load_default(14))
        return
    sheet.paste(small, (x + (CELL_PX - small.width) // 2, y + (CELL_PX - small.height) // 2))


def _fit(draw: ImageDraw.ImageDraw, text: str, width_px: int, size: int) -> str:
    """Cut to what fits; captions are file names and labels of any length."""
    text = "".join(ch if ch.isprintable() else "?" for ch in text[:width_px])  # a caption may be a whole page
    font = ImageFont.load_default(size)
    if draw.textlength(text, font) <= width_px:
        return text
    while text and draw.textlength(text + "...", font) > width_px:
        text = text[:-1]
    return text + "..."
