"""Promise: pixels of the CPU stages are those of the PIL reference, bit for bit, and a bad row never moves another."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps
from transformers import CLIPImageProcessorPil

from engines.spec import Preprocess
from pipeline import resize_cpu
from pipeline.batch import Batch, Failure
from pipeline.decode_cpu import decode
from pipeline.resize_cpu import resize_crop
from pipeline.stages_cpu import CpuStages
from tests.compare import assert_pixels_close
from tests.pictures import noisy_jpeg

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Pixels = npt.NDArray[np.uint8]


def preprocess(size: int = 64, **limits: int) -> Preprocess:
    return Preprocess(size, MEAN, STD, **limits)


def reference(picture: Image.Image, size: int) -> Pixels:
    """(3, S, S) levels as the PIL image processor gives them before it normalises."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_rescale=False,
        do_normalize=False,
    )
    pixels = processor(images=picture, return_tensors="np")["pixel_values"][0]
    return np.asarray(pixels, np.uint8)


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    """Black or white at random: overshoot everywhere, the hardest picture for a resampler to agree on."""
    return np.random.default_rng(seed).integers(0, 2, (height, width, 3), np.uint8) * 255


def structure(height: int, width: int, seed: int = 0) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(noisy_jpeg(seed, width, height)))).copy()


SHAPES = [
    (375, 500), (500, 375), (64, 64), (65, 64), (64, 65), (63, 80),  # around the size of the model
    (160, 160), (161, 300), (300, 161), (700, 161), (900, 200), (200, 900),
    (1, 1), (1, 2), (2, 1), (3, 3), (1, 7), (7, 1), (2, 300), (300, 2), (90, 400), (400, 90), (130, 70), (141, 70),
]  # fmt: skip


@pytest.fixture(params=["compiled", "pillow", "numpy"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts without a C compiler resize with Pillow, or numpy where that would take too much memory: the same bits."""
    if request.param != "compiled":
        monkeypatch.setattr(resize_cpu, "compiled_kernel", lambda: None)
    if request.param == "numpy":
        monkeypatch.setattr(resize_cpu, "PILLOW_AREA_MAX", 0)


def test_the_kernel_was_compiled() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler: Pillow does its work")
    assert resize_cpu.compiled_kernel() is not None, "pip install -e . must compile pipeline/resize.c"


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_resize_and_crop_give_the_bits_of_the_reference(shape: tuple[int, int]) -> None:
    for picture in (noise(*shape), structure(*shape)):
        np.testing.assert_array_equal(
            resize_crop(picture, preprocess()), reference(Image.fromarray(picture), 64), strict=True
        )


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("size", [32, 35, 224])  # 35: planes that end within a block of 16
def test_random_shapes_give_the_bits_of_the_reference(size: int) -> None:
    rng = np.random.default_rng(size)
    for _ in range(60):
        height, width = (int(x) for x in 2 ** rng.uniform(2, 9, 2))
        picture = noise(height, width, int(rng.integers(1000)))
        np.testing.assert_array_equal(resize_crop(picture, preprocess(size)), reference(Image.fromarray(picture), size))


def test_views_of_any_strides_are_read_in_place() -> None:
    picture = noise(90, 130)
    views = [picture[::-1], picture[:, ::-1], picture[::2, ::3], picture.transpose(1, 0, 2)[::-1], picture[3:50, 5:9]]
    for view in views:
        want = reference(Image.fromarray(np.ascontiguousarray(view)), 64)
        np.testing.assert_array_equal(resize_crop(view, preprocess()), want)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("shape", [(60_000, 1), (1, 60_000), (2, 50_000), (50_000, 2), (1, 12_000_000)], ids=str)
def test_a_line_of_pixels_costs_no_more_than_its_crop(shape: tuple[int, int]) -> None:
    """Resized as a whole, 1 x 60,000 is 224 x 13 million pixels: 9 GB. Its middle 40 pixels have the same crop."""
    picture = noise(*shape)
    start = max(shape) // 2 - 20
    middle = picture[start : start + 40, :40] if shape[0] > shape[1] else picture[:40, start : start + 40]
    np.testing.assert_array_equal(resize_crop(picture, preprocess(224)), reference(Image.fromarray(middle), 224))


@pytest.mark.parametrize("shape", [(500, 375), (100, 140)], ids=str)
@pytest.mark.parametrize("mistake", ["bilinear", "swapped channels", "swapped rows", "moved by one"])
def test_the_comparison_rejects_a_wrong_picture(shape: tuple[int, int], mistake: str) -> None:
    picture = structure(*shape)
    got, want = resize_crop(picture, preprocess()), reference(Image.fromarray(picture), 64)
    small = (int(64 * shape[1] / min(shape)), int(64 * shape[0] / min(shape)))
    soft = Image.fromarray(picture).resize(small, Image.Resampling.BILINEAR)
    wrong = {
        "bilinear": reference(soft, 64),
        "swapped channels": want[::-1],
        "swapped rows": want[:, ::-1],
        "moved by one": np.roll(want, 1, axis=2),
    }
    with pytest.raises(AssertionError, match="levels"):
        assert_pixels_close(got, wrong[mistake])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(90, 120), (221, 340), (500, 163)], ids=str)
def test_rotated_pictures_are_resized_upright(orientation: int, shape: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.fromarray(structure(*shape)).save(out, "JPEG", exif=exif, quality=95)
    stored = Image.open(out)
    want = reference(ImageOps.exif_transpose(stored), 64)
    image = decode(out.getvalue(), preprocess()).image_hwc
    got = resize_crop(image, preprocess())
    assert_pixels_close(got, want)  # decoders may differ by a level, the resize does not
    np.testing.assert_array_equal(got, resize_crop(np.ascontiguousarray(image), preprocess()))
    if orientation != 1:
        with pytest.raises(AssertionError):
            assert_pixels_close(got, reference(stored, 64))


# ---- batches -----------------------------------------------------------------------------------------------------


class Board:
    def __init__(self) -> None:
        self.log: list[tuple[str, int, int]] = []
        self.deadlines: list[float] = []

    def start(self, worker: int, row_id: int, deadline_s: float) -> None:
        self.log.append(("start", worker, row_id))
        self.deadlines.append(deadline_s)

    def finish(self, worker: int) -> None:
        self.log.append(("finish", worker, 0))


@pytest.fixture
def stages() -> Iterator[CpuStages]:
    stages = CpuStages(preprocess(), threads=2)
    yield stages
    stages.close()


def run(stages: CpuStages, encoded: list[bytes], failed: dict[int, Failure] | None = None) -> tuple[Batch, Pixels]:
    out = np.full((len(encoded) + 2, 3, 64, 64), 7, np.float32)
    batch = Batch(np.arange(100, 100 + len(encoded)), encoded, failed=failed or {})
    return stages(batch, out), out


def test_a_row_is_the_normalised_picture(stages: CpuStages) -> None:
    pictures = [noisy_jpeg(seed, 90 + seed, 200 - seed) for seed in range(5)]
    batch, out = run(stages, pictures)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=MEAN, image_std=STD
    )
    for row, encoded in enumerate(pictures):
        want = processor(images=Image.open(io.BytesIO(encoded)), return_tensors="np")["pixel_values"][0]
        levels = (out[row] - want) * 255 * np.array(STD).reshape(3, 1, 1)
        assert np.abs(levels).max() < 1.001
    assert (batch.pixels_rows, batch.encoded, batch.failed, batch.marks) == (5, None, {}, {})
    assert batch.decoders == {"simplejpeg": 5}
    assert (out[5:] == 7).all(), "rows behind the batch belong to nobody"


def test_bad_rows_keep_their_place_and_leave_their_neighbours_alone(stages: CpuStages) -> None:
    good = [noisy_jpeg(seed) for seed in range(6)]
    _, alone = run(stages, good)
    unread = Failure("read_error", "gone")
    encoded = [good[0], b"", good[2], good[3][:700], b"", good[5]]
    batch, out = run(stages, encoded, {4: unread})
    assert {row: failure.reason for row, failure in batch.failed.items()} == {
        1: "empty", 3: "truncated", 4: "read_error",
    }  # fmt: skip
    assert batch.failed[4] is unread
    for row in (0, 2, 5):
        np.testing.assert_array_equal(out[row], alone[row])
    assert not out[[1, 3, 4]].any()
    assert batch.decoders == {"simplejpeg": 3}


def test_marks_and_decoders_are_kept_per_row(stages: CpuStages) -> None:
    whole, png = noisy_jpeg(1), io.BytesIO()
    Image.fromarray(structure(80, 96)).save(png, "PNG")
    damaged = whole[:-2] + bytes(range(1, 200)) + whole[-2:]
    batch, _ = run(stages, [whole, damaged, png.getvalue()])
    assert batch.marks == {1: "damaged"}
    assert batch.decoders == {"simplejpeg": 1, "pillow": 2}


def test_threads_do_not_change_pixels() -> None:
    encoded = [noisy_jpeg(seed, 100 + 17 * seed, 90 + 40 * seed) for seed in range(9)]
    outs = []
    for threads in (1, 3):
        stages = CpuStages(preprocess(), threads)
        outs.append(run(stages, encoded)[1])
        stages.close()
    np.testing.assert_array_equal(outs[0], outs[1])


def test_every_picture_is_posted_before_it_is_decoded() -> None:
    board = Board()
    stages = CpuStages(preprocess(), 2, board)
    run(stages, [noisy_jpeg(0), b"bad", noisy_jpeg(2), b""], {3: Failure("read_error", "")})
    stages.close()
    assert sorted(row for what, _, row in board.log if what == "start") == [100, 101, 102]
    for worker in (0, 1):
        mine = [what for what, who, _ in board.log if who == worker]
        assert mine == ["start", "finish"] * (len(mine) // 2)
    assert {who for _, who, _ in board.log} <= {0, 1}
    assert min(board.deadlines) >= 10


def test_a_wrong_buffer_is_refused(stages: CpuStages) -> None:
    batch = Batch(np.arange(2), [noisy_jpeg(0), noisy_jpeg(1)])
    with pytest.raises(ValueError, match=r"expected .* \(3, 64, 64\)"):
        stages(batch, np.empty((2, 3, 32, 32), np.float32))
    with pytest.raises(ValueError, match="2 pictures"):
        stages(batch, np.empty((1, 3, 64, 64), np.float32))
