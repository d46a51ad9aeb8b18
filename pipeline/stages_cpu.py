"""Decode and preprocess on the host: `CpuStages` turns a batch of encoded pictures into rows of an engine's input.

A 500-pixel JPEG costs one core 1.0 ms of decoding, 0.4 ms of resizing (to the very bits of Pillow, see resize_cpu)
and 0.07 ms of normalising, (x / 255 - mean) / std. All of it releases the GIL: a pool of threads scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engines.spec import Preprocess
from engines.turns import turn
from pipeline.batch import BadImage, Batch, Failure, Mark, Posted
from pipeline.decode_cpu import decode
from pipeline.resize_cpu import resize_crop

DEADLINE_S = 60.0  # the slowest picture of 64 Mpixel takes 10 s (JPEG 2000)


class RowResult(NamedTuple):
    row: int
    mark: Mark
    decoder: str
    failure: Failure | None


class CpuStages:
    """One per lane; owns `threads` decoding threads."""

    def __init__(self, pre: Preprocess, threads: int, posted: Posted | None = None) -> None:
        self.pre, self.threads, self.posted = pre, threads, posted
        self.pool = ThreadPoolExecutor(threads, "decode")
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
            with turn():
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
