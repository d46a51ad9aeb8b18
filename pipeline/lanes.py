"""A lane = decode + preprocess + engine on one device, in a spawned child process of its own.

The coordinator keeps a `Lane` handle per child: a pipe for messages and a `Board` in shared memory. A decoder that
crashes or hangs takes its lane down and nothing else; the board says which rows it had in hand. Spawned, never forked:
a forked child hangs once OpenMP has been used in the parent. One process sees one GPU: CV-CUDA crashes with several.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from engines import Device
from engines.spec import Precision, Preprocess
from pipeline.setting import HARDWARE_SHARE
from pipeline.sources import Source
from pipeline.store import Outcome, PendingItem, ShardInfo

TICK_S = 1.0
STARTING, START_DEADLINE_S = -1, 600.0  # stands on the board in place of a row; a hung driver must not hang the run
ENGINE_SLOTS_MAX = 8  # batches that a GPU may have in hand
READ_THREADS = 8  # hides the latency of network file systems; on a warm local cache one is enough
READ_DEADLINE_S = 120.0  # of one picture's bytes: a slow network stays below, one that is gone does not
STOP_GRACE_S = 30.0  # one engine batch of the largest model on one slow core


class Chunk(NamedTuple):
    """The unit of scheduling: rows to do, and where their vectors go."""

    number: int
    shard_path: Path
    rows: list[PendingItem]


class Claim(NamedTuple):
    """Lane to coordinator: which of these contents are new? Those become this chunk's to compute."""

    chunk: int
    hashes: list[bytes]


class Verdict(NamedTuple):
    new: list[bool]


class Done(NamedTuple):
    """All rows of a chunk that have an outcome; rows without one (the run was stopped) stay pending."""

    chunk: int
    shard: ShardInfo | None
    outcomes: list[Outcome]
    decoders: Counter[str]


class Ready(NamedTuple):
    engine: str  # runtime and precision in words
    rows_per_s: float  # as measured when the engine was built
    batch: int


class Refused(NamedTuple):
    """The lane cannot run here: no such engine or device, or a device that gives wrong pixels."""

    words: str


class Lost(NamedTuple):
    """The lane's GPU failed under it; the lane may be started again."""

    words: str
    full_at: int = 0  # rows of the batch that did not fit in GPU memory; 0 where that is not what happened


class Broken(NamedTuple):
    """A bug of ours; it ends the run with these words."""

    words: str


@dataclass(slots=True)
class Tick:
    """What one second looked like from inside the lane: the waits name the bound stage."""

    rows: int = 0
    read_wait_s: float = 0.0  # reader blocked because decode was busy
    decode_wait_s: float = 0.0  # decoder waiting for bytes
    slot_wait_s: float = 0.0  # decoder waiting for a free engine buffer
    encode_wait_s: float = 0.0  # engine waiting for pixels
    seconds: float = 0.0

    @property
    def bound(self) -> str:
        """The stage everybody else waits for: the engine unless it waits itself more than a tenth of the time."""
        if self.encode_wait_s < 0.1 * self.seconds:
            return "engine"
        return "decode" if self.decode_wait_s < 0.5 * self.seconds else "read"


Message: TypeAlias = Claim | Done | Ready | Refused | Lost | Broken | Tick


class Board:
    """Shared memory between a lane and the coordinator: a stop flag, and the rows each worker has in hand.

    `readers` more workers, after the `workers` that decode, read. No locks, so that a child killed at any instruction
    leaves nothing locked; every cell is one aligned int64.
    """

    def __init__(self, workers: int, readers: int = 0) -> None:
        self._cells: Any = multiprocessing.get_context("spawn").RawArray("q", 1 + 3 * (workers + readers))
        self.first_reader = workers

    def stop(self) -> None:
        self._cells[0] = 1

    @property
    def stopped(self) -> bool:
        return bool(self._cells[0])

    def start(self, worker: int, row_id: int, deadline_s: float, last_id: int = 0) -> None:
        """`worker` takes a row, or a batch of rows between `row_id` and `last_id`."""
        self._cells[3 + 3 * worker] = time.monotonic_ns() + int(deadline_s * 1e9)
        self._cells[2 + 3 * worker] = max(row_id, last_id)
        self._cells[1 + 3 * worker] = row_id

    def finish(self, worker: int) -> None:
        self._cells[1 + 3 * worker] = 0

    def in_hand(self) -> list[tuple[int, int]]:
        """First and last row of what each busy worker has (manifest ids start at 1, so 0 means idle)."""
        pairs = zip(self._cells[1::3], self._cells[2::3], strict=True)
        return [(int(first), int(last)) for first, last in pairs if first > 0]

    def reading(self) -> bool:
        return any(row > 0 for row in self._cells[1 + 3 * self.first_reader :: 3])

    def overdue(self) -> Literal["", "decode", "read"]:
        """What takes longer than it may."""
        now = time.monotonic_ns()
        cells = enumerate(zip(self._cells[1::3], self._cells[3::3], strict=True))
        late = [worker for worker, (row, deadline) in cells if row and deadline < now]
        return "" if not late else "read" if late[0] >= self.first_reader else "decode"


@dataclass(frozen=True)
class LaneSpec:
    """All a child needs to start; crosses the process border once."""

    name: str
    device: str  # "cpu" or "gpu:<index>"
    source: Source
    artifact_path: Path
    preprocess: Preprocess
    runtime: str
    precision: Precision | Literal["auto"]
    engine_threads: int
    decode_threads: int
    space: str
    log_path: Path  # what C libraries print, and the stack of a crash
    batch: int | None = None  # rows; None for what the engine was built with. Less once GPU memory was full
    team: int = 1  # engine threads that work on one run together, see `engines.aoti`
    lead_batches: int = 2  # read ahead and waiting to be decoded
    hardware_share: float = HARDWARE_SHARE  # of a GPU's JPEGs, for its hardware decoder
    cpus: tuple[int, ...] = ()  # bound to these before anything starts a thread; empty: as the coordinator

    @property
    def kind(self) -> Device:
        return "cpu" if self.device == "cpu" else "gpu"


@dataclass
class Lane:
    """The coordinator's handle on one child."""

    spec: LaneSpec
    process: Any
    conn: Connection
    board: Board
    ready: Ready | None = None
    chunks: dict[int, Chunk] = field(default_factory=dict)  # handed out and not yet done
    rows_per_s: float = 0.0  # by its last ticks, half by the very last; 0 until known
    alone: bool = False  # it holds one suspect row and gets nothing else until that is decided
    hung: Literal["", "decode", "read"] = ""  # killed because this took longer than it may
    killed: bool = False  # by somebody else; mostly the kernel, for want of memory

    @classmethod
    def start(cls, spec: LaneSpec) -> Lane:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        board = Board(spec.decode_threads + ENGINE_SLOTS_MAX, READ_THREADS)
        board.start(0, STARTING, START_DEADLINE_S)
        process = context.Process(target=_child, args=(spec, theirs, board), name=spec.name, daemon=True)
        process.start()
        theirs.close()  # so that the child's death is an end of file here
        return cls(spec, process, ours, board)

    def saw(self, rows_per_s: float) -> None:
        self.rows_per_s = (self.rows_per_s + rows_per_s) / 2 if self.rows_per_s else rows_per_s

    def give(self, chunk: Chunk) -> None:
        self.chunks[chunk.number] = chunk
        with contextlib.suppress(BrokenPipeError):  # it has just died: the end of file on its pipe returns the rows
            self.conn.send(chunk)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.conn.close()

    def close(self) -> None:
        """Ask the child to leave, and make sure it has. One that is still starting would not listen."""
        with contextlib.suppress(OSError):  # it has left already
            self.conn.send(None)
        self.process.join(timeout=5 if self.ready else 0)
        self.kill()


def _child(spec: LaneSpec, conn: Connection, board: Board) -> None:
    """Imports engine, decoders and what they need in the child alone: the coordinator stays small."""
    if spec.kind == "gpu":
        see_only(spec.device)
    if spec.cpus:
        os.sched_setaffinity(0, spec.cpus)
    from pipeline.lane_process import lane_main

    lane_main(spec, conn, board)


def see_only(gpu: str) -> None:
    """In a fresh process, before any library asks: the index of `gpu` counts what is visible now, then that one is."""
    index, visible = int(gpu.partition(":")[2]), os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index].strip() if visible else str(index)
