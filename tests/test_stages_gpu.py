"""Promise: GPU stages put every picture in its row, and nothing is read before it is there or given back too early.

Without a GPU: the CUDA runtime is one that runs nothing before somebody waits for it, a picture that is let go turns
into garbage at once, CV-CUDA is Pillow, and nvImageCodec decodes on the CPU. What is forgotten or mixed up comes out
wrong every time. With one, test_gpu_parity compares the real libraries.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lazy_gpu import LazyRuntime, cpu_engine, lazy_runtime
from lazy_stages_gpu import LazyCodec, load_stages
from PIL import Image

from engines import open_engine
from engines.memory_gpu import DeviceArray, OutOfGpuMemory, copy_to_host, device_array
from engines.spec import Artifact, Preprocess, find_artifact
from pipeline.batch import Batch, DeviceUnavailable, Failure
from pipeline.hardware_share_gpu import VARIABLE
from pipeline.stages_cpu import CpuStages
from tests.compare import STORED_SPREAD_ERROR_MAX, assert_same_vectors
from tests.pictures import noisy_jpeg
from tests.test_decode_cpu import encode, exif, picture

PRE = Preprocess(32, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# float32 products in another order; one level of 255 would be 0.015
CLOSE = 1e-5
runtime = pytest.fixture(lazy_runtime)


@pytest.fixture
def module(runtime: LazyRuntime, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_stages(runtime, monkeypatch)


@pytest.fixture
def stages(module: ModuleType) -> Iterator[Any]:
    made = module.GpuStages(PRE, threads=2)
    yield made
    made.close()
    BUFFERS.clear()


BUFFERS: list[DeviceArray] = []  # an engine's outlive the work that is queued on them


def buffer(rows: int, dtype: str = "float32") -> DeviceArray:
    BUFFERS.append(device_array((rows, 3, PRE.size, PRE.size), dtype))
    return BUFFERS[-1]


def on_host(stages: Any, out: DeviceArray) -> npt.NDArray[Any]:
    host = np.empty(out.shape, out.dtype)
    copy_to_host(host, out, stages.stream)
    stages.stream.synchronize()
    return host


def by_cpu(encoded: list[bytes]) -> tuple[Batch, npt.NDArray[np.float32]]:
    out = np.empty((len(encoded), 3, PRE.size, PRE.size), np.float32)
    stages = CpuStages(PRE, threads=2)
    try:
        return stages(Batch(np.arange(len(encoded)), list(encoded)), out), out
    finally:
        stages.close()


SOUND = [noisy_jpeg(seed, 90 + seed, 70 + 3 * (seed % 11)) for seed in range(12)]
DIRTY = [
    SOUND[0],
    b"",
    encode(picture(), "PNG"),
    SOUND[1],
    SOUND[2][:-500],
    encode(picture("CMYK"), "JPEG"),
    encode(picture(), "JPEG", exif=exif(6)),
    b"not a picture",
    encode(picture("RGB", 1, 200), "JPEG"),
    SOUND[3][:60] + SOUND[3][80:],  # a header that leads nowhere
    encode(picture("L"), "JPEG", progressive=True),
    encode(picture("P"), "GIF"),
    SOUND[4],
]


def test_every_picture_is_in_its_row_and_as_the_cpu_makes_it(stages: Any) -> None:
    out = buffer(16)
    batch = stages(Batch(np.arange(len(DIRTY)), list(DIRTY), slot=0), out)
    want, want_nchw = by_cpu(DIRTY)
    got_nchw = on_host(stages, out)[: len(DIRTY)]
    np.testing.assert_allclose(got_nchw, want_nchw, atol=CLOSE)
    assert batch.failed == want.failed
    assert len(batch.failed) == 4
    assert not got_nchw[list(batch.failed)].any(), "a failed row is zero"
    assert batch.marks == want.marks
    assert batch.decoders == {"nvimgcodec": 5, "pillow": 3, "simplejpeg": 1}
    assert (batch.encoded, batch.pixels_rows) == (None, len(DIRTY))


@pytest.mark.parametrize("where", range(4))
def test_a_bad_row_moves_nobody(stages: Any, where: int) -> None:
    out, encoded = buffer(4), SOUND[:4]
    stages(Batch(np.arange(4), list(encoded), slot=0), out)
    clean = on_host(stages, out)
    encoded[where] = b"\xff\xd8 no picture"
    batch = stages(Batch(np.arange(4), list(encoded), slot=0), out)
    others = [row for row in range(4) if row != where]
    np.testing.assert_array_equal(on_host(stages, out)[others], clean[others])
    assert set(batch.failed) == {where}


def test_rows_that_were_not_read_stay_failed_and_are_zero(stages: Any) -> None:
    failure, out = Failure("read_error", "gone"), buffer(3)
    batch = stages(Batch(np.arange(3), [SOUND[0], b"", SOUND[1]], slot=0, failed={1: failure}), out)
    assert batch.failed == {1: failure}
    assert not on_host(stages, out)[1].any()


def test_half_precision_input(stages: Any) -> None:
    out = buffer(16, "float16")
    stages(Batch(np.arange(len(DIRTY)), list(DIRTY), slot=0), out)
    np.testing.assert_allclose(on_host(stages, out)[: len(DIRTY)], by_cpu(DIRTY)[1], atol=0.002)


def test_nothing_waits_on_the_host(stages: Any, runtime: LazyRuntime) -> None:
    outs = [buffer(12) for _ in range(3)]
    for slot, out in enumerate(outs):  # page-locked memory of the slots is made at first use, with a wait
        stages(Batch(np.arange(12), list(SOUND), slot=slot), out)
    stages.stream.synchronize()
    waits = runtime.waits
    for slot, out in enumerate(outs):
        stages(Batch(np.arange(12), SOUND[slot:] + SOUND[:slot], slot=slot), out)
    assert runtime.waits == waits
    assert runtime.queues[stages.stream.handle], "nothing has run yet"
    want = by_cpu(SOUND)[1]
    for slot, out in enumerate(outs):
        np.testing.assert_allclose(on_host(stages, out), np.roll(want, -slot, axis=0), atol=CLOSE)


def test_decoded_pictures_stay_until_their_slot_is_filled_again(
    stages: Any,
) -> None:
    """Their memory would be somebody else's while the resize is still queued. And the check itself would notice."""
    out = buffer(12)
    stages(Batch(np.arange(12), list(SOUND), slot=0), out)
    np.testing.assert_allclose(on_host(stages, out), by_cpu(SOUND)[1], atol=CLOSE)
    stages(Batch(np.arange(12), list(SOUND), slot=0), out)
    stages.slots[0].held.clear()
    assert np.abs(on_host(stages, out) - by_cpu(SOUND)[1]).max() > 0.1


def test_large_batches_go_in_parts(module: ModuleType, stages: Any, runtime: LazyRuntime) -> None:
    out = buffer(len(DIRTY))
    stages(Batch(np.arange(len(DIRTY)), list(DIRTY), slot=0), out)
    whole, waits = on_host(stages, out), runtime.waits
    module.parts.__defaults__ = (3 * 10_000,)  # one or two pictures
    pixels = [module.gpu_pixels(encoded, PRE) for encoded in DIRTY]
    batch = stages(Batch(np.arange(len(DIRTY)), list(DIRTY), slot=0), out)
    assert runtime.waits == waits + len(list(module.parts(pixels))) - 1 >= waits + 2
    np.testing.assert_array_equal(on_host(stages, out), whole)
    assert batch.decoders == {"nvimgcodec": 5, "pillow": 3, "simplejpeg": 1}


@pytest.mark.parametrize("pixels", [[], [0, 0], [5], [99], [4, 4, 4], [5, 5, 1, 99, 0, 1], [0, 99, 99, 0]], ids=str)
def test_parts_are_all_rows_and_fit(module: ModuleType, pixels: list[int]) -> None:
    found = list(module.parts(pixels, limit_bytes=30))
    assert (found[0][0], found[-1][1]) == (0, len(pixels))
    assert all(before[1] == after[0] for before, after in pairwise(found))
    for start, stop in found:
        decoded = [count for count in pixels[start:stop] if count]
        assert len(decoded) <= 1 or 3 * sum(decoded) <= 30


def test_stage_and_engine_need_no_wait_between_them(stages: Any, runtime: LazyRuntime, tiny_model: Path) -> None:
    """The whole of a lane's loop, three batches in flight, against the CPU stage and engine."""
    artifact = find_artifact(str(tiny_model))
    assert artifact.spec.preprocess.size == PRE.size
    engine = cpu_engine(artifact)
    assert engine.slots == 3
    reference = open_engine(artifact, "vision", "ort-cpu", batch=12)
    batches = [SOUND[shift:] + SOUND[:shift] for shift in range(engine.slots)]
    for slot, encoded in enumerate(batches):
        batch = stages(Batch(np.arange(12), list(encoded), slot=slot), engine.input(slot))
        engine.launch(slot, len(batch.ids))
    for slot, encoded in enumerate(batches):
        reference.input(0)[:] = by_cpu(encoded)[1]
        reference.launch(0, 12)
        assert_same_vectors(engine.result(slot), reference.result(0), spread_error_max=STORED_SPREAD_ERROR_MAX)


def test_no_room_is_said_in_one_way(module: ModuleType, stages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ("NVCV_ERROR_OUT_OF_MEMORY: not enough", "CUDA Runtime failure: 'cudaErrorMemoryAllocation'"):

        def full(*args: Any, words: str = words, **more: Any) -> Any:
            raise RuntimeError(words)

        monkeypatch.setattr(module.cvcuda, "tvresize", full)
        with pytest.raises(OutOfGpuMemory, match="decoding and resizing 2 pictures"):
            stages(Batch(np.arange(2), SOUND[:2], slot=0), buffer(2))
    monkeypatch.setattr(module.cvcuda, "tvresize", lambda *args, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stages(Batch(np.arange(2), SOUND[:2], slot=0), buffer(2))


def test_a_full_gpu_is_not_taken_for_broken_pictures(
    stages: Any, runtime: LazyRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvImageCodec gives None for both. Rows that it merely refuses go to the CPU stage, unseen by the user."""
    plain, out = LazyCodec.decode, buffer(12)
    monkeypatch.setattr(
        LazyCodec, "decode", lambda self, encoded: ([*plain(self, encoded)[:-3]] + 3 * [None])[-len(encoded) :]
    )
    batch = stages(Batch(np.arange(12), list(SOUND), slot=0), out)
    assert batch.decoders == {"nvimgcodec": 9, "simplejpeg": 3}
    stages.stream.synchronize()
    runtime.bytes_left = 10_000
    with pytest.raises(OutOfGpuMemory, match=r"decoding 3 pictures \(\d+,\d+ bytes\) does not fit in GPU memory"):
        stages(Batch(np.arange(12), list(SOUND), slot=0), out)
    alone = stages(Batch(np.arange(1), SOUND[:1], slot=0), out)  # no batch is smaller
    assert (alone.decoders, alone.failed) == ({"simplejpeg": 1}, {})
    stages.stream.synchronize()
    runtime.bytes_left = 1 << 30
    assert stages(Batch(np.arange(12), list(SOUND), slot=0), out).failed == {}


def test_wrong_buffers_are_refused(stages: Any) -> None:
    with pytest.raises(ValueError, match=r"2 pictures, \(1, 3, 32, 32\)"):
        stages(Batch(np.arange(2), SOUND[:2], slot=0), buffer(1))
    with pytest.raises(ValueError, match="no encoded pictures"):
        stages(Batch(np.arange(2), slot=0), buffer(2))


# ---- canary --------------------------------------------------------------------------------------------------------


@pytest.fixture
def artifact(tiny_model: Path) -> Artifact:
    return find_artifact(str(tiny_model))


def test_the_canary_passes_right_pixels(module: ModuleType, stages: Any, artifact: Artifact) -> None:
    worst = module.canary(stages, artifact, [buffer(20), buffer(20)])
    assert 0 < worst.mean_levels <= module.CANARY_MEAN_LEVELS
    assert 0 <= worst.far_share <= module.CANARY_FAR_SHARE
    module.canary(stages, artifact, [buffer(20, "float16")])


def bilinear(image_hwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """So that a bicubic resize of the result has nothing left to do."""
    height, width = image_hwc.shape[:2]
    short = min(height, width)
    size = (PRE.size * width // short, PRE.size * height // short)
    return np.asarray(Image.fromarray(image_hwc).resize(size, Image.Resampling.BILINEAR))


SPOILED = {
    "zeros": np.zeros_like,
    "garbage": lambda image: np.random.default_rng(0).integers(0, 256, image.shape, np.uint8),
    "upside down": lambda image: image[::-1],
    "mirrored": lambda image: image[:, ::-1],
    "swapped channels": lambda image: image[:, :, ::-1],
    "moved by two": lambda image: np.roll(image, 2, axis=1),
    "brighter by one": lambda image: np.minimum(image, 254) + np.uint8(1),
    "bilinear": bilinear,
}


@pytest.mark.parametrize("mistake", SPOILED)
def test_the_canary_sees(
    module: ModuleType, stages: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    monkeypatch.setattr(LazyCodec, "spoil", staticmethod(SPOILED[mistake]))
    words = r"the GPU gives wrong pixels: row 0 .*\. NIGHTJAR_HARDWARE_SHARE=0 leaves .* or go on with --devices cpu"
    with pytest.raises(DeviceUnavailable, match=words):
        module.canary(stages, artifact, [buffer(20)])


def test_without_the_hardware_decoder_the_canary_does_not_blame_it(
    module: ModuleType, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LazyCodec, "spoil", staticmethod(np.zeros_like))
    monkeypatch.setenv(VARIABLE, "0")
    stages = module.GpuStages(PRE, threads=2)
    with pytest.raises(DeviceUnavailable, match=r"wrong pixels: [^:]*\. Update the NVIDIA driver"):
        module.canary(stages, artifact, [buffer(20)])
    stages.close()
    BUFFERS.clear()


def test_the_canary_sees_one_bad_row(
    module: ModuleType, stages: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a race between decoder and stream would leave it."""
    seen = iter(range(100))
    monkeypatch.setattr(
        LazyCodec, "spoil", staticmethod(lambda image: np.zeros_like(image) if next(seen) == 33 else image)
    )
    with pytest.raises(DeviceUnavailable, match="row 13 of buffer 1"):
        module.canary(stages, artifact, [buffer(20), buffer(20)])


def test_the_canary_sees_refusals(
    module: ModuleType, stages: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LazyCodec, "decode", lambda self, encoded: [None] * len(encoded))
    with pytest.raises(DeviceUnavailable, match=r"refused some of 20 JPEGs: \{'simplejpeg': 20\}"):
        module.canary(stages, artifact, [buffer(20)])
