"""What a run remembers of itself, in memory that its length does not change: its speed over time, and some of its rows.

Both go into runs/<n>.json, for whoever looks at the run afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.messages import Tick

POINTS_MAX = 600  # a night of ten hours gets a point a minute
SAMPLE_ROWS = 1000  # means and shares of a thousand rows are within 3 % of those of all
STAGES = ("read", "decode", "engine")
WAITS = ("read_wait_s", "decode_wait_s", "slot_wait_s", "encode_wait_s")


class Throughput:
    """Ticks of all lanes in bins of equal width. When they do not reach any more, each two become one."""

    def __init__(self) -> None:
        self.width_s = 1.0
        # rows, lane seconds, waits, lane seconds by bound stage
        self._bins = np.zeros((POINTS_MAX, 2 + len(WAITS) + len(STAGES)))

    def add(self, tick: Tick, end_s: float) -> None:
        """A tick that ended `end_s` after the run began to embed; what it counts is spread evenly over its time."""
        while end_s >= POINTS_MAX * self.width_s:
            half = self._bins[0::2] + self._bins[1::2]
            self._bins = np.concatenate([half, np.zeros_like(half)])
            self.width_s *= 2
        bound = [tick.seconds * (stage == tick.bound) for stage in STAGES]
        values = np.array([tick.rows, tick.seconds, *(getattr(tick, wait) for wait in WAITS), *bound])
        last = end_s / self.width_s
        first = max(0.0, (end_s - tick.seconds) / self.width_s)
        for at in range(int(first), int(last) + 1):
            share = (min(at + 1, last) - max(at, first)) / (last - first) if last > first else 1.0
            self._bins[at] += share * values

    def as_json(self) -> dict[str, Any]:
        """Column by column, one value per bin up to the last one with work in it."""
        used = np.flatnonzero(self._bins[:, 1])
        bins = self._bins[: used[-1] + 1] if len(used) else self._bins[:0]
        rounded = np.round(bins, 3)
        columns = {name: rounded[:, at].tolist() for at, name in enumerate(("rows", "lane_s", *WAITS))}
        stages = bins[:, -len(STAGES) :]
        bound = [STAGES[at] if worked else "" for at, worked in zip(stages.argmax(1), bins[:, 1] > 0, strict=True)]
        return {"width_s": self.width_s, **columns, "bound": bound}


class Sample:
    """Up to SAMPLE_ROWS of any number of ids, each as likely as any other; the same ones for the same input."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._seen, self._random = 0, np.random.default_rng(0)

    def add(self, ids: Sequence[int]) -> None:
        seen = np.arange(self._seen, self._seen + len(ids))
        self._seen += len(ids)
        places = (self._random.random(len(ids)) * (seen + 1)).astype(np.int64)  # any up to its own
        for row in np.flatnonzero((places < SAMPLE_ROWS) | (seen < SAMPLE_ROWS)).tolist():
            if len(self.ids) < SAMPLE_ROWS:
                self.ids.append(ids[row])
            else:
                self.ids[places[row]] = ids[row]
