"""Which files of a tree are taken for pictures: all of them, except those that neither name nor content claims.

Every file counts as an input and a broken or strange one ends up in the quarantine ledger, so nothing is lost in
silence. But captions, tables, archives and films beside the pictures would flood that ledger. So a file whose name
says "no picture" (`NOT_PICTURES`, or a dot in front) is looked into, 32 bytes, and taken only if these begin a
picture. Remote files are judged by the name alone: looking costs a request each. The log has the count left out.

What is still being written is passed over unseen (`is_passed_over`): it has its own name in the next run. Who writes
under the final name at once is found out by its reader: a file that changes meanwhile is a `read_error`, one without
its end `truncated`, and both are read again when they have changed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

from pipeline.sources import Damage
from pipeline.sources.places import Found, Place

log = logging.getLogger(__name__)

PICTURES = frozenset(
    b"jpg jpeg jpe jfif png apng webp gif bmp dib tif tiff avif heic heif hif jp2 j2k jpf jpx jxl ico mpo".split()
)
NOT_PICTURES = frozenset(
    b"txt md csv tsv json jsonl xml xmp html htm yaml yml toml ini log pdf aae cls parquet arrow npy npz h5 hdf5 "
    b"sqlite db zip gz tgz tar bz2 xz zst 7z rar mp4 m4v mov avi mkv webm mp3 m4a wav".split()
)
# How what they have not finished ends: browsers, rclone, WinSCP, aria2, gsutil, the Hugging Face hub and many others.
UNFINISHED = frozenset(
    b"part partial tmp temp crdownload download opdownload filepart aria2 gstmp incomplete".split()
)
_BEGINNINGS = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"II*\0",  # TIFF
    b"MM\0*",
    b"\0\0\0\x0cjP  ",  # JPEG 2000
    b"\xff\x4f\xff\x51",
    b"\0\0\x01\0",  # ICO
)
_HEIF_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})


def extension(name: bytes) -> bytes:
    """Lower case, without the dot; empty where there is none."""
    _, dot, end = name.rpartition(b"/")[2].rpartition(b".")
    return end.lower() if dot else b""


def kind_of(name: bytes) -> str:
    """Its extension for a log line, which must not grow with what a hostile archive calls its members."""
    kind = extension(name)
    return kind.decode() if kind in PICTURES or kind in NOT_PICTURES or kind in UNFINISHED else "other"


def is_passed_over(name: bytes) -> bool:
    """By its name it is not finished yet, an editor's backup, or what macOS keeps beside a file.

    With a dot in front, as rsync and others write, it is so unless it ends as a picture's name does.
    """
    last = name.rpartition(b"/")[2]
    if last.startswith(b"."):
        return last.startswith(b"._") or extension(last) not in PICTURES
    return last.endswith(b"~") or extension(last) in UNFINISHED


def begins_a_picture(head: bytes) -> bool:
    if head.startswith(_BEGINNINGS):
        return True
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[4:8] == b"ftyp":
        return head[8:12] in _HEIF_BRANDS
    # Two letters are too little for BMP: it also has the size of its second header, one of a few, at byte 14.
    return head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124)


def only_pictures(place: Place, files: Iterator[Found | Damage]) -> Iterator[Found | Damage]:
    left_out: Counter[str] = Counter()
    for found in files:
        if isinstance(found, Found):
            last = found.name.rpartition(b"/")[2]
            hidden, kind = last.startswith(b"."), last.rpartition(b".")[2].lower()
            if is_passed_over(last) or (
                (hidden or kind in NOT_PICTURES) and not begins_a_picture(place.head(found.name, 32) or b"")
            ):
                left_out["hidden" if hidden else kind.decode() if kind in NOT_PICTURES else "unfinished"] += 1
                continue
        yield found
    tell_left_out("no pictures by their names and first bytes", left_out)


def tell_left_out(why: str, kinds: Counter[str]) -> None:
    if kinds:
        log.info("left out, %s: %s", why, ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
