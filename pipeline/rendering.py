"""A picture as it is shown to people: a small one, encoded anew, never a byte of the original.

For confined child processes (see `pipeline.child`), for what is shown may be what no decoder could read; and for the
contact sheet of a person's own question, whose pictures were decoded for the index by the same code.
"""

from __future__ import annotations

from io import BytesIO

from PIL import Image, ImageOps

from pipeline.batch import BadImage
from pipeline.decode_cpu import OPENERS
from pipeline.headers import sniff

MEMORY_BYTES = 2 << 30  # of address space, for the process: libraries alone map 0.6 GB
ENCODED_BYTES_MAX = 64 << 20
PIXELS_MAX = 100_000_000


def check_size(size_bytes: int) -> None:
    """Before its file is read.

    Raises:
        BadImage: it is too large to be shown.
    """
    if size_bytes > ENCODED_BYTES_MAX:
        raise BadImage("too_large", f"{size_bytes >> 20} MB; shown are up to {ENCODED_BYTES_MAX >> 20} MB")


def render(encoded: bytes, edge_px: int, kind_out: str, quality: int) -> bytes:
    """Upright and without metadata, at most `edge_px` wide and high, as "jpeg" or "webp".

    Raises:
        BadImage: what it is does not decode. MemoryError.
    """
    kind = sniff(encoded)
    if kind is None or kind not in OPENERS:
        raise BadImage("not_an_image", "no picture inside")
    try:
        with OPENERS[kind].open(BytesIO(encoded)) as picture:
            if picture.width * picture.height > PIXELS_MAX:
                raise BadImage("too_large", f"{picture.width} x {picture.height} pixels")
            picture.draft("RGB", (2 * edge_px, 2 * edge_px))
            upright: Image.Image = ImageOps.exif_transpose(picture).convert("RGB")
        upright.thumbnail((edge_px, edge_px), Image.Resampling.BICUBIC)
        out = BytesIO()
        upright.save(out, kind_out, quality=quality)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # Pillow raises a dozen kinds on broken data
        raise BadImage("corrupt", f"{type(error).__name__}: {error}") from error
    return out.getvalue()
