"""Reads the bytes of many pictures at once, and asks again where a network only stumbled.

What fails for a passing reason is read again when all others of its batch are through: once more immediately, then
after two short waits that all such rows of the batch share (1.6 s at most). A source that is down must not turn that
into hours: once half a minute of waiting in a row was in vain, nobody waits any more until a second read brings a row.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import sleep
from typing import TypeAlias

from blake3 import blake3
from tenacity import RetryCallState, Retrying, retry_if_result, wait_chain, wait_none, wait_random

from pipeline.batch import BadImage, Failure
from pipeline.sources import Source
from pipeline.store import PendingItem

Read: TypeAlias = tuple[bytes, bytes] | Failure  # the bytes and their hash, or why not

WAITS = (wait_none(), wait_random(0.2, 0.4), wait_random(0.8, 1.2))  # before the second round and those after it
PATIENCE_S = 30.0
PASSING_ERRNOS = frozenset(
    {
        errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENETDOWN,
        errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO, errno.ENOBUFS,
    }
)  # fmt: skip
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})  # of HTTP
CHANGED_WHILE_READ = "the file changed while it was read"  # words of pipeline.sources: its writer may be done soon


def is_passing(bad: BadImage) -> bool:
    """Whether the same read may work a second later. No such file, no permission: those stay."""
    if bad.failure.reason != "read_error":
        return False
    cause = bad.__cause__
    if cause is None:
        return bad.failure.words == CHANGED_WHILE_READ
    if isinstance(cause, TimeoutError | ConnectionError):  # fsspec's timeout is one
        return True
    if isinstance(cause, OSError):
        return cause.errno in PASSING_ERRNOS
    if getattr(cause, "status", None) in PASSING_STATUS:
        return True
    http = sys.modules.get("aiohttp")  # fsspec's way to http; not loaded, none of its errors came
    return http is not None and isinstance(cause, http.ClientConnectionError | http.ClientPayloadError)


class Reader:
    """Reads for one lane; `stopped` ends all waiting."""

    def __init__(self, source: Source, pool: ThreadPoolExecutor, threads: int, stopped: Callable[[], bool]) -> None:
        self._source, self._pool, self._threads, self._stopped = source, pool, threads, stopped
        self._patience_s = PATIENCE_S
        self._again = Retrying(
            retry=retry_if_result(bool),
            stop=self._is_over,
            wait=wait_chain(*WAITS),
            sleep=self._wait,
            retry_error_callback=lambda state: None,
        )

    def read_all(self, group: Sequence[PendingItem]) -> list[Read]:
        """One for each row, in order."""
        reads: dict[int, Read] = {}
        passing: set[int] = set()

        def round_of_reads() -> set[int]:
            """Those that may still come."""
            again = bool(passing)
            todo = sorted(passing) if again else list(range(len(group)))
            passing.clear()

            def read_every(first: int) -> None:
                # One task for each thread, not for each row: with 256 rows the bookkeeping took a third of the time.
                for at in todo[first :: self._threads]:
                    reads[at], may_come = self._read_one(group[at])
                    if may_come:
                        passing.add(at)

            list(self._pool.map(read_every, range(self._threads)))
            if again and len(passing) < len(todo):
                self._patience_s = PATIENCE_S
            return passing

        self._again(round_of_reads)
        return [reads[at] for at in range(len(group))]

    def _read_one(self, row: PendingItem) -> tuple[Read, bool]:
        """What came, and whether it is worth asking again."""
        try:
            encoded = self._source.read(row.locator, row.size_bytes)
        except BadImage as bad:
            return bad.failure, is_passing(bad)
        return (encoded, blake3(encoded).digest(length=16)), False

    def _is_over(self, state: RetryCallState) -> bool:
        rounds = state.attempt_number
        return rounds > len(WAITS) or self._stopped() or (rounds > 1 and self._patience_s <= 0)

    def _wait(self, seconds: float) -> None:
        self._patience_s -= seconds
        sleep(seconds)
