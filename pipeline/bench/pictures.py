"""The pictures of a benchmark: the same pixels for everybody, different bytes for each, on disk and in the page cache.

Equal bytes are never computed twice, so each copy of a picture carries a comment of its own. Its pixels are those of
picture `number % distinct`, which is how a vector finds its reference.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

from PIL import Image, ImageOps

EDGE, QUALITY = 500, 95  # as large as those of iNaturalist 2021, about 100 kB
DIRTY_EVERY = 60  # of the dirty corpus, one of each kind in so many
BOMB_EDGE = 30_000  # pixels; 900 million of them in 110 kB


def jpegs_below(pictures: Path) -> list[Path]:
    """
    Raises:
        SystemExit: there are none.
    """
    found = sorted(pictures.rglob("*.jpg"))
    if not found:
        raise SystemExit(f"no *.jpg below {pictures}; --pictures wants a folder of JPEG photos")
    return found


def unique_copies(pictures: list[Path], folder: Path, count: int, first: int = 0) -> None:
    """`count` JPEGs with the pixels of `pictures` in turn, each with a comment of its own: new bytes, same work."""
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        encoded = pictures[number % len(pictures)].read_bytes()
        comment = f"copy {number}".encode()
        segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        (folder / f"{number:07d}.jpg").write_bytes(encoded[:2] + segment + encoded[2:])


def small_copies(pictures: list[Path], folder: Path) -> list[Path]:
    """`pictures` scaled to a long edge of `EDGE` pixels, as JPEGs."""
    folder.mkdir(parents=True)
    made = []
    for number, path in enumerate(pictures):
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        picture.thumbnail((EDGE, EDGE), Image.Resampling.BICUBIC)
        made.append(folder / f"{number:05d}.jpg")
        picture.save(made[-1], quality=QUALITY)
    return made


class Corpus:
    """Folders of the first n copies, made when they are asked for and warm in the page cache; names give the order."""

    def __init__(self, pictures: list[Path], work: Path, distinct: int) -> None:
        self.distinct = small_copies(pictures[:distinct], work / "distinct")
        self._all, self._work, self._made = work / "all", work, 0
        self._all.mkdir()

    def folder(self, count: int) -> Path:
        """Exactly `count` pictures, as hard links."""
        if count > self._made:
            unique_copies(self.distinct, self._work / f"from-{self._made}", count - self._made, self._made)
            for path in sorted((self._work / f"from-{self._made}").iterdir()):
                os.link(path, self._all / path.name)
            self._made = count
        folder = self._work / f"first-{count}"
        if not folder.exists():
            folder.mkdir()
            for path in sorted(self._all.iterdir())[:count]:
                os.link(path, folder / path.name)
        return folder


def dirty_copies(pictures: list[Path], folder: Path, count: int) -> set[str]:
    """`count` files, some of them what collections really hold; the names of those that are pictures.

    One in DIRTY_EVERY each is truncated, empty and a bomb, which nobody can embed, and CMYK, grey and lying on its
    side, which anybody should.
    """
    unique_copies(pictures, folder, count)
    names = sorted(path.name for path in folder.iterdir())
    good = set(names)
    for first in range(0, count, DIRTY_EVERY):
        for kind, name in zip(("cut", "empty", "bomb", "CMYK", "L", "side"), names[first + 5 :: 7], strict=False):
            path = folder / name
            if kind == "cut":
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            elif kind == "empty":
                path.write_bytes(b"")
            elif kind == "bomb":
                path.write_bytes(_bomb_png())
            elif kind == "side":
                picture = Image.open(path)
                exif = picture.getexif()
                exif[0x0112] = 6
                picture.save(path, "JPEG", exif=exif, quality=QUALITY, comment=name.encode())
            else:
                Image.open(path).convert(kind).save(path, "JPEG", quality=QUALITY, comment=name.encode())
            if kind in ("cut", "empty", "bomb"):
                good.discard(name)
    return good


def _bomb_png() -> bytes:
    """One bit a pixel, all black."""

    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    pixels = zlib.compressobj(9)
    row = b"\0" + bytes(BOMB_EDGE // 8)
    body = b"".join(pixels.compress(row) for _ in range(BOMB_EDGE)) + pixels.flush()
    head = struct.pack(">IIBBBBB", BOMB_EDGE, BOMB_EDGE, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", body) + part(b"IEND", b"")
