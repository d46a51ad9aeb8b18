"""Promise: any bytes give upright RGB as Pillow converts it, or a reason; in bounded memory, and never silently cut."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pillow_heif
import pytest
from PIL import Image, ImageOps

from engines.spec import Preprocess
from pipeline.batch import BadImage, Failure
from pipeline.decode_cpu import Decoded, decode
from pipeline.headers import end_is_missing, read_jpeg_header, still_png
from tests.pictures import noisy_jpeg

PRE = Preprocess(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def small_limit(pixels: int) -> Preprocess:
    return Preprocess(64, PRE.mean, PRE.std, exact_pixels_max=pixels)


def picture(mode: str = "RGB", width: int = 97, height: int = 61) -> Image.Image:
    return Image.open(io.BytesIO(noisy_jpeg(7, width, height))).convert(mode)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def failure(encoded: bytes, pre: Preprocess = PRE) -> Failure:
    with pytest.raises(BadImage) as caught:
        decode(encoded, pre)
    return caught.value.failure


def as_pillow_sees_it(encoded: bytes) -> npt.NDArray[np.uint8]:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    image.info.pop("transparency", None)
    return np.asarray(image.convert("RGB"))


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK", "YCbCr")),
        *(("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
        *(("TIFF", mode) for mode in ("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "LAB")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
        ("GIF", "P"), ("BMP", "RGB"), ("BMP", "P"), ("BMP", "1"), ("ICO", "RGBA"), ("JPEG2000", "RGB"),
        ("AVIF", "RGB"), ("PPM", "RGB"), ("PPM", "L"), ("PPM", "1"),
    ],
)  # fmt: skip
def test_every_format_and_mode_gives_what_pillow_gives(kind: str, mode: str) -> None:
    grey = np.asarray(picture("L"))
    image = Image.fromarray(grey.astype(np.uint16) * 200) if mode == "I;16" else picture("RGB").convert(mode)
    encoded = encode(image, kind)
    decoded = decode(encoded, PRE)
    np.testing.assert_array_equal(decoded.image_hwc, as_pillow_sees_it(encoded))
    fast = kind == "JPEG" and mode != "CMYK"
    assert (decoded.mark, decoded.decoder) == ("", "simplejpeg" if fast else "pillow")


def test_transparent_palettes_are_read_without_a_warning() -> None:
    image = picture().quantize(40)
    for transparency in (3, bytes(range(40))):
        encoded = encode(image, "PNG", transparency=transparency)
        np.testing.assert_array_equal(decode(encoded, PRE).image_hwc, np.asarray(image.convert("RGB")))


def test_heic() -> None:
    out = io.BytesIO()
    pillow_heif.from_pillow(picture()).save(out, quality=90)
    decoded = decode(out.getvalue(), PRE)
    assert (decoded.image_hwc.shape, decoded.decoder) == ((61, 97, 3), "pillow-heif")
    assert np.abs(decoded.image_hwc.astype(int) - np.asarray(picture())).mean() < 6
    assert failure(out.getvalue()[:-300]).reason == "truncated"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    encoded = encode(picture(), kind, exif=exif(orientation))
    got, upright = decode(encoded, PRE).image_hwc, as_pillow_sees_it(encoded)
    np.testing.assert_array_equal(got, upright)
    assert got.shape[:2] == ((61, 97) if orientation < 5 else (97, 61))


@pytest.mark.parametrize("quality", [30, 95])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_bit_for_bit_pillows(quality: int, subsampling: str, progressive: bool) -> None:
    encoded = encode(picture(), "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
    decoded = decode(encoded, PRE)
    np.testing.assert_array_equal(decoded.image_hwc, as_pillow_sees_it(encoded))
    assert decoded.decoder == "simplejpeg"


def test_orientation_in_xmp_counts_when_exif_has_none() -> None:
    xmp = b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    for encoded in (encode(picture(), "JPEG", xmp=xmp), encode(picture(), "JPEG", xmp=xmp, exif=exif(3))):
        np.testing.assert_array_equal(decode(encoded, PRE).image_hwc, as_pillow_sees_it(encoded))


def test_only_the_first_frame_is_read() -> None:
    frames = [picture(), picture().transpose(Image.Transpose.ROTATE_180)]
    for kind in ("GIF", "WEBP", "TIFF", "PNG", "AVIF", "MPO"):
        encoded = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(decode(encoded, PRE).image_hwc, as_pillow_sees_it(encoded))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_a_broken_animation_or_a_text_bomb_does_not_spoil_a_png() -> None:
    png = encode(picture(), "PNG", exif=exif(6))
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000), 9))
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(5_000_000)))
    frames = chunk(b"acTL", struct.pack(">II", 3, 0)) + bomb + profile
    spoilt = png[:33] + frames + png[33:-12] + chunk(b"fdAT", b"\0\0\0\x09nonsense") + png[-12:]
    np.testing.assert_array_equal(decode(spoilt, PRE).image_hwc, decode(png, PRE).image_hwc)
    assert still_png(png) == png


# ---- cut off, damaged, surrounded by other things ------------------------------------------------------------------


def with_thumbnail() -> bytes:
    """A JPEG whose EXIF block holds a smaller JPEG, with its own end of image."""
    thumbnail = noisy_jpeg(3, 32, 32)
    segment = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail
    whole = noisy_jpeg(4)
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + whole[2:]


@pytest.mark.parametrize("which", ["baseline", "progressive", "with thumbnail"])
def test_a_jpeg_cut_anywhere_is_truncated(which: str) -> None:
    whole = {
        "baseline": noisy_jpeg(4),
        "progressive": encode(picture(), "JPEG", progressive=True),
        "with thumbnail": with_thumbnail(),
    }[which]
    assert decode(whole, PRE).mark == ""
    assert not end_is_missing("jpeg", whole)
    header = read_jpeg_header(whole)
    assert header is not None
    for cut in (*range(header.scan_at, len(whole) - 2, 97), len(whole) - 2, len(whole) - 1):
        assert failure(whole[:cut]).reason == "truncated", f"cut at {cut} of {len(whole)}"
        assert end_is_missing("jpeg", whole[:cut])
    for cut in (2, 3, 20, header.scan_at // 2, header.scan_at, header.scan_at + 3):
        assert failure(whole[:cut]).reason == "truncated", f"cut at {cut} of {len(whole)}"
    middle = (header.scan_at + len(whole)) // 2
    zero_filled = whole[:middle] + bytes(len(whole) - middle)
    assert failure(zero_filled).reason == "truncated"


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF"])
def test_other_formats_cut_anywhere_fail(kind: str) -> None:
    whole = encode(picture("P" if kind == "GIF" else "RGB"), kind)
    for share in (0.3, 0.5, 0.8, 0.95):
        assert failure(whole[: int(len(whole) * share)]).reason in ("truncated", "corrupt")


def test_bytes_behind_the_picture_do_not_matter() -> None:
    whole = noisy_jpeg(4)
    for tail in (b"\0" * 5000, noisy_jpeg(5), bytes(range(256)) * 10, b"\xff"):
        decoded = decode(whole + tail, PRE)
        np.testing.assert_array_equal(decoded.image_hwc, decode(whole, PRE).image_hwc)
        assert decoded.mark == ""


def test_damage_that_still_decodes_is_marked() -> None:
    whole = noisy_jpeg(4)
    damaged = decode(whole[:-2] + bytes(range(1, 100)) + whole[-2:], PRE)
    assert (damaged.mark, damaged.decoder) == ("damaged", "pillow")
    assert decode(whole, PRE).mark == ""


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "empty"),
        (b"\n", "not_an_image"),
        (b"<!DOCTYPE html><html>404</html>", "not_an_image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not_an_image"),
        (bytes(4096), "not_an_image"),
        (b"\xff\xd8\xff" + bytes(range(200)), "corrupt"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "corrupt"),
        (b"\xff\x0a" + bytes(50), "unsupported_format"),
        (b"8BPS\0\1" + bytes(50), "unsupported_format"),
    ],
)
def test_what_is_not_a_picture_says_so(encoded: bytes, reason: str) -> None:
    got = failure(encoded)
    assert got.reason in (reason, "truncated") if reason == "corrupt" else got.reason == reason
    assert got.words


def test_no_bytes_make_it_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    kinds = [encode(picture("P" if kind == "GIF" else "RGB", 40, 30), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP")]
    kinds += [encode(picture("RGB", 40, 30), kind) for kind in ("BMP", "JPEG2000", "ICO")]
    for number in range(400):
        encoded = bytearray(kinds[number % len(kinds)])
        for _ in range(int(rng.integers(1, 12))):
            encoded[int(rng.integers(4, len(encoded)))] = int(rng.integers(256))
        try:
            decoded: Decoded | None = decode(bytes(encoded[: int(rng.integers(8, len(encoded) + 1))]), PRE)
        except BadImage:
            continue
        assert decoded is not None
        assert decoded.image_hwc.dtype == np.uint8


# ---- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "shape"), [(400 * 300, (300, 400)), (119_999, (150, 200)), (8_000, (75, 100))])
def test_a_jpeg_above_the_limit_is_decoded_smaller(limit: int, shape: tuple[int, int]) -> None:
    for mode in ("RGB", "L", "CMYK"):
        decoded = decode(encode(picture(mode, 400, 300), "JPEG"), small_limit(limit))
        assert decoded.image_hwc.shape == (*shape, 3)
        assert decoded.mark == ("scaled" if shape != (300, 400) else "")
    small = Image.fromarray(decode(noisy_jpeg(7, 400, 300), small_limit(limit)).image_hwc).resize((40, 30))
    whole = picture("RGB", 400, 300).resize((40, 30))
    assert np.abs(np.asarray(small, int) - np.asarray(whole, int)).mean() < 3


def test_jpeg_2000_above_the_limit_is_decoded_smaller() -> None:
    decoded = decode(encode(picture("RGB", 400, 300), "JPEG2000"), small_limit(100_000))
    assert (decoded.image_hwc.shape, decoded.mark) == ((150, 200, 3), "scaled")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "progressive JPEG"])
def test_what_cannot_be_decoded_smaller_is_too_large(kind: str) -> None:
    image = picture("P" if kind == "GIF" else "RGB", 400, 300)
    encoded = encode(image, kind.split()[-1], **({"progressive": True} if " " in kind else {}))
    got = failure(encoded, small_limit(50_000))
    assert got.reason == "too_large"
    assert "400 x 300" in got.words


def test_a_header_that_claims_too_much_allocates_nothing() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    assert failure(png).reason == "too_large"
    jpeg = bytearray(noisy_jpeg(1))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_535, 65_535)
    assert failure(bytes(jpeg)).reason == "too_large"


def test_an_icon_is_as_large_as_the_png_inside() -> None:
    icon = bytearray(encode(picture("RGBA", 32, 32), "ICO", sizes=[(32, 32)]))
    at = icon.index(b"IHDR") + 4
    icon[at : at + 8] = struct.pack(">II", 12_000, 9_000)
    got = failure(bytes(icon))
    assert got.reason == "too_large"
    assert "12000 x 9000" in got.words


def test_endless_scans_are_refused() -> None:
    whole = encode(picture(), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    assert "scans" in failure(whole[:last] + whole[last:-2] * 101 + whole[-2:]).words
