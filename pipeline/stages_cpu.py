"""Decode and preprocess on the host: `CpuStages` turns a batch of encoded pictures into rows of an engine's input.

The reference is the PIL image processor of Hugging Face: shortest edge to S by bicubic with antialias on uint8, long
edge int(S * long / short), centre crop, (x / 255 - mean) / std. `resize_crop` stays within one level of it.

A 500-pixel JPEG costs one core 1.0 ms of decoding, 1.9 ms of resizing and 0.07 ms of normalising (Pillow resizes it in
3.0 ms). From 2.5 to 1 on, torch's uint8 kernel resizes, 8 times faster than Pillow: 12 Mpixel in 15 ms. Below, its
16-bit weights put one pixel in a million two levels off, so there float32 products do the work. All of it releases the
GIL, and so does simplejpeg: a pool of threads scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engines.spec import Preprocess
from pipeline.batch import BadImage, Batch, Failure, Mark
from pipeline.decode_cpu import Decoded, Pixels, decode

__all__ = ["CpuStages", "Decoded", "Posted", "decode", "resize_crop"]

DEADLINE_S = 60.0  # the slowest picture of 64 Mpixel takes 10 s (JPEG 2000)
# Samples of noise two levels off: none of 1.4e9 from 2.5 on, 2e-9 at 2.2, 1e-6 at 1.3 (photos are no better).
TORCH_SCALE_MIN = 2.5
CUBIC_SUPPORT = 2.0
SURE = 0.499  # Pillow's fixed-point weights and our float32 ones differ by less than 0.001 levels
BAND = 32  # half of a band is zeros at 64, and matrices get too small to be fast at 16


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
        # One thread each for torch: a team per decoding thread would fight the engine's. Engines set their own number,
        # per thread, so this does not reach them.
        self.pool = ThreadPoolExecutor(threads, "decode", initializer=torch.set_num_threads, initargs=(1,))
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
    return _resize_near(image_hwc, out_height, out_width, size, vertical_first=tall)


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


def _resize_near(
    image_hwc: Pixels, out_height: int, out_width: int, size: int, *, vertical_first: bool
) -> Pixels:
    """(3, size, size), from what the crop shows of the source: 1 x 60,000 pixels never grow to 224 x 13 million.

    Two float32 matrix products. In between, the reference clips and rounds to uint8. Values too close to a half to know
    its side become that half: it moves the result by about 0.63 (half the absolute sum of the filter), so the result is
    within one level for any picture, where guessing sides would be two levels off in one pixel of a million.
    """
    rows, cols = bands(image_hwc.shape[0], out_height, size), bands(image_hwc.shape[1], out_width, size)
    shown = image_hwc[rows[0].start : rows[-1].stop, cols[0].start : cols[-1].stop]
    planes = torch.empty(3, *shown.shape[:2])
    np.copyto(planes.numpy(), shown.transpose(2, 0, 1))
    first = _down(planes, rows) if vertical_first else _across(planes, cols)
    rounded = first.round()
    halves = first.sub_(rounded).mul_(1 / SURE).trunc_()  # -1, 0 or 1
    planes = rounded.add_(halves, alpha=0.5)
    second = _across(planes, cols) if vertical_first else _down(planes, rows)
    resized: Pixels = second.round_().to(torch.uint8).numpy()
    return resized


def _down(planes: torch.Tensor, rows: tuple[Band, ...]) -> torch.Tensor:
    """The vertical pass over (3, h, w)."""
    made = torch.empty(3, rows[-1].end, planes.shape[2])
    for row in rows:
        source = planes[:, row.start - rows[0].start : row.stop - rows[0].start]
        torch.matmul(row.weights, source, out=made[:, row.first : row.end])
    return made.clamp_(0, 255)


def _across(planes: torch.Tensor, cols: tuple[Band, ...]) -> torch.Tensor:
    """The horizontal pass over (3, h, w), all rows of the three planes in one product."""
    lines = planes.view(-1, planes.shape[2])
    made = torch.empty(len(lines), cols[-1].end)
    for col in cols:
        source = lines[:, col.start - cols[0].start : col.stop - cols[0].start]
        torch.mm(source, col.weights.T, out=made[:, col.first : col.end])
    return made.clamp_(0, 255).view(3, -1, cols[-1].end)


class Band(NamedTuple):
    """Up to `BAND` pixels of the result along one axis, [first, end): `weights` times source pixels [start, stop)."""

    first: int
    end: int
    start: int
    stop: int
    weights: torch.Tensor  # (end - first, stop - start), half of it not zero: the filters of neighbours overlap


@lru_cache(maxsize=512)  # 0.3 ms to make and up to 80 kB; collections repeat a few hundred pairs of lengths
def bands(length: int, out_length: int, size: int) -> tuple[Band, ...]:
    """The middle `size` of `out_length` pixels, each the sum of source pixels by Pillow's bicubic weights."""
    ratio = length / out_length
    stretch = max(ratio, 1.0)  # of the filter, when it has to average
    centre = ((out_length - size) // 2 + np.arange(size) + 0.5) * ratio
    first_tap = np.maximum(centre - CUBIC_SUPPORT * stretch + 0.5, 0).astype(int)
    end_tap = np.minimum((centre + CUBIC_SUPPORT * stretch + 0.5).astype(int), length)
    made = []
    for first in range(0, size, BAND):
        end = min(first + BAND, size)
        here = slice(first, end)
        start, stop = int(first_tap[first]), int(end_tap[end - 1])
        at = np.arange(start, stop)
        weights = _cubic((at - centre[here, None] + 0.5) / stretch)
        weights *= (at >= first_tap[here, None]) & (at < end_tap[here, None])
        weights /= weights.sum(1, keepdims=True)
        made.append(Band(first, end, start, stop, torch.from_numpy(weights.astype(np.float32))))
    return tuple(made)


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The bicubic filter with a = -1/2."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))
