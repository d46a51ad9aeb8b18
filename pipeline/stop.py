"""When a run has to end before it is through: it is told to by a signal, or its time is up."""

from __future__ import annotations

import math
import os
import signal
import time
from types import FrameType

from pipeline.exits import INTERRUPTED


class Stop:
    """True once the run should finish what it has in hand and leave.

    SIGINT or SIGTERM once: that. Twice: leave now; committed rows are safe either way.
    """

    def __init__(self) -> None:
        self.requested = False  # by a signal
        self.deadline_s = math.inf  # of time.monotonic(); from then on nothing new is begun
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(INTERRUPTED)
        self.requested = True

    def __call__(self) -> bool:
        return self.requested or time.monotonic() >= self.deadline_s
