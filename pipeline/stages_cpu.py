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
# 2.5: no pixel more than one level off in 1.4e9; at 2.1 there are 4e-9 of them, at 1.3 there are 1e-6
TORCH_SCALE_MIN = 2.5
CUBIC_SUPPORT = 2.0
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
    """(3, size, size), of the source pixels that the crop shows: a line of 1 x 60,000 never grows to 224 x 13 million.

    Two matrix products in float32. Between them values are clipped like the reference's, but not rounded: what rounding
    moves there is at most 0.63 (half the filter's absolute sum), so the result is within one level for any picture.
    """
    rows, cols = bands(image_hwc.shape[0], out_height, size), bands(image_hwc.shape[1], out_width, size)
    top, left = rows[0].start, cols[0].start
    shown = image_hwc[top : rows[-1].stop, left : cols[-1].stop]
    planes = torch.empty(3, *shown.shape[:2])
    np.copyto(planes.numpy(), shown.transpose(2, 0, 1))
    for vertical in (vertical_first, not vertical_first):
        if vertical:
            made = torch.empty(3, size, planes.shape[2])
            for band in rows:
                source = planes[:, band.start - top : band.stop - top]
                torch.matmul(band.weights, source, out=made[:, band.first : band.first + BAND])
        else:
            made = torch.empty(3, planes.shape[1], size)
            for band in cols:
                source = planes[:, :, band.start - left : band.stop - left]
                torch.matmul(source, band.weights.T, out=made[:, :, band.first : band.first + BAND])
        np.clip(made.numpy(), 0, 255, out=made.numpy())
        planes = made
    return np.rint(planes.numpy()).astype(np.uint8)


class Band(NamedTuple):
    """`BAND` pixels of the result along one axis, from `first` on: `weights` times source pixels [start, stop)."""

    first: int
    start: int
    stop: int
    weights: torch.Tensor  # (BAND, stop - start), mostly not zero: the filters of neighbours overlap


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
        here = slice(first, first + BAND)
        start, stop = int(first_tap[first]), int(end_tap[here][-1])
        at = np.arange(start, stop)
        weights = _cubic((at - centre[here, None] + 0.5) / stretch)
        weights *= (at >= first_tap[here, None]) & (at < end_tap[here, None])
        weights /= weights.sum(1, keepdims=True)
        made.append(Band(first, start, stop, torch.from_numpy(weights.astype(np.float32))))
    return tuple(made)


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The bicubic filter with a = -1/2."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))
