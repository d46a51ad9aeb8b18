"""Rows of many requests computed together: what arrives during a run is the next run.

Nobody waits for company: an idle engine starts at once, so a lone query pays nothing, and under load batches grow by
themselves. Requests take turns row by row, so a query of one text does not stand behind an upload of 256; and a run
has as few rows as fit the latency budget at the speed seen so far.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

RowT = TypeVar("RowT")
Vectors: TypeAlias = npt.NDArray[np.float16]

ROWS_MAX = 32
BUDGET_S = 0.1  # of one run: what a query that just missed one waits at most
SPEED_SMOOTHING = 0.2


@dataclass(slots=True)
class _Asked(Generic[RowT]):
    rows: deque[tuple[int, RowT]]  # still to be started, with their places
    emb_nd: list[npt.NDArray[np.float16] | None]
    missing: int
    done: asyncio.Future[None]


class Batcher(Generic[RowT]):
    """Lives in one event loop; `compute` runs in one thread of its own."""

    def __init__(
        self, name: str, compute: Callable[[Sequence[RowT]], Vectors], told: Callable[[int, float], None]
    ) -> None:
        """`compute`: n rows -> (n, d). `told` hears rows and seconds of each run."""
        self._compute, self._told = compute, told
        self._thread = ThreadPoolExecutor(1, name)
        self._waiting: deque[_Asked[RowT]] = deque()
        self._running = False
        self._row_s: float | None = None  # until one row has told how long it takes

    async def __call__(self, rows: Sequence[RowT]) -> Vectors:
        """(n, d). A caller that is cancelled takes its rows out of the queue.

        Raises:
            whatever `compute` raises, for every request that had a row in that run.
        """
        loop = asyncio.get_running_loop()
        asked = _Asked(deque(enumerate(rows)), [None] * len(rows), len(rows), loop.create_future())
        self._waiting.append(asked)
        loop.call_soon(self._start)  # what else arrives in this turn of the loop comes along
        await asked.done
        return np.stack([row_d for row_d in asked.emb_nd if row_d is not None])

    @property
    def queued(self) -> int:
        """Rows that wait for a run."""
        return sum(len(asked.rows) for asked in self._waiting if not asked.done.done())

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        if self._running:
            return
        run = self._next_run()
        if run:
            self._running = True
            computed = asyncio.get_running_loop().run_in_executor(self._thread, self._timed, [row for _, _, row in run])
            computed.add_done_callback(lambda future: self._finish(run, future))

    def _next_run(self) -> list[tuple[_Asked[RowT], int, RowT]]:
        run: list[tuple[_Asked[RowT], int, RowT]] = []
        rows_max = 1 if self._row_s is None else max(1, min(ROWS_MAX, int(BUDGET_S / self._row_s)))
        while self._waiting and len(run) < rows_max:
            asked = self._waiting.popleft()
            if asked.done.done():  # cancelled, or failed in an earlier run
                continue
            run.append((asked, *asked.rows.popleft()))
            if asked.rows:
                self._waiting.append(asked)
        return run

    def _timed(self, rows: list[RowT]) -> tuple[Vectors, float]:
        start = time.perf_counter()
        return self._compute(rows), time.perf_counter() - start

    def _finish(
        self, run: list[tuple[_Asked[RowT], int, RowT]], computed: asyncio.Future[tuple[Vectors, float]]
    ) -> None:
        self._running = False
        error = RuntimeError("the service is being stopped") if computed.cancelled() else computed.exception()
        if error is not None:
            for asked, _, _ in run:
                if not asked.done.done():
                    asked.done.set_exception(error)
        else:
            emb_nd, seconds = computed.result()
            row_s = seconds / len(run)
            self._row_s = row_s if self._row_s is None else self._row_s + SPEED_SMOOTHING * (row_s - self._row_s)
            self._told(len(run), seconds)
            for (asked, place, _), row_d in zip(run, emb_nd, strict=True):
                asked.emb_nd[place] = row_d
                asked.missing -= 1
                if not asked.missing and not asked.done.done():
                    asked.done.set_result(None)
        self._start()
