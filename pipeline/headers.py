"""What the bytes of a picture say before anybody decodes it: kind, size, orientation. Standard library only.

`sniff` goes by content, never by name. `read_jpeg_header` walks the segments of a JPEG up to its first scan (5 us for
the usual ten segments), so that size and memory need are known before a pixel is allocated. `end_is_missing` tells a
picture that was cut off, `still_png` cuts an animation down to its first picture. All of them read hostile bytes: they
answer `None` or the harmless value, and never raise.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal[
    "jpeg", "png", "gif", "webp", "bmp", "tiff", "ico", "jpeg2000", "avif", "heif", "ppm",
    "jpeg xl", "psd", "openexr", "radiance hdr", "dds", "qoi", "icns",
]  # fmt: skip

MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"\xff\xd8", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
    (b"\0\0\1\0", "ico"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jpeg2000"),
    (b"\xff\x4f\xff\x51", "jpeg2000"),
    (b"P4\n", "ppm"),
    (b"P5\n", "ppm"),
    (b"P6\n", "ppm"),
    # Pictures that nothing here decodes: named, so that the ledger says "unsupported", not "not an image".
    (b"\xff\x0a", "jpeg xl"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "jpeg xl"),
    (b"8BPS", "psd"),
    (b"v/1\x01", "openexr"),
    (b"#?RADIANCE", "radiance hdr"),
    (b"DDS ", "dds"),
    (b"qoif", "qoi"),
    (b"icns", "icns"),
)
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

JPEG_SOS, JPEG_EOI = 0xDA, 0xD9
SEGMENT = struct.Struct(">BBH").unpack_from  # 0xff, marker, length
JPEG_SEGMENTS_MAX = 20_000  # before the first scan; a profile and XMP of 16 MB each have 500. 2 us each, in Python
JPEG_SOF = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # start of frame; the three others are tables
JPEG_SOF_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
JPEG_SOF_LOSSLESS = frozenset({0xC3, 0xC7, 0xCB, 0xCF})
EXIF_ORIENTATION = 0x0112
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in coded data: not an escaped 0xff, a restart or padding
XMP_MARK = b"http://ns.adobe.com/xap/1.0/\0"
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
# What a still picture needs of a PNG; animation chunks, colour profiles and most text only cost time and memory.
PNG_DROP = frozenset({b"acTL", b"fcTL", b"fdAT", b"iCCP"})
PNG_SIZE = re.compile(rb"IHDR(.{8})", re.DOTALL)
PNG_TEXT = frozenset({b"tEXt", b"zTXt", b"iTXt"})
PNG_TEXT_KEEP = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # the two that may hold an orientation


class JpegHeader(NamedTuple):
    width: int
    height: int
    components: int
    bits: int
    lossless: bool
    whole_in_memory: bool  # progressive or several scans: the decoder keeps all coefficients, at any output scale
    orientation: int  # 1 to 8
    scan_at: int  # offset of the first scan


def sniff(encoded: bytes) -> Kind | None:
    """The kind of picture by its first bytes; `None` when no picture format starts like this."""
    for magic, kind in MAGIC:
        if encoded.startswith(magic):
            return kind
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "webp"
    if encoded[4:8] == b"ftyp":
        brands = encoded[8 : min(int.from_bytes(encoded[:4], "big"), 256)]
        if b"avif" in brands or b"avis" in brands:
            return "avif"
        if any(brand in brands for brand in HEIF_BRANDS):
            return "heif"
    return None


def _jpeg_segments(encoded: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment, through the first scan's or up to garbage; the last may be cut off.

    It gives up after `JPEG_SEGMENTS_MAX`, as if garbage followed.
    """
    at, left, last_at = 2, JPEG_SEGMENTS_MAX, len(encoded) - 4
    while left and at <= last_at:
        start, marker, length = SEGMENT(encoded, at)
        if start == 0xFF == marker:  # padding
            at += 1
            continue
        if start != 0xFF or length < 2:
            return
        end = at + 2 + length
        yield marker, at, end
        left -= 1
        if marker == JPEG_SOS:
            return
        at = end


def has_endless_segments(encoded: bytes) -> bool:
    """Whether more segments stand before the first scan than any encoder has a use for; decoders walk them all."""
    return sum(1 for _ in _jpeg_segments(encoded)) == JPEG_SEGMENTS_MAX


def read_jpeg_header(encoded: bytes) -> JpegHeader | None:
    """Size, memory need and orientation; `None` when the segments do not follow each other up to a scan."""
    frame: tuple[int, int, int, int, int] | None = None
    orientation, xmp = 0, b""
    for marker, at, end in _jpeg_segments(encoded):
        body = at + 4
        if end > len(encoded):
            return None
        if marker == JPEG_SOS:  # all that is declared before it is known
            return _jpeg_header(frame, encoded[body], orientation or _xmp_orientation(xmp) or 1, at) if frame else None
        if marker in JPEG_SOF:
            if end - body < 6 or frame:
                return None
            frame = (marker, *struct.unpack_from(">BHHB", encoded, body))
        elif marker == 0xE1 and not orientation:
            segment = encoded[body:end]
            if segment.startswith(b"Exif\0\0"):
                orientation = exif_orientation(segment[6:])
            elif segment.startswith(XMP_MARK):
                xmp = segment
    return None


def _jpeg_header(
    frame: tuple[int, int, int, int, int], in_first_scan: int, orientation: int, scan_at: int
) -> JpegHeader:
    marker, bits, height, width, components = frame
    whole = marker in JPEG_SOF_PROGRESSIVE or in_first_scan < components
    return JpegHeader(width, height, components, bits, marker in JPEG_SOF_LOSSLESS, whole, orientation, scan_at)


def end_is_missing(kind: Kind, encoded: bytes) -> bool:
    """Whether the file ends before its picture does, by what its container says; False where it does not say."""
    if kind == "jpeg":
        return _jpeg_is_cut(encoded)
    if kind == "webp":
        return int.from_bytes(encoded[4:8], "little") + 8 > len(encoded)
    if kind == "tiff":
        return int.from_bytes(encoded[4:8], "little" if encoded[:1] == b"I" else "big") + 2 > len(encoded)
    in_boxes = kind in ("avif", "heif") or encoded[4:8] == b"jP  "  # JPEG 2000 also comes as a bare codestream
    return in_boxes and _boxes_run_over(encoded)


def _jpeg_is_cut(encoded: bytes) -> bool:
    """Whether no end of image follows the scans. One in a thumbnail, or in a table between scans, does not count."""
    marker, at, end = 0, 0, 2
    for marker, at, end in _jpeg_segments(encoded):  # noqa: B007 - the last is what counts
        pass
    if marker != JPEG_SOS:
        return end + 4 > len(encoded)  # else there is garbage between segments, and nothing can be said
    while found := JPEG_MARKER.search(encoded, at):
        at = found.end()
        if encoded[at - 1] == JPEG_EOI:
            return False
        at += int.from_bytes(encoded[at : at + 2], "big")
    return True


def _boxes_run_over(encoded: bytes) -> bool:
    at = 0
    while at + 8 <= len(encoded):
        length = int.from_bytes(encoded[at : at + 4], "big")
        if length == 1:  # the length stands in 64 bits behind the name
            length = int.from_bytes(encoded[at + 8 : at + 16], "big")
        if length == 0:  # up to the end of the file
            return False
        at += max(length, 8)
    return at > len(encoded)


def _xmp_orientation(xmp: bytes) -> int:
    match = XMP_ORIENTATION.search(xmp)
    return int(match[1]) if match else 0


def exif_orientation(exif: bytes) -> int:
    """The orientation tag of the first directory of an EXIF block (a TIFF header and what follows); 0 when absent."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 0
    (at,) = struct.unpack_from(order + "I", exif, 4)
    if at + 2 > len(exif):
        return 0
    (entries,) = struct.unpack_from(order + "H", exif, at)
    for entry in range(at + 2, min(at + 2 + 12 * entries, len(exif) - 11), 12):
        tag, kind, count = struct.unpack_from(order + "HHI", exif, entry)
        if tag == EXIF_ORIENTATION and count == 1 and kind in (3, 4):
            (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), exif, entry + 8)
            return value if 1 <= value <= 8 else 0
    return 0


def png_sizes_inside(encoded: bytes) -> list[tuple[int, int]]:
    """(width, height) of the PNGs in an icon: its own directory can say 16 x 16 of a picture that fills memory."""
    return [struct.unpack(">II", found[1]) for found in PNG_SIZE.finditer(encoded)]


def still_png(encoded: bytes) -> bytes:
    """The PNG without animation, profile and text chunks: Pillow reads the first picture and walks nothing else.

    Broken chunks are passed on as they are, for the decoder to judge.
    """
    kept, at = [encoded[:8]], 8
    start = at  # of the run of chunks to keep
    while at + 12 <= len(encoded):
        length, name = int.from_bytes(encoded[at : at + 4], "big"), encoded[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(encoded):
            break
        drop = name in PNG_DROP or (name in PNG_TEXT and not encoded.startswith(PNG_TEXT_KEEP, at + 8))
        if drop:
            kept.append(encoded[start:at])
            start = end
        at = end
    if start == 8:
        return encoded
    kept.append(encoded[start:])
    return b"".join(kept)
