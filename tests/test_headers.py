"""Promise: headers are read without decoding, from any bytes, and large pictures wait for memory."""

from __future__ import annotations

import threading

import numpy as np

from pipeline.decode_cpu import MemoryBudget
from pipeline.headers import end_is_missing, exif_orientation, png_sizes_inside, read_jpeg_header, sniff, still_png
from tests.test_decode_cpu import encode, exif, picture


def test_headers_never_raise() -> None:
    rng = np.random.default_rng(1)
    for start in (b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"RIFF", b"\0\0\0\x18ftypheic", b"GIF89a"):
        for _ in range(200):
            encoded = start + rng.bytes(int(rng.integers(0, 60)))
            kind = sniff(encoded)
            read_jpeg_header(encoded)
            still_png(encoded)
            png_sizes_inside(encoded)
            assert 0 <= exif_orientation(encoded) <= 8
            if kind is not None:
                end_is_missing(kind, encoded)


def test_jpeg_header() -> None:
    header = read_jpeg_header(encode(picture(), "JPEG", exif=exif(8), progressive=True))
    assert header is not None
    assert (header.width, header.height, header.components, header.bits) == (97, 61, 3, 8)
    assert (header.orientation, header.whole_in_memory, header.lossless) == (8, True, False)
    plain = read_jpeg_header(encode(picture("L"), "JPEG"))
    assert plain is not None
    assert (plain.components, plain.orientation, plain.whole_in_memory) == (1, 1, False)


def test_large_pictures_share_one_budget() -> None:
    budget = MemoryBudget(100 << 20)
    entered = threading.Event()

    def second() -> None:
        with budget.hold(60 << 20):
            entered.set()

    with budget.hold(60 << 20), budget.hold(1 << 20):  # small ones never wait
        waiting = threading.Thread(target=second)
        waiting.start()
        assert not entered.wait(0.2)
    assert entered.wait(5)
    waiting.join()
    with budget.hold(500 << 20):  # larger than all of it: alone
        pass
    assert budget.used_bytes == 0
