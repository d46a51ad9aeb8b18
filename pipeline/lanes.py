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
from typing import Any, Literal

import msgspec

from engines import Device
from engines.spec import Precision, Preprocess
from pipeline.messages import MESSAGE_BYTES_MAX, Chunk, Claim, Done, Lost, Message, Order, Ready, decode, encode
from pipeline.setting import HARDWARE_SHARE
from pipeline.sources import Source

TICK_S = 1.0
STARTING, START_DEADLINE_S = -1, 600.0  # stands on the board in place of a row; a hung driver must not hang the run
ENGINE_SLOTS_MAX = 8  # batches that a GPU may have in hand
READ_THREADS = 8  # hides the latency of network file systems; on a warm local cache one is enough
KILL_S = 5.0  # a process that a driver holds outlives its kill, and must not hold the run
READ_DEADLINE_S = 120.0  # of one picture's bytes: a slow network stays below, one that is gone does not
STOP_GRACE_S = 30.0  # one engine batch of the largest model on one slow core


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
    cores: int = 1  # of the host's, its share; fewer where it is bound to fewer

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
    hung_until_s: float = 0.0  # of time.monotonic(): when it is given up even if it does not die of that
    killed: bool = False  # by somebody else; mostly the kernel, for want of memory
    lost: str = ""  # why it ended, in its own words; it has none when it crashes
    content: bytes | None = None  # hash of the row it holds alone, once that is read

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

    def hear(self) -> Message:
        """Its next message; a lane that says what is none counts as lost.

        Raises:
            EOFError, ConnectionError: it has died.
        """
        try:
            message = decode(self.conn.recv_bytes(MESSAGE_BYTES_MAX))
        except ConnectionError:
            raise
        except (msgspec.DecodeError, OSError) as error:
            return Lost(f"{self.spec.name} says what is no message: {error}")
        if isinstance(message, Claim | Done) and not self._is_mine(message):
            return Lost(f"{self.spec.name} speaks of rows or files that are not of its chunk {message.chunk}")
        return message

    def _is_mine(self, message: Claim | Done) -> bool:
        if (chunk := self.chunks.get(message.chunk)) is None:
            return False
        if isinstance(message, Claim):
            return True
        told, held = Counter([outcome.id for outcome in message.outcomes]), Counter([row.id for row in chunk.rows])
        in_place = message.shard is None or chunk.shard_path.parts[-2:] == tuple(message.shard.name.split("/"))
        # The views compare in C, which almost always does; `tune` has rows in a chunk twice, and may hear of one.
        return in_place and (told.items() <= held.items() or told <= held)

    @property
    def may_be_why(self) -> bool:
        """Of a dead one: whether it may have ended so with any other picture in hand."""
        return self.killed or self.hung == "read" or bool(self.lost) or not self.board.in_hand()

    def saw(self, rows_per_s: float) -> None:
        self.rows_per_s = (self.rows_per_s + rows_per_s) / 2 if self.rows_per_s else rows_per_s

    def give(self, chunk: Chunk) -> None:
        self.chunks[chunk.number] = chunk
        with contextlib.suppress(BrokenPipeError):  # it has just died: the end of file on its pipe returns the rows
            self.tell(chunk)

    def tell(self, order: Order) -> None:
        self.conn.send_bytes(encode(order))

    def kill(self) -> None:
        self.process.kill()
        self.process.join(timeout=KILL_S)
        self.conn.close()

    def close(self) -> None:
        """Ask the child to leave, and make sure it has. One that is still starting would not listen."""
        with contextlib.suppress(OSError):  # it has left already
            self.tell(None)
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
