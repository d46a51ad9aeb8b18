"""Promise: the coordinator hands every row out once and commits it once, for any number of rows, lanes and batches.

It is the real one, with real lanes and messages; only pipes, store and clock are made up, so that half a million rows
take seconds.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.lanes import Board, Lane, LaneSpec
from pipeline.messages import Chunk, Done, Message, Ready, Tick, decode_order, encode
from pipeline.scheduler import Sharing
from pipeline.shares import POLICIES
from pipeline.store import Outcome, PendingItem, Store
from pipeline.store.store import Committed

HASH = bytes(16)


class Rows:
    """A store of so many pending rows, which counts how often each was handed out and committed."""

    def __init__(self, rows: int) -> None:
        self.rows, self.given, self.done = rows, np.zeros(rows + 1, int), np.zeros(rows + 1, int)

    def counts(self) -> Any:
        done = int((self.done > 0).sum())
        return SimpleNamespace(pending=self.rows - done, embedded=done)

    def pending(self, count: int, after: int) -> list[PendingItem]:
        last = min(self.rows, after + count)
        self.given[after + 1 : last + 1] += 1
        return [PendingItem(row, "key", b"", 1) for row in range(after + 1, last + 1)]

    def shard_path(self) -> Path:
        return Path("shards/1.h5")

    def commit_chunk(self, shard: Any, outcomes: list[Outcome]) -> Committed:
        np.add.at(self.done, [outcome.id for outcome in outcomes], 1)
        return Committed(embedded=len(outcomes))


@dataclass
class Clock:
    """What will happen, in order: somebody says something."""

    now_s: float = 0.0
    end_s: float = 0.0  # when the last chunk was done
    events: list[tuple[float, int, Pipe, Message]] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def say(self, at_s: float, pipe: Pipe, message: Message) -> None:
        heapq.heappush(self.events, (at_s, next(self.numbers), pipe, message))

    def wait(self, pipes: list[Pipe], timeout_s: float) -> list[Pipe]:
        assert self.events, "everybody waits for everybody"
        self.now_s, _, pipe, message = heapq.heappop(self.events)
        if isinstance(message, Done):
            self.end_s = self.now_s
        pipe.said = encode(message)
        return [pipe]


@dataclass(eq=False)
class Pipe:
    """To a lane of that speed, whose card says `card` rows/s; it does its chunks one after the other."""

    clock: Clock
    speed: float
    batch: int
    card: float
    start_s: float
    free_s: float = 0.0
    rows: int = 0
    said: bytes = b""

    def send_bytes(self, raw: bytes) -> None:
        if not isinstance(chunk := decode_order(raw), Chunk):
            return
        seconds = math.ceil(len(chunk.rows) / self.batch) * self.batch / self.speed
        self.free_s, self.rows = max(self.clock.now_s, self.free_s) + seconds, self.rows + len(chunk.rows)
        self.clock.say(self.free_s, self, Tick(rows=len(chunk.rows), seconds=seconds))
        outcomes = [Outcome(row.id, "embedded", HASH) for row in chunk.rows]
        self.clock.say(self.free_s, self, Done(chunk.number, None, outcomes, {}))

    def recv_bytes(self, _most: int) -> bytes:
        return self.said

    def close(self) -> None:
        pass


class Run:
    def __init__(self, rows: int, policy: str, lanes: list[tuple[float, float]], batch: int, known: bool) -> None:
        """`lanes` are rows/s and seconds to start."""
        self.rows, self.clock = Rows(rows), Clock()
        self.pipes = {
            f"cpu/{number}": Pipe(self.clock, speed, batch, speed if known else 1000.0, start_s)
            for number, (speed, start_s) in enumerate(lanes)
        }
        source = SimpleNamespace(container_of=bytes)
        specs = [cast(LaneSpec, SimpleNamespace(name=name, source=source)) for name in self.pipes]
        sharing = Sharing(cast(Store, self.rows), specs, lambda: False, lambda *_: None, policy=POLICIES[policy]())
        with patch.object(Lane, "start", self._start), patch("pipeline.scheduler.wait", self.clock.wait):
            self.totals = sharing.run()

    def _start(self, spec: LaneSpec) -> Lane:
        pipe = self.pipes[spec.name]
        self.clock.say(pipe.start_s, pipe, Ready("fake", pipe.card, pipe.batch))
        process = SimpleNamespace(join=lambda timeout=None: None, kill=lambda: None, exitcode=0)
        return Lane(spec, process, cast(Any, pipe), Board(1))

    def assert_exact(self) -> None:
        assert (self.rows.given[1:] == 1).all(), "handed out twice, or never"
        assert (self.rows.done[1:] == 1).all(), "committed twice, or never"
        assert self.totals.embedded == self.rows.rows


LANES = st.lists(st.tuples(st.floats(5, 20_000), st.floats(0, 30)), min_size=1, max_size=9)


@pytest.mark.parametrize("policy", POLICIES)
@settings(deadline=None, max_examples=60)
@given(
    rows=st.one_of(st.integers(0, 20), st.integers(0, 3000)),
    lanes=LANES,
    batch=st.sampled_from([1, 7, 32, 256, 2048]),
    known=st.booleans(),
)
def test_every_row_once(policy: str, rows: int, lanes: list[tuple[float, float]], batch: int, known: bool) -> None:
    Run(rows, policy, lanes, batch, known).assert_exact()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("rows", "lanes", "batch"),
    [(0, 1, 32), (0, 4, 32), (1, 9, 1), (8, 9, 1), (9, 9, 2048), (499_999, 3, 32), (499_999, 1, 2048)],
)
def test_every_row_once_at_the_edges(policy: str, rows: int, lanes: int, batch: int) -> None:
    """No row, fewer rows than lanes, and a number that no chunk or batch divides."""
    speeds = [(100.0 * 3**number, float(number)) for number in range(lanes)]
    Run(rows, policy, speeds, batch, known=False).assert_exact()


@pytest.mark.parametrize("policy", POLICIES)
def test_lanes_of_speed_1_3_10_end_within_3_percent_of_the_ideal(policy: str) -> None:
    """On a clock that also sees waits between chunks; from when all lanes are there."""
    run = Run(100_000, policy, [(10.0, 0.0), (30.0, 0.0), (100.0, 0.0)], 32, known=policy == "static")
    run.assert_exact()
    assert run.clock.end_s <= 1.03 * 100_000 / 140
