"""Reads the bytes of many pictures at once, and asks again where a network only stumbled.

What fails for a passing reason waits beside the line: it is read again when all others of its batch are through, then
twice more, each time a little later, between the batches that come after it. Only at the end of a chunk there is
nothing else to read meanwhile (1.6 s at most). A source that is down must not turn that into hours: once half a minute
of waiting in a row was in vain, nobody waits any more until a second read brings a row.
"""

from __future__ import annotations

import errno
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep
from typing import NamedTuple, TypeAlias

from blake3 import blake3

from pipeline.batch import BadImage, Failure
from pipeline.sources import Source
from pipeline.store import PendingItem

Read: TypeAlias = tuple[bytes, bytes] | Failure  # the bytes and their hash, or why not

# Between least and most, before the second read and those after it: lanes that stumbled together do not come back so.
WAITS_S = ((0.0, 0.0), (0.2, 0.4), (0.8, 1.2))
PATIENCE_S = 30.0
# A row of a warm local cache takes half of it. One thread reads those alone: others would only take turns with it at
# each of five system calls, and lanes were seen to spend 37 us of system time a row on that instead of 5.
QUICK_S = 30e-6
# A batch that takes no longer makes no source slow: other threads may keep the interpreter's lock for 5 ms at a time,
# mostly at the start of a run. Eight threads then took 5 ms more over 1,000 pictures, every second time. With batches
# of up to 660 rows this decides, with larger ones QUICK_S.
HICCUP_S = 20e-3
PASSING_ERRNOS = frozenset(
    {
        errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENETDOWN,
        errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO, errno.ENOBUFS,
    }
)  # fmt: skip
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})  # of HTTP


class _Waiting(NamedTuple):
    """Rows that are to be read together, from some moment on."""

    due_s: float
    reads: int  # that they have behind them
    rows: Sequence[PendingItem]


def is_passing(bad: BadImage) -> bool:
    """Whether the same read may work a second later. No such file, no permission: those stay."""
    if bad.failure.reason != "read_error":
        return False
    cause = bad.__cause__
    if bad.passing or isinstance(cause, TimeoutError | ConnectionError):  # fsspec's timeout is one
        return True
    if isinstance(cause, OSError):
        return cause.errno in PASSING_ERRNOS
    if getattr(cause, "status", None) in PASSING_STATUS:
        return True
    http = sys.modules.get("aiohttp")  # fsspec's way to http; not loaded, none of its errors came
    return http is not None and isinstance(cause, http.ClientConnectionError | http.ClientPayloadError)


class Reader:
    """Reads for one lane; `stopped` ends all reading."""

    def __init__(self, source: Source, pool: ThreadPoolExecutor, threads: int, stopped: Callable[[], bool]) -> None:
        self._source, self._pool, self._threads, self._stopped = source, pool, threads, stopped
        self._patience_s = PATIENCE_S
        self._slow = False  # the last batch, that is

    def read_chunk(self, groups: Iterable[Sequence[PendingItem]]) -> Iterator[list[tuple[PendingItem, Read]]]:
        """Every row of `groups` once, as they come: each group in order, but what stumbled stands further down."""
        waiting: deque[_Waiting] = deque()
        for group in groups:
            if self._stopped():
                return
            yield self._read(_Waiting(0.0, 0, group), waiting)
            for _ in range(len(waiting)):
                again = waiting.popleft()
                if again.due_s <= monotonic():
                    yield self._read(again, waiting)
                else:
                    waiting.append(again)
        while waiting:
            again = min(waiting, key=lambda one: one.due_s)
            waiting.remove(again)
            self._wait(again.due_s - monotonic())
            if self._stopped():
                return
            yield self._read(again, waiting)

    def _read(self, group: _Waiting, waiting: deque[_Waiting]) -> list[tuple[PendingItem, Read]]:
        """What came, and what never will; the others go back to `waiting`."""
        rows, reads = group.rows, dict[int, Read]()
        passing: set[int] = set()

        left = iter(range(len(rows)))

        def read_on(until_s: float) -> None:
            # One task for each thread, not for each row: with 256 rows the bookkeeping took a third of the time.
            for at in left:
                reads[at], may_come = self._read_one(rows[at])
                if may_come:
                    passing.add(at)
                if monotonic() > until_s:
                    return

        start_s, quick_s = monotonic(), max(HICCUP_S, QUICK_S * len(rows))
        if not self._slow:
            list(self._pool.map(read_on, [start_s + quick_s]))
        if len(reads) < len(rows):
            list(self._pool.map(read_on, [math.inf] * self._threads))
        self._slow = monotonic() - start_s > quick_s
        if group.reads and len(passing) < len(rows):
            self._patience_s = PATIENCE_S
        if passing and group.reads < (len(WAITS_S) if self._patience_s > 0 else 1):
            due_s = monotonic() + random.uniform(*WAITS_S[group.reads])
            waiting.append(_Waiting(due_s, group.reads + 1, [rows[at] for at in sorted(passing)]))
        else:
            passing.clear()
        return [(row, reads[at]) for at, row in enumerate(rows) if at not in passing]

    def _read_one(self, row: PendingItem) -> tuple[Read, bool]:
        """What came, and whether it is worth asking again."""
        try:
            encoded = self._source.read(row.locator, row.size_bytes)
        except BadImage as bad:
            return bad.failure, is_passing(bad)
        return (encoded, blake3(encoded).digest(length=16)), False

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self._patience_s -= seconds
            sleep(seconds)
