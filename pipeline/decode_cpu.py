"""Encoded picture in, upright RGB out, on the host: `decode(encoded, pre)`.

The reference is Pillow's `convert("RGB")` of the first frame after EXIF rotation, colour profiles ignored. JPEG goes
through libjpeg-turbo (simplejpeg, 1.0 ms for 500 pixels against Pillow's 1.5, bit for bit the same); CMYK and whatever
simplejpeg refuses gets Pillow as a second opinion; all other formats are Pillow's. simplejpeg is strict, so that it
reports what libjpeg only warns of: a premature end fails here, corrupt data that still decodes is marked `damaged`.

Sizes are read from headers before anything is allocated. Up to `pre.exact_pixels_max` (64 Mpixel) decoding is exact
(WebP and JPEG 2000 need more memory per pixel: 29 and 24 Mpixel); above, JPEG and JPEG 2000 are decoded at 1/2, 1/4 or
1/8 and marked `scaled`, the rest is `too_large`. At the limit a picture takes 0.45 GB while it decodes: the threads of
a process share one budget of about that much, whatever their number.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.IcoImagePlugin import IcoImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from pillow_heif import HeifImageFile

from engines.spec import Preprocess
from pipeline.batch import BadImage, Mark, Reason
from pipeline.headers import (
    JPEG_SEGMENTS_MAX,
    JpegHeader,
    Kind,
    end_is_missing,
    has_endless_segments,
    png_sizes_inside,
    read_jpeg_header,
    sniff,
    still_png,
)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Decoded:
    image_hwc: Pixels  # (h, w, 3) upright RGB; a rotated picture is a view with the strides of its stored rows
    mark: Mark
    decoder: str  # "simplejpeg" | "pillow" | "pillow-heif"


class Opener(NamedTuple):
    open: Callable[[BytesIO], ImageFile]
    decoder: str = "pillow"
    memory: float = 1.0  # bytes per pixel while decoding, relative to the 7 of most formats


class MemoryBudget:
    """Large pictures wait until what is being decoded leaves them room; one that exceeds all of it goes alone."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.used_bytes, self.changed = limit_bytes, 0, threading.Condition()

    @contextmanager
    def hold(self, size_bytes: int) -> Iterator[None]:
        if size_bytes < LARGE_BYTES:
            yield
            return
        with self.changed:
            self.changed.wait_for(lambda: not self.used_bytes or self.used_bytes + size_bytes <= self.limit_bytes)
            self.used_bytes += size_bytes
        try:
            yield
        finally:
            with self.changed:
                self.used_bytes -= size_bytes
                self.changed.notify_all()


# Plugins are called directly: `Image.open` would try formats we do not want (EPS starts Ghostscript), and warns of
# large pictures through a global limit where we check sizes ourselves.
OPENERS: dict[Kind, Opener] = {
    "jpeg": Opener(JpegImageFile),
    "png": Opener(PngImageFile),
    "gif": Opener(GifImageFile),
    "webp": Opener(WebPImageFile, memory=2.2),  # it composes animations: two canvases and a copy, 16 bytes per pixel
    "bmp": Opener(BmpImageFile),
    "tiff": Opener(TiffImageFile),
    "ico": Opener(IcoImageFile),
    "jpeg2000": Opener(Jpeg2KImageFile, memory=2.7),  # 32-bit integers per channel inside OpenJPEG
    "avif": Opener(AvifImageFile, memory=1.3),
    "heif": Opener(HeifImageFile, decoder="pillow-heif"),
    "ppm": Opener(PpmImageFile),
}
SCALES = (1, 2, 4, 8)
JPEG_SCANS_MAX = 100  # a scan over 64 Mpixel takes 70 ms, however few bytes it has; encoders write 1 to 14
BAND_PIXELS = 1 << 20  # rows converted at a time, so that no second full-size copy exists
# Measured at 64 Mpixel, RSS over the start of the process.
PILLOW_BYTES_PER_PIXEL = 7
JPEG_BYTES_PER_PIXEL = 3
JPEG_WHOLE_BYTES_PER_PIXEL = 9  # and two bytes for each coefficient of three full-size channels
LARGE_BYTES = 16 << 20
BUDGET_BYTES = 448 << 20
# Words of the decoders that tell a kind of failure. Truncation is looked for first.
TRUNCATED_WORDS = ("truncated", "premature end of jpeg", "unexpected end", "end of file")
UNSUPPORTED_WORDS = ("unsupported", "cannot handle", "not supported", "unknown pixel mode", "not available")

_budget = MemoryBudget(BUDGET_BYTES)


def decode(encoded: bytes, pre: Preprocess) -> Decoded:
    """Upright RGB pixels of the first frame.

    Raises:
        BadImage: with a reason and the decoder's own words.
    """
    if not encoded:
        raise BadImage("empty", "zero bytes")
    kind = sniff(encoded)
    if kind is None:
        raise BadImage("not_an_image", f"no picture format starts with {encoded[:12]!r}")
    if kind == "jpeg":
        return _decode_jpeg(encoded, pre)
    if kind not in OPENERS:
        raise BadImage("unsupported_format", f"{kind} is not read here; convert it to PNG, JPEG or WebP")
    if kind == "png":
        encoded = still_png(encoded)
    elif kind == "ico":  # Pillow decodes it while opening
        for width, height in png_sizes_inside(encoded):
            _scale(width, height, pre.exact_pixels_max, can_scale=False)
    return _decode_pillow(kind, encoded, pre, can_scale=kind == "jpeg2000")


def _decode_jpeg(encoded: bytes, pre: Preprocess) -> Decoded:
    header = read_jpeg_header(encoded)
    if (header is None or header.whole_in_memory) and (scans := encoded.count(b"\xff\xda")) > JPEG_SCANS_MAX:
        raise BadImage("corrupt", f"{scans} scans: a picture has use for {JPEG_SCANS_MAX} at most")
    if header is None and has_endless_segments(encoded):
        raise BadImage("corrupt", f"more than {JPEG_SEGMENTS_MAX} segments before the first scan")
    if header is None:  # libjpeg skips what it does not understand between segments, and warns
        return _decode_pillow("jpeg", encoded, pre, mark="damaged")
    if header.components == 4:  # simplejpeg's CMYK is up to 2 levels off Pillow's
        return _decode_pillow("jpeg", encoded, pre, can_scale=not header.whole_in_memory)
    scale = _scale(header.width, header.height, pre.exact_pixels_max, not header.whole_in_memory)
    width, height = -(-header.width // scale), -(-header.height // scale)
    bytes_per_pixel = JPEG_WHOLE_BYTES_PER_PIXEL if header.whole_in_memory else JPEG_BYTES_PER_PIXEL
    try:
        with _budget.hold(width * height * bytes_per_pixel):
            # with both minima 0 it decodes at full size, else at the smallest of 1/8 to 1 that reaches them
            minima = (height, width) if scale > 1 else (0, 0)
            image = simplejpeg.decode_jpeg(encoded, min_height=minima[0], min_width=minima[1])
    except ValueError as error:
        return _second_opinion(encoded, pre, str(error), header)
    except MemoryError as error:
        raise _no_memory("simplejpeg") from error
    return Decoded(_upright(image, header.orientation), "scaled" if scale > 1 else "", "simplejpeg")


def _second_opinion(encoded: bytes, pre: Preprocess, words: str, header: JpegHeader) -> Decoded:
    """simplejpeg has refused: for corrupt data (a warning of libjpeg), or for a sampling it does not know."""
    if words.startswith("Premature end"):
        raise BadImage("truncated", f"simplejpeg: {words}")
    corrupt = words.startswith("Corrupt JPEG data") and "ICC" not in words
    try:
        mark: Mark = "damaged" if corrupt else ""
        return _decode_pillow("jpeg", encoded, pre, mark=mark, can_scale=not header.whole_in_memory)
    except BadImage as bad:
        reason = bad.failure.reason
        if header.bits in (12, 16) or header.lossless:  # valid, and no decoder here reads it
            reason = "unsupported_format"
        raise BadImage(reason, f"simplejpeg: {words}; {bad.failure.words}") from bad


def _decode_pillow(kind: Kind, encoded: bytes, pre: Preprocess, *, mark: Mark = "", can_scale: bool = False) -> Decoded:
    opener = OPENERS[kind]
    try:
        picture = opener.open(BytesIO(encoded))
        width, height = picture.size
        scale = _scale(width, height, int(pre.exact_pixels_max / opener.memory), can_scale)
        if scale > 1:
            _reduce(picture, scale)
        decoding_bytes = int(width * height / scale**2 * PILLOW_BYTES_PER_PIXEL * opener.memory)
        with _budget.hold(decoding_bytes):
            picture.load()
            orientation = _orientation(picture)
            image = _rgb(picture)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("too_large", f"{opener.decoder}: {_words(error)}") from error
    except MemoryError as error:
        raise _no_memory(opener.decoder) from error
    except Exception as error:  # decoders meet hostile bytes with any exception there is
        raise BadImage(_reason(error, kind, encoded), f"{opener.decoder}: {_words(error)}") from error
    return Decoded(_upright(image, orientation), mark or ("scaled" if scale > 1 else ""), opener.decoder)


def _scale(width: int, height: int, pixels_max: int, can_scale: bool) -> int:
    """The smallest of 1, 2, 4, 8 by which the decoder must reduce so that the picture fits.

    Raises:
        BadImage: none does, or the format (or this file's variant of it) saves no memory that way.
    """
    for scale in SCALES if can_scale else SCALES[:1]:
        if -(-width // scale) * -(-height // scale) <= pixels_max:
            return scale
    raise BadImage(
        "too_large",
        f"{width} x {height} pixels; this format is decoded up to {pixels_max / 1e6:.0f} Mpixel"
        + (f", even at 1/{SCALES[-1]}" if can_scale else ", and has no cheaper decode at reduced size"),
    )


def _reduce(picture: ImageFile, scale: int) -> None:
    if isinstance(picture, Jpeg2KImageFile):
        picture.reduce = scale.bit_length() - 1
    else:
        assert isinstance(picture, JpegImageFile), f"{type(picture).__name__} cannot decode at reduced size"
        picture.draft(None, (picture.width // scale, picture.height // scale))


def _orientation(picture: ImageFile) -> int:
    """As `ImageOps.exif_transpose` reads it, after loading; a broken EXIF block leaves the picture as it is."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, EOFError, AttributeError, struct.error):
        return 1
    return int(value) if value in range(1, 9) else 1


def _rgb(picture: ImageFile) -> Pixels:
    picture.info.pop("transparency", None)  # no part in RGB, but converting it can warn or fail
    width, height = picture.size
    image = np.empty((height, width, 3), np.uint8)
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        band = picture if rows >= height else picture.crop((0, top, width, bottom))
        image[top:bottom] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    return image


def _upright(image: Pixels, orientation: int) -> Pixels:
    """A view: copying 12 Mpixel by columns takes longer than decoding them, and the resize can do without."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image


def _no_memory(decoder: str) -> BadImage:
    """Its size was within bounds, so tonight's memory is to blame, not the picture: it is tried again in every run."""
    return BadImage("read_error", f"{decoder}: no memory to decode it")


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _reason(error: Exception, kind: Kind, encoded: bytes) -> Reason:
    words = str(error).lower()
    if isinstance(error, EOFError) or any(w in words for w in TRUNCATED_WORDS) or end_is_missing(kind, encoded):
        return "truncated"
    if isinstance(error, NotImplementedError) or any(w in words for w in UNSUPPORTED_WORDS):
        return "unsupported_format"
    return "corrupt"
