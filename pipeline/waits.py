"""How long a thread waits, told to another thread that may ask in the middle of it."""

from __future__ import annotations

import time


class Wait:
    """Seconds that one thread spends waiting in one place: each counts when it passes, and once.

    No lock: the state is one reference, and always exchanged whole.
    """

    def __init__(self) -> None:
        self._state: tuple[float, float | None] = (0.0, None)  # of waits that have ended; when the present one began
        self._told_s = 0.0

    def __enter__(self) -> None:
        self._state = (self._state[0], time.monotonic())

    def __exit__(self, *_: object) -> None:
        self._state = (self._whole_s(), None)

    def untold_s(self) -> float:
        """What has passed since this was last asked."""
        before_s, self._told_s = self._told_s, self._whole_s()
        return self._told_s - before_s

    def _whole_s(self) -> float:
        ended_s, since_s = self._state
        return ended_s if since_s is None else ended_s + time.monotonic() - since_s
