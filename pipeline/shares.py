"""How many rows each lane gets next: the two policies of work sharing, without a clock, a pipe or a store.

    dynamic   first come, first served. Chunks last about 15 s and shrink towards the end, and a lane that would be the
              last to finish leaves its batch to a faster one. A lane that is alone shrinks nothing: it has nobody to
              leave anything to, and a chunk costs 4 ms of CPU whatever is in it (a tenth of a run over 1,000 pictures).
    static    all lanes first do a few batches at the same time, of the size and on the pictures they will have; what
              is left is split by the speed seen there, and each lane gets its own share alone.

How near dynamic comes to the ideal (all rows by the sum of speeds): a batch is not divided, so with speeds 1:3:10 the
best there is comes within 5 % from 27 batches on, 3 % from 55, 1 % from 195; the slowest lane has 2, 4 and 14 of them.
At speeds that are known, the run ends at most 1.5 batches of the slowest lane after that (the worst of 14,415 random
cases: 1.02). Cards that are wrong cost more, once: what the slowest lane holds before anybody has seen it (two chunks
of `PROBE_BATCHES`), and three batches (1.94).

Both only count: the rows themselves come from one cursor that moves over each once, so that every row is handed out
once whatever a policy says. That it says something until nothing is left is `tests/test_sharing.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

CHUNK_S = 15.0  # what a kill -9 may cost per lane and chunk, against one fsync and one commit per chunk
CHUNK_ROWS_MAX = 16_384  # its commit takes 50 ms, 3.0 us a row (4,096 rows: 3.7); until then no claim is answered
PROBE_BATCHES = 2  # of a chunk for a lane that nobody has seen at work: a card was measured alone, on a quiet host
PROBE_S = 0.1  # of a lane that is alone, where that is more: with a card 100 times too good, a first chunk takes 10 s
# Static, what each lane does before the split; 16 batches of 256 are .3 s at 15,000 images/s, filling included.
MEASURE_S, MEASURE_BATCHES, MEASURE_MIN_S = 3.0, 16, 1.0


class Pace(NamedTuple):
    """A lane that can take rows, as the coordinator sees it."""

    batch: int
    rows_per_s: float  # by its last second, else by its engine's card
    held_rows: int = 0  # of its chunks that are not done
    seen: bool = True  # at work


class Policy(Protocol):
    def chunk_rows(self, lane: str, left: int, paces: Mapping[str, Pace], starting: int) -> int:
        """Rows of the next chunk of `lane`, when `left` (at least 1) rows are not handed out yet.

        0: nothing now; another lane does it, or this one is asked again when something is done. `paces` has every lane
        that works, this one included; `starting` more do not yet.
        """
        ...


class Dynamic:
    def chunk_rows(self, lane: str, left: int, paces: Mapping[str, Pace], starting: int) -> int:
        pace, all_rows_per_s = paces[lane], sum(other.rows_per_s for other in paces.values())
        if len(paces) == 1 and not starting:
            return min(left, _batches(_usual(pace, PROBE_S), pace.batch))
        end_s = {name: (other.held_rows + other.batch) / other.rows_per_s for name, other in paces.items()}
        all_end_s = (left + sum(other.held_rows for other in paces.values())) / all_rows_per_s
        if end_s[lane] > all_end_s and end_s[lane] > min(end_s.values()):
            return 0
        # A quarter of a fair share of what is left: it holds two chunks, and speeds are only roughly known.
        return min(left, _batches(min(_usual(pace), left * pace.rows_per_s / (4 * all_rows_per_s)), pace.batch))


class Static:
    def __init__(self) -> None:
        self._measured: set[str] = set()
        self._share: dict[str, int] = {}  # rows each may still take; together what is left

    def chunk_rows(self, lane: str, left: int, paces: Mapping[str, Pace], starting: int) -> int:
        if not self._share:
            if starting and not self._measured:
                return 0  # all at once: what one does alone says nothing of what it does beside the others
            if lane not in self._measured:
                pace, waiting = paces[lane], [pace for name, pace in paces.items() if name not in self._measured]
                self._measured.add(lane)
                shortest = max(MEASURE_BATCHES * pace.batch, MEASURE_MIN_S * pace.rows_per_s)
                fair = left * pace.rows_per_s / sum(one.rows_per_s for one in waiting)  # of a run that is all measuring
                rows = min(MEASURE_S * pace.rows_per_s, shortest, CHUNK_ROWS_MAX, fair)
                return min(left, _batches(rows, pace.batch))
            if any(pace.held_rows for pace in paces.values()):
                return 0
        if set(self._share) != set(paces) or sum(self._share.values()) != left:  # a lane came or went
            self._share = split(left, {name: pace.rows_per_s for name, pace in paces.items()})
        rows = min(self._share[lane], _batches(_usual(paces[lane]), paces[lane].batch))
        self._share[lane] -= rows
        return rows


POLICIES: dict[str, type[Dynamic] | type[Static]] = {"dynamic": Dynamic, "static": Static}


def split(rows: int, rows_per_s: Mapping[str, float]) -> dict[str, int]:
    """`rows` by speed, to the row: what rounding leaves goes where it was cut off most."""
    whole = sum(rows_per_s.values())
    exact = {name: rows * speed / whole for name, speed in rows_per_s.items()}
    shares = {name: math.floor(share) for name, share in exact.items()}
    by_rest = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_rest[: rows - sum(shares.values())]:
        shares[name] += 1
    return shares


def _usual(pace: Pace, probe_s: float = 0.0) -> float:
    """Rows of a chunk that nothing cuts short; the first ones of a lane are a probe."""
    rows = CHUNK_S * pace.rows_per_s
    if not pace.seen:
        rows = min(rows, max(PROBE_BATCHES * pace.batch, probe_s * pace.rows_per_s))
    return min(rows, CHUNK_ROWS_MAX)


def _batches(rows: float, batch: int) -> int:
    """Whole batches of about so many rows, at least one."""
    return batch * max(1, round(rows / batch))
