"""Threads that compute take turns on the cores of their lane: never more of them run than there are cores.

A lane has as many threads that decode as threads that encode, for which of them has more to do is only known when the
pictures have been seen. Without turns both kinds together would crowd the cores whenever both have work, and threads of
one OpenMP team would wait at every barrier for the one whose core decodes a picture just now.

A process whose threads share nothing (the service, where a query must not wait for a picture) never calls
`share_cores`; there a turn costs nothing and waits for nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Condition


class Turns:
    """Not fair, which needs no queue here: who decodes runs out of buffers, who encodes out of pictures."""

    def __init__(self, cores: int) -> None:
        self._cores, self._free = cores, cores
        self._freed = Condition()

    @contextmanager
    def take(self, cores: int) -> Iterator[None]:
        """So many cores at once, or all there are; waits until they are free."""
        taken = min(cores, self._cores)
        with self._freed:
            self._freed.wait_for(lambda: self._free >= taken)
            self._free -= taken
        try:
            yield
        finally:
            with self._freed:
                self._free += taken
                self._freed.notify_all()


_turns: Turns | None = None


def share_cores(cores: int) -> None:
    """From now on, threads of this process take turns on so many cores."""
    global _turns
    _turns = Turns(cores)


def turn(cores: int = 1) -> AbstractContextManager[None]:
    """Around a computation that keeps `cores` cores busy."""
    return nullcontext() if _turns is None else _turns.take(cores)
