"""What every GPU engine shares: slots of buffers on one CUDA stream, and who waits for whom. Not run on a GPU yet.

    launch(slot, n)   stream: wait for input(slot).ready -> run -> copy n vectors to page-locked memory -> done event
    result(slot)      host: wait for that event, the only wait of a batch; everything queued before it has run as well

A subclass names what runs: `_enqueue(slot)` queues one forward pass of all rows of the slot on `self.stream`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from engines import EngineUnavailable
from engines.memory_gpu import DeviceArray, Event, Stream, copy_to_host, device_array, gpu_problem, pinned_array
from engines.spec import EngineCard

# Up to here a forward pass is shorter than the launches of its hundred kernels, so it is replayed as one CUDA graph.
GRAPH_ROWS_MAX = 16
SLOTS = 3  # one is filled, one computes, one is read
GEMM_SIZE = 8192  # 1.1 TFLOP: 1.4 ms at 790 TFLOP/s, long beside its launch
GEMM_REPEATS = 20


class GpuEngine(ABC):
    """Fixed batch of `card.batch` rows; a short batch runs with the rows that an earlier one left behind it."""

    def __init__(self, card: EngineCard, batch: int | None, slots: int = SLOTS) -> None:
        if problem := gpu_problem():
            raise EngineUnavailable(f"{card.runtime} needs a GPU: {problem}")
        batch = batch or card.batch
        if card.compiled_rows and batch > card.compiled_rows:
            raise EngineUnavailable(
                f"this {card.runtime} engine was built for at most {card.compiled_rows} rows, asked for {batch}: "
                f"open it with batch={card.compiled_rows} or less"
            )
        self.card, self.slots = replace(card, batch=batch), slots
        self.stream = Stream()
        self._inputs = [device_array((batch, *card.row_shape), card.input_dtype) for _ in range(slots)]
        self._outputs = [device_array((batch, card.dim), np.float32) for _ in range(slots)]
        self._host: list[npt.NDArray[Any]] = [pinned_array((batch, card.dim), np.float32) for _ in range(slots)]
        self._done = [Event() for _ in range(slots)]
        self._rows = [0] * slots

    def input(self, slot: int) -> DeviceArray:
        """(b, 3, s, s) of `card.input_dtype`, on the GPU: fill rows [0, n), then record `.ready` on the same stream."""
        return self._inputs[slot]

    def launch(self, slot: int, n: int) -> None:
        """Queue rows [0, n) of `slot` and return. Fill the slot again only after `result(slot)` has returned."""
        self._rows[slot] = n
        self.stream.wait(self._inputs[slot].ready)
        self._enqueue(slot)
        copy_to_host(self._host[slot][:n], self._outputs[slot].rows(n), self.stream)
        self._done[slot].record(self.stream)

    def result(self, slot: int) -> npt.NDArray[np.float16]:
        return self._finished(slot).astype(np.float16)

    def result_fp32(self, slot: int) -> npt.NDArray[np.float32]:
        return self._finished(slot).copy()

    def _finished(self, slot: int) -> npt.NDArray[np.float32]:
        self._done[slot].synchronize()  # the only wait of a batch; preprocessing lies before it in the same order
        finished: npt.NDArray[np.float32] = self._host[slot][: self._rows[slot]]
        return finished

    @abstractmethod
    def _enqueue(self, slot: int) -> None:
        """Queue one forward pass of all rows of `slot`."""


def gemm_gflops(multiply: Callable[[], object], wait: Callable[[], object]) -> float:
    """Speed of `multiply`, which queues a square product of `GEMM_SIZE`: what a model made of GEMMs can reach here.

    Give it real numbers: on zeros an H200 draws less power and runs 13 % faster. `wait` returns when all has run.
    """
    for _ in range(3):  # to warm up
        multiply()
    wait()
    start = time.perf_counter()
    for _ in range(GEMM_REPEATS):
        multiply()
    wait()
    return 2 * GEMM_SIZE**3 * GEMM_REPEATS / (time.perf_counter() - start) / 1e9
