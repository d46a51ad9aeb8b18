"""Promise: what the GPU's decoder gets, it decodes as the CPU does; all else goes to the CPU stage, and here is why.

nvImageCodec runs in its CPU-only mode here, with the options, routing and orientation of the GPU lane; the decoders of
the GPU itself are compared in test_stages_gpu, where there is one.
"""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from engines.spec import Preprocess
from pipeline import decode_gpu
from pipeline.batch import BadImage, DeviceUnavailable
from pipeline.decode_cpu import Decoded, decode
from pipeline.decode_gpu import THIN, Codec, gpu_pixels
from pipeline.devices import EngineWish, plan
from pipeline.hardware_share_gpu import VARIABLE
from pipeline.headers import sniff
from pipeline.setting import Setting
from tests.pictures import noisy_jpeg
from tests.test_decode_cpu import encode, exif, picture
from tests.test_real_pictures import manifest

PRE = Preprocess(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(threads=1, stream=None)


def assert_same_as_cpu(codec: Codec, encoded: bytes) -> None:
    (image,) = codec.decode([encoded])
    np.testing.assert_array_equal(np.asarray(image), decode(encoded, PRE).image_hwc)


# ---- the routing table, on generated pictures ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}], ids=str)
@pytest.mark.parametrize("size", [(97, 61), (8, 8), (1, 1), (1, 16), (640, 41)], ids=str)
def test_sound_jpegs_go_to_the_gpu_and_come_out_the_same(
    codec: Codec, mode: str, options: dict[str, int], size: tuple[int, int]
) -> None:
    encoded = encode(picture(mode, *size), "JPEG", **options)
    assert gpu_pixels(encoded, PRE) == size[0] * size[1]
    assert_same_as_cpu(codec, encoded)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(codec: Codec, orientation: int) -> None:
    encoded = encode(picture(), "JPEG", exif=exif(orientation))
    assert gpu_pixels(encoded, PRE)
    assert_same_as_cpu(codec, encoded)


def with_segment(encoded: bytes, marker: int, body: bytes) -> bytes:
    return encoded[:2] + bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body + encoded[2:]


def test_what_the_gpu_must_not_get() -> None:
    sound = noisy_jpeg(1)
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"/>'
    twelve_bits = sound.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")
    assert twelve_bits != sound
    refused = {
        "nothing": b"",
        "words": b"no picture",
        "cut off": sound[:-900],
        "without its last byte": sound[:-1],
        "without its end": sound[:-2],
        "cut off, a thumbnail's end before": with_segment(sound, 0xE1, b"Exif\0\0" + b"\xff\xd9" * 9)[:-900],
        "header alone": sound[:200],
        "orientation in XMP alone": with_segment(sound, 0xE1, xmp),
        "12 bits": twelve_bits,
        "CMYK": encode(picture("CMYK"), "JPEG"),
        "thin": encode(picture("RGB", 1, THIN + 1), "JPEG"),
        "flat": encode(picture("RGB", 2 * THIN + 1, 2), "JPEG"),
        "a bomb of scans": encode(picture(), "JPEG", progressive=True)[:-2] + b"\xff\xda\x00\x02" * 200 + b"\xff\xd9",
        **{kind: encode(picture(), kind) for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")},
    }
    assert {name for name, encoded in refused.items() if gpu_pixels(encoded, PRE)} == set()
    limit = Preprocess(64, PRE.mean, PRE.std, exact_pixels_max=97 * 61 - 1)
    assert gpu_pixels(encode(picture(), "JPEG"), PRE)
    assert not gpu_pixels(encode(picture(), "JPEG"), limit), "decoded at reduced size, by the CPU"


@pytest.mark.parametrize("tail", [b"trailing bytes", noisy_jpeg(2), b"\0" * 5000], ids=["words", "jpeg", "zeros"])
def test_bytes_after_the_end_do_no_harm(codec: Codec, tail: bytes) -> None:
    encoded = noisy_jpeg(1) + tail
    assert gpu_pixels(encoded, PRE)
    assert_same_as_cpu(codec, encoded)


def test_a_refused_picture_keeps_its_place(codec: Codec) -> None:
    images = codec.decode([noisy_jpeg(1), b"no picture", noisy_jpeg(2), b"", noisy_jpeg(1)[:300]])
    assert [image is None for image in images] == [False, True, False, True, True]


def test_a_missing_nvjpeg_is_an_error_not_a_slow_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvImageCodec itself says one line on stderr and decodes on the CPU."""
    monkeypatch.setattr(Path, "read_text", lambda path: "libnvjpeg_ext.so.0.9.0")
    with pytest.raises(DeviceUnavailable, match="pip install 'nvidia-nvimgcodec"):
        Codec(threads=1, stream=1)


def test_upload_keeps_pixels(codec: Codec) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(codec.upload(pixels)), pixels)


# ---- every real file -----------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    path: str
    expect: str
    kind: str | None
    routed: bool  # to the GPU
    cpu: Decoded | BadImage
    differs: float | None  # largest difference in levels; inf for another size; None where nvImageCodec refuses it


def look(codec: Codec, row: dict[str, str], encoded: bytes) -> Seen:
    (image,) = codec.decode([encoded])
    cpu: Decoded | BadImage
    try:
        cpu = decode(encoded, PRE)
    except BadImage as bad:
        cpu = bad
    differs = None
    if image is not None:
        differs = largest_difference(np.asarray(image), cpu.image_hwc) if isinstance(cpu, Decoded) else float("inf")
    if isinstance(cpu, Decoded):
        cpu = Decoded(np.empty((0, 0, 3), np.uint8), cpu.mark, cpu.decoder)  # 1,000 pictures would not fit
    return Seen(row["path"], row["expect"], sniff(encoded), gpu_pixels(encoded, PRE) > 0, cpu, differs)


def largest_difference(got: npt.NDArray[np.uint8], want: npt.NDArray[np.uint8]) -> float:
    if got.shape != want.shape:
        return float("inf")
    return float(np.abs(got.astype(np.int16) - want).max())


@pytest.fixture(scope="module")
def seen(shared_data: Path, codec: Codec) -> list[Seen]:
    warnings.simplefilter("ignore")  # of Pillow, about metadata
    found = []
    for row in manifest(shared_data):
        encoded = (shared_data / row["path"]).read_bytes()
        # Bombs are for the CPU; and a broken JPEG 2000 (bad/jp2/pil_balloon_*) takes nvImageCodec's process down.
        if row["expect"] in ("decode", "optional") or (row["expect"] != "bounded" and sniff(encoded) in ("jpeg", None)):
            found.append(look(codec, row, encoded))
    return found


def test_same_pixels_as_the_cpu_on_every_file_routed_to_the_gpu(seen: list[Seen]) -> None:
    routed = [one for one in seen if one.routed and one.expect == "decode"]
    assert len(routed) > 340, "of 640 pictures, 366 of them JPEGs"
    refused = [one for one in routed if one.differs is None]
    assert not [one for one in routed if one.differs], "other pixels"
    assert len(refused) <= 2, "the CPU stage looks at these once more"
    assert all(isinstance(one.cpu, Decoded) and one.cpu.mark == "damaged" for one in refused)


def test_what_must_be_reported_is_never_decoded_on_the_gpu(seen: list[Seen]) -> None:
    broken = [one for one in seen if one.expect == "report"]
    assert len(broken) > 100
    assert not [one.path for one in broken if one.routed and one.differs is not None]


def test_truncated_pictures_all_go_to_the_cpu(shared_data: Path) -> None:
    broken = [row["path"] for row in manifest(shared_data) if row["expect"] == "report"]
    cut = [path for path in broken if path.startswith("bad/truncated/")]
    assert len(cut) > 50
    assert not [path for path in cut if gpu_pixels((shared_data / path).read_bytes(), PRE)]


def test_only_jpegs_go_to_the_gpu(shared_data: Path) -> None:
    """Whatever their bytes and names: nothing hostile reaches the decoders that nvImageCodec has for other formats."""
    for row in manifest(shared_data):
        encoded = (shared_data / row["path"]).read_bytes()
        assert sniff(encoded) == "jpeg" or not gpu_pixels(encoded, PRE), row["path"]


def test_each_kind_kept_from_the_gpu_has_a_reason(seen: list[Seen]) -> None:
    """As in the table of decode_gpu. When a new version of nvImageCodec makes this fail, the table may get shorter."""
    decodable = [one for one in seen if one.expect in ("decode", "optional") and isinstance(one.cpu, Decoded)]
    differ, refused = defaultdict(list), defaultdict(list)
    for one in decodable:
        if one.differs is None:
            refused[one.kind].append(one.path)
        elif one.differs and not (isinstance(one.cpu, Decoded) and one.cpu.mark == "scaled"):
            differ[one.kind].append(one.path)
    assert set(differ) == {"png", "webp", "bmp", "tiff", "jpeg"}
    assert {"gif", "avif", "heif", "ico", "bmp", "jpeg2000"} <= set(refused)
    assert all(path.startswith("format/jpeg_cmyk/") for path in differ["jpeg"])
    for kind in ("gif", "avif", "heif", "ico"):
        assert len(refused[kind]) == sum(one.kind == kind for one in decodable), f"nvImageCodec reads {kind} now"


def test_the_comparison_rejects_a_picture_that_is_not_upright(codec: Codec) -> None:
    encoded = encode(picture(), "JPEG", exif=exif(3))
    stored = np.asarray(Image.open(io.BytesIO(encoded)))
    (image,) = codec.decode([encoded])
    assert largest_difference(np.asarray(image), stored) > 10


def test_the_options_say_fancy_upsampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it chroma is up to 91 levels off; unknown options are ignored in silence, so a typo must show here."""
    encoded = encode(picture("RGB", 200, 150), "JPEG", subsampling=2)
    want = decode(encoded, PRE).image_hwc
    real = decode_gpu.nvimgcodec.Decoder

    def plain(*args: object, options: str, **more: object) -> object:
        assert options == ":fancy_upsampling=1"
        return real(*args, options=":fancy_upsampling=0", **more)

    monkeypatch.setattr(decode_gpu.nvimgcodec, "Decoder", plain)
    (image,) = Codec(threads=1, stream=None).decode([encoded])
    assert largest_difference(np.asarray(image), want) > 3


@pytest.mark.parametrize(
    ("said", "asked", "share"),
    [(None, 0.65, 0.65), ("", 0.65, 0.65), ("0.3", 0.65, 0.3), ("1", 0.65, 0.65), ("0", 0.65, 0.0), ("0.3", 0.0, 0.0)],
)
def test_who_decodes_on_a_gpu(monkeypatch: pytest.MonkeyPatch, said: str | None, asked: float, share: float) -> None:
    """All that can decode a JPEG, in one chain. The hardware's decoder is not even made where it gets nothing."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(decode_gpu.nvimgcodec, "Decoder", lambda **how: given.update(how))
    monkeypatch.setattr(decode_gpu.nvimgcodec, "Backend", lambda kind, load_hint: (kind, load_hint))
    monkeypatch.delenv(VARIABLE, raising=False)
    if said is not None:
        monkeypatch.setenv(VARIABLE, said)
    codec = Codec(threads=3, stream=77, hardware_share=asked)
    n = decode_gpu.nvimgcodec
    engine = {n.HW_GPU_ONLY: share} if share else {}
    assert dict(given["backends"]) == {**engine, n.HYBRID_CPU_GPU: 1.0, n.CPU_ONLY: 1.0}
    assert (given["device_id"], given["max_num_cpu_threads"]) == (0, 3)
    assert codec.hardware_share == share
    (lane,) = plan(("gpu:0",), cast(EngineWish, None), "named", trial=Setting(1, 1, 3, 2, hardware_share=asked)).lanes
    assert lane.setting.hardware_share == share, "a run says what its lanes do"


@pytest.mark.parametrize("said", ["none", "-0.1", "1.5", "nan"])
def test_a_share_that_is_none_is_refused_with_what_it_may_be(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv(VARIABLE, said)
    with pytest.raises(DeviceUnavailable, match=f"{VARIABLE} is '{said}', expected a number from 0 to 1: 0 leaves"):
        Codec(threads=1, stream=77)
