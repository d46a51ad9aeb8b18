"""Decode and preprocess on the host: `CpuStages` turns a batch of encoded pictures into rows of an engine's input.

The reference is the PIL image processor of Hugging Face: shortest edge to S by bicubic with antialias on uint8, long
edge int(S * long / short), centre crop, (x / 255 - mean) / std. `resize_crop` stays within one level of it.

A 500-pixel JPEG costs one core 1.0 ms of decoding, 2.3 ms of resizing and 0.07 ms of normalising. From 2.5 to 1 on,
torch's uint8 kernel resizes 4 to 8 times faster than Pillow. Below, its 16-bit weights put one pixel in a million two
levels off (0.7 instead of 2.3 ms), so there Pillow works, on the part of the picture that the crop shows. Both release
the GIL, and so does simplejpeg: a pool of threads scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from engines.spec import Preprocess
from pipeline.batch import BadImage, Batch, Failure, Mark
from pipeline.decode_cpu import Decoded, Pixels, decode

__all__ = ["CpuStages", "Decoded", "Posted", "decode", "resize_crop"]

DEADLINE_S = 60.0  # the slowest picture of 64 Mpixel takes 10 s (JPEG 2000)
# 2.5: no pixel more than one level off in 1.4e9; at 2.1 there are 4e-9 of them, at 1.3 there are 1e-6
TORCH_SCALE_MIN = 2.5
CUBIC_SUPPORT = 2.0
SPARE_PIXELS = 0


class Posted(Protocol):
    """Where a worker says what it has in hand, so that a crash or a hang can be blamed."""

    def start(self, worker: int, row_id: int, deadline_s: float) -> None: ...
    def finish(self, worker: int) -> None: ...


class RowResult(NamedTuple):
    row: int
    mark: Mark
    decoder: str
    failure: Failure | None


class CpuStages:
    """One per lane; owns `threads` decoding threads."""

    def __init__(self, pre: Preprocess, threads: int, posted: Posted | None = None) -> None:
        self.pre, self.threads, self.posted = pre, threads, posted
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        std, mean = np.array(pre.std, np.float64), np.array(pre.mean, np.float64)
        self.scale = (1 / (255 * std)).astype(np.float32).reshape(3, 1, 1)
        self.shift = (-mean / std).astype(np.float32).reshape(3, 1, 1)

    def __call__(self, batch: Batch, out_nchw: npt.NDArray[np.float32]) -> Batch:
        """Fill row i of `out_nchw` from picture i; a failed row keeps its place and is zero."""
        rows, shape = len(batch.ids), (3, self.pre.size, self.pre.size)
        if batch.encoded is None or out_nchw.shape[1:] != shape or len(out_nchw) < rows:
            have = "no encoded pictures" if batch.encoded is None else f"{rows} pictures"
            raise ValueError(f"expected encoded pictures and a buffer (>= rows, {shape}), got {have}, {out_nchw.shape}")
        todo = iter(range(rows))  # shared: `next` on it is atomic, so a slow picture holds up only its own worker
        results = self.pool.map(lambda worker: self._work(worker, todo, batch, out_nchw), range(self.threads))
        for result in sorted(result for part in results for result in part):
            if result.failure is not None:
                batch.failed[result.row] = result.failure
                continue
            batch.decoders[result.decoder] = batch.decoders.get(result.decoder, 0) + 1
            if result.mark:
                batch.marks[result.row] = result.mark
        batch.encoded, batch.pixels_rows = None, rows
        return batch

    def close(self) -> None:
        self.pool.shutdown()

    def _work(
        self, worker: int, todo: Iterator[int], batch: Batch, out_nchw: npt.NDArray[np.float32]
    ) -> list[RowResult]:
        assert batch.encoded is not None
        done = []
        for row in todo:
            if row in batch.failed:  # nothing was read
                out_nchw[row] = 0
                continue
            if self.posted is not None:
                self.posted.start(worker, int(batch.ids[row]), DEADLINE_S)
            done.append(self._row(row, batch.encoded[row], out_nchw[row]))
            if self.posted is not None:
                self.posted.finish(worker)
        return done

    def _row(self, row: int, encoded: bytes, out_chw: npt.NDArray[np.float32]) -> RowResult:
        try:
            decoded = decode(encoded, self.pre)
        except BadImage as bad:
            out_chw[:] = 0
            return RowResult(row, "", "", bad.failure)
        np.copyto(out_chw, resize_crop(decoded.image_hwc, self.pre))
        np.multiply(out_chw, self.scale, out=out_chw)
        np.add(out_chw, self.shift, out=out_chw)
        return RowResult(row, decoded.mark, decoded.decoder, None)


def resize_crop(image_hwc: Pixels, pre: Preprocess) -> Pixels:
    """(3, S, S), within one level of the reference. The picture may be a rotated or mirrored view."""
    size, (height, width) = pre.size, image_hwc.shape[:2]
    if height <= width:
        out_height, out_width = size, int(size * width / height)
    else:
        out_height, out_width = int(size * height / width), size
    # Pillow 13 takes the vertical pass first where that leaves less to do. The intermediate is rounded and clipped
    # to uint8, so the order is part of the reference: it moves pixels of a tall noisy picture by 20 levels.
    tall = height - out_height > 2 * max(0, width - out_width)
    if min(height, width) >= TORCH_SCALE_MIN * size:
        resized = _resize_torch(image_hwc, out_height, out_width, vertical_first=tall)
        top, left = (out_height - size) // 2, (out_width - size) // 2
        return resized[:, top : top + size, left : left + size]
    return _resize_window(image_hwc, out_height, out_width, size, vertical_first=tall)


def _resize_torch(image_hwc: Pixels, out_height: int, out_width: int, *, vertical_first: bool) -> Pixels:
    """The whole picture, (3, out_height, out_width). Works on the rows as stored and rotates the small result."""
    stored = image_hwc
    upside_down, mirrored = stored.strides[0] < 0, stored.strides[1] < 0
    if upside_down:
        stored = stored[::-1]
    if mirrored:
        stored = stored[:, ::-1]
    transposed = stored.strides[0] < stored.strides[1]
    if transposed:
        stored = stored.transpose(1, 0, 2)
        out_height, out_width = out_width, out_height
    # channels last as a view of (1, 3, h, w): torch has a kernel for that and copies nothing
    pixels = torch.from_numpy(stored).permute(2, 0, 1)[None]
    if vertical_first != transposed:
        pixels = _interpolate(pixels, out_height, stored.shape[1])
    resized: Pixels = _interpolate(pixels, out_height, out_width)[0].numpy()
    if transposed:
        resized = resized.transpose(0, 2, 1)
    if upside_down:
        resized = resized[:, ::-1]
    return resized[:, :, ::-1] if mirrored else resized


def _interpolate(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Horizontal pass first, then vertical; a pass that changes nothing is left out."""
    return torch.nn.functional.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)


class Window(NamedTuple):
    """The part of one axis that the crop shows: source pixels [start, stop), the box within them, the pixels to make.

    Pillow takes the box in float32, and half a unit in its last place is enough to move a noisy picture by two levels.
    So a few more pixels than the crop are made, up to where the end of the box is nearly exact.
    """

    start: int
    stop: int
    low: float
    high: float
    out_length: int

    @classmethod
    def of(cls, length: int, out_length: int, size: int) -> Window:
        ratio = length / out_length
        first = (out_length - size) // 2
        reach = int(CUBIC_SUPPORT * max(ratio, 1.0)) + 2  # the filter sees this far beyond the box
        start = max(0, int(first * ratio) - reach)
        ends = range(first + size, min(out_length, first + size + SPARE_PIXELS) + 1)
        last = min(ends, key=lambda end: abs(float(np.float32(end * ratio - start)) - (end * ratio - start)))
        high = last * ratio - start
        return cls(start, min(length, start + int(high) + 1 + reach), first * ratio - start, high, last - first)


def _resize_window(
    image_hwc: Pixels, out_height: int, out_width: int, size: int, *, vertical_first: bool
) -> Pixels:
    """Pillow's own resize of what the crop shows: a line of 1 x 60,000 would grow to 224 x 13 million pixels first."""
    rows = Window.of(image_hwc.shape[0], out_height, size)
    cols = Window.of(image_hwc.shape[1], out_width, size)
    window = Image.fromarray(image_hwc[rows.start : rows.stop, cols.start : cols.stop])
    for vertical in (vertical_first, not vertical_first):
        if vertical:
            made, box = (window.width, rows.out_length), (0, rows.low, window.width, rows.high)
        else:
            made, box = (cols.out_length, window.height), (cols.low, 0, cols.high, window.height)
        window = window.resize(made, Image.Resampling.BICUBIC, box=box)
    return np.asarray(window)[:size, :size].transpose(2, 0, 1)
