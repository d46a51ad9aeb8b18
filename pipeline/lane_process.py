"""The inside of a lane: three threads, each waiting for the one before, so that reading, decoding and encoding overlap.

    reader   reads and hashes files, asks the coordinator which contents are new      -> Batch with `encoded`
    decoder  decodes and preprocesses into a free engine buffer                       -> Batch with `slot`
    encoder  (the main thread) runs the engine, collects vectors, writes the shard    -> Done

A fourth only hears: whatever the others are stuck in, the coordinator can say what it has to and see to the next lane.

The loops are the same on every device: `pipeline.devices` gives them engine and stages. On a GPU, decoder and encoder
only queue work, and the encoder waits once per batch, in `engine.result`. Queues are bounded and time both ends.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import cast

import msgspec
import numpy as np
import numpy.typing as npt

from engines.hardware import physical_cores
from engines.turns import share_cores
from pipeline.batch import Batch, Failure
from pipeline.child import die_with_parent
from pipeline.devices import last_words, open_lane_engine, open_stages
from pipeline.lanes import ENGINE_SLOTS_MAX, READ_THREADS, TICK_S, Board, LaneSpec
from pipeline.messages import (
    Broken,
    Chunk,
    Claim,
    Done,
    Message,
    Order,
    Ready,
    Tick,
    Verdict,
    decode_order,
    encode,
    sayable,
)
from pipeline.posted_source import PostedSource
from pipeline.reads import Read, Reader
from pipeline.sources import Source
from pipeline.store import Outcome, PendingItem, write_shard
from pipeline.waits import Wait

BATCH_BYTES_MAX = 128 << 20  # of encoded pictures read together: some batches are in memory at once, whatever they hold
BATCHES_WITH_ENGINE = 2  # of its three buffers; the decoder fills the third
GPU_DEADLINE_S = 300.0  # a batch from decode to vectors; each of its rows that takes the CPU stage has 60 s of its own


@dataclass
class Work:
    """A chunk on its way through the lane. The end of the chunk travels the same queues as its batches."""

    chunk: Chunk
    hashes: dict[int, bytes] = field(default_factory=dict)  # row id -> content hash
    outcomes: list[Outcome] = field(default_factory=list)
    emb_blocks: list[npt.NDArray[np.float16]] = field(default_factory=list)
    emb_ids: list[int] = field(default_factory=list)
    decoders: Counter[str] = field(default_factory=Counter)

    def fail(self, row_id: int, failure: Failure) -> None:
        self.outcomes.append(
            Outcome(row_id, "quarantined", self.hashes.get(row_id), failure.reason, words=sayable(failure.words))
        )


def lane_main(spec: LaneSpec, conn: Connection, board: Board) -> None:
    """Entry point of the child process."""
    _die_with_coordinator()
    for number in (signal.SIGINT, signal.SIGTERM):  # the coordinator decides; it sets the board's stop flag
        signal.signal(number, signal.SIG_IGN)
    try:
        log_file = spec.log_path.open("w")
    except OSError as error:
        words = f"{spec.name} cannot write its log: {error}; what is done is committed"
        conn.send_bytes(encode(Broken(sayable(words))))
        return
    try:
        os.dup2(log_file.fileno(), 2)  # libtiff and its like print there, in the middle of a progress bar
        faulthandler.enable(log_file)
        logging.captureWarnings(True)
        process = LaneProcess(spec, conn, board)
    except BaseException as error:  # noqa: BLE001 - whatever it is, its words go to the coordinator
        conn.send_bytes(encode(last_words(spec, error)))
    else:
        process.run()


class LaneProcess:
    def __init__(self, spec: LaneSpec, conn: Connection, board: Board) -> None:
        self.spec, self.conn, self.board = spec, conn, board
        self.send_lock = threading.Lock()
        self._watch_for_lost_threads()
        if spec.kind == "cpu":
            share_cores(max(min(spec.cores, physical_cores()), spec.engine_threads))  # bound to, or asked for
        self.engine = open_lane_engine(spec)
        assert self.engine.slots <= ENGINE_SLOTS_MAX
        self.stages = open_stages(spec, board, self.engine)
        self.orders: queue.SimpleQueue[Order] = queue.SimpleQueue()  # two chunks and a verdict at most
        self.backlog: deque[Chunk] = deque()
        self.to_decode: queue.Queue[tuple[Work, Batch | None]] = queue.Queue(spec.lead_batches)
        self.to_encode: queue.Queue[tuple[Work, Batch | None]] = queue.Queue(self.engine.slots)
        self.free_slots: queue.Queue[int] = queue.Queue()
        for slot in range(self.engine.slots):
            self.free_slots.put(slot)
        self.read_wait, self.decode_wait, self.slot_wait, self.encode_wait = Wait(), Wait(), Wait(), Wait()
        self.tick_rows, self.tick_start_s = 0, 0.0

    def run(self) -> None:
        card = self.engine.card
        self.board.finish(0)
        self._send(Ready(f"{card.runtime} {card.precision}", card.rows_per_s, card.batch))
        gc.freeze()  # as `index.index_source`
        for loop in (self._hear_loop, self._read_loop, self._decode_loop):
            threading.Thread(target=self._guarded, args=(loop,), daemon=True).start()
        self._guarded(self._encode_loop)

    def _hear_loop(self) -> None:
        while True:
            self.orders.put(decode_order(self.conn.recv_bytes()))

    # ---- reader ----------------------------------------------------------------------------------------------------

    def _read_loop(self) -> None:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            source = PostedSource(self.spec.source, self.board)
            reader = Reader(cast(Source, source), pool, READ_THREADS, lambda: self.board.stopped)
            while (chunk := self._next_chunk()) is not None:
                if not self.tick_start_s:  # from the first chunk: a lane may wait for others that start more slowly
                    self._next_tick()
                work = Work(chunk)
                source.row_ids = {row.locator: row.id for row in chunk.rows}
                for batch in self._batches(work, reader):
                    self._to_decode(work, batch)
                self._to_decode(work, None)

    def _to_decode(self, work: Work, batch: Batch | None) -> None:
        with self.read_wait:
            self.to_decode.put((work, batch))

    def _batches(self, work: Work, reader: Reader) -> Iterator[Batch]:
        """Full batches of contents that nobody has computed yet; failed reads and copies get their outcome here."""
        size = self.engine.card.batch
        fresh: list[tuple[int, bytes]] = []
        for reads in reader.read_chunk(_groups(work.chunk.rows, size)):
            if self.board.stopped:
                break
            fresh += self._fresh(work, reads)
            while len(fresh) >= size or sum(len(encoded) for _, encoded in fresh) > BATCH_BYTES_MAX:
                yield _batch(fresh[:size])
                del fresh[:size]
        if fresh:
            yield _batch(fresh)

    def _fresh(self, work: Work, reads: list[tuple[PendingItem, Read]]) -> list[tuple[int, bytes]]:
        readable: list[tuple[int, bytes]] = []
        for row, read in reads:
            if isinstance(read, Failure):
                work.fail(row.id, read)
            else:
                readable.append((row.id, read[0]))
                work.hashes[row.id] = read[1]
        if not readable:
            return []
        self._send(Claim(work.chunk.number, [work.hashes[row_id] for row_id, _ in readable]))
        new = self._await_verdict().new
        for (row_id, _), is_new in zip(readable, new, strict=True):
            if not is_new:
                work.outcomes.append(Outcome(row_id, "copied", work.hashes[row_id]))
        return [pair for pair, is_new in zip(readable, new, strict=True) if is_new]

    def _next_chunk(self) -> Chunk | None:
        if self.backlog:
            return self.backlog.popleft()
        message = self.orders.get()
        assert message is None or isinstance(message, Chunk), f"expected a chunk, got {message!r}"
        if message is None:
            os._exit(0)  # all chunks are done: the coordinator only asks then
        return message

    def _await_verdict(self) -> Verdict:
        while not isinstance(order := self.orders.get(), Verdict):
            assert order is not None, "told to leave with a chunk in hand"
            self.backlog.append(order)
        return order

    # ---- decoder ---------------------------------------------------------------------------------------------------

    def _decode_loop(self) -> None:
        while True:
            with self.decode_wait:
                work, batch = self.to_decode.get()
            if batch is not None:
                if self.board.stopped:
                    continue
                with self.slot_wait:
                    batch.slot = self.free_slots.get()
                self._post(batch)
                batch = self.stages(batch, self.engine.input(batch.slot))
            self.to_encode.put((work, batch))

    def _post(self, batch: Batch) -> None:
        """A GPU fault shows up at any time until the vectors are out, and could be any row's; on CPUs, stages post."""
        if self.spec.kind == "gpu":
            worker = self.spec.decode_threads + batch.slot
            self.board.start(worker, int(batch.ids.min()), GPU_DEADLINE_S, int(batch.ids.max()))

    # ---- encoder ---------------------------------------------------------------------------------------------------

    def _encode_loop(self) -> None:
        """Two batches are with the engine whenever two are ready, so that its workers never wait for each other.

        The end of a chunk waits in line like a batch: its shard is written while the next chunk's batches run.
        """
        running: deque[tuple[Work, Batch | None]] = deque()
        while True:
            try:
                with self.encode_wait:
                    work, batch = self.to_encode.get(block=not running)
            except queue.Empty:  # nothing to launch now: wait for the engine instead
                self._settle(*running.popleft())
                continue
            if batch is not None:
                if self.board.stopped:
                    self.free_slots.put(batch.slot)  # the decoder may wait for one, and the chunk's end is behind it
                    continue
                self.engine.launch(batch.slot, len(batch.ids))
            running.append((work, batch))
            while running and (running[0][1] is None or _batches_in(running) == BATCHES_WITH_ENGINE):
                self._settle(*running.popleft())

    def _settle(self, work: Work, batch: Batch | None) -> None:
        if batch is None:
            self._finish(work)
        else:
            self._collect(work, batch)

    def _collect(self, work: Work, batch: Batch) -> None:
        rows = len(batch.ids)
        emb_nd = self.engine.result(batch.slot)
        self.board.finish(self.spec.decode_threads + batch.slot)
        self.free_slots.put(batch.slot)
        good = np.array([row not in batch.failed for row in range(rows)])
        infinite = good & ~np.isfinite(emb_nd).all(axis=1)
        if infinite.sum() == good.sum() > 1:
            raise ArithmeticError(f"the engine {self.engine.card.runtime} gave no finite vector for a whole batch")
        for row in np.flatnonzero(infinite).tolist():
            words = f"{self.engine.card.runtime} {self.engine.card.precision} gives no finite vector for it"
            batch.failed[row] = Failure("corrupt", words)
        good &= ~infinite
        for row, row_id in enumerate(batch.ids.tolist()):
            if row in batch.failed:
                work.fail(row_id, batch.failed[row])
            else:
                work.emb_ids.append(row_id)
                work.outcomes.append(Outcome(row_id, "embedded", work.hashes[row_id], mark=batch.marks.get(row, "")))
        work.emb_blocks.append(emb_nd[good])
        work.decoders.update(batch.decoders)
        self.tick_rows += rows
        if time.monotonic() - self.tick_start_s >= TICK_S:
            self._report_tick()

    def _finish(self, work: Work) -> None:
        shard = None
        if work.emb_ids:  # an all-bad chunk gives no file
            shard = write_shard(
                work.chunk.shard_path,
                np.concatenate(work.emb_blocks),
                np.array(work.emb_ids, np.int64),
                [work.hashes[row_id] for row_id in work.emb_ids],
                {"space": self.spec.space, "engine": self.engine.card.identity},
            )
        self._report_tick()
        self._send(Done(work.chunk.number, shard, _copies_settled(work.outcomes), work.decoders))

    # ---- all -------------------------------------------------------------------------------------------------------

    def _report_tick(self) -> None:
        if (tick := self._next_tick()).rows:
            self._send(tick)

    def _next_tick(self) -> Tick:
        """Begins another one. The threads go on meanwhile: a wait counts in both, up to here and from here."""
        now = time.monotonic()
        ended = Tick(
            self.tick_rows,
            self.read_wait.untold_s(),
            self.decode_wait.untold_s(),
            self.slot_wait.untold_s(),
            self.encode_wait.untold_s(),
            now - self.tick_start_s,
        )
        self.tick_rows, self.tick_start_s = 0, now
        return ended

    def _send(self, message: Message) -> None:
        with self.send_lock:
            self.conn.send_bytes(encode(message))

    def _guarded(self, loop: Callable[[], None]) -> None:
        """A fault in any thread ends the whole lane, with its words; a thread never dies alone."""
        try:
            loop()
        except (EOFError, BrokenPipeError):  # the coordinator is gone
            os._exit(1)
        except BaseException as error:  # noqa: BLE001
            self._send(last_words(self.spec, error))
            os._exit(1)

    def _watch_for_lost_threads(self) -> None:
        """A thread without memory for its first step is told of as unraisable alone, and who started it waits for ever.
        There is no memory for a hook in Python either: a queue, which is C, wakes a thread that runs already."""
        lost: queue.SimpleQueue[sys.UnraisableHookArgs] = queue.SimpleQueue()

        def watch() -> None:
            while not issubclass((told := lost.get()).exc_type, MemoryError):
                sys.__unraisablehook__(told)
            raise told.exc_value or MemoryError()

        threading.Thread(target=self._guarded, args=(watch,), daemon=True).start()
        sys.unraisablehook = lost.put


def _batch(rows: list[tuple[int, bytes]]) -> Batch:
    return Batch(ids=np.array([row_id for row_id, _ in rows], np.int64), encoded=[encoded for _, encoded in rows])


def _copies_settled(outcomes: list[Outcome]) -> list[Outcome]:
    """A copy of what failed in the same chunk fails likewise: ten thousand equal error pages are looked at once, not
    once in each of as many passes. What could not be computed for the host's sake is tried again.
    """
    failed = {one.content_hash: one for one in outcomes if one.status == "quarantined" and one.reason != "read_error"}
    failed.pop(None, None)
    return [
        msgspec.structs.replace(failed[one.content_hash], id=one.id)
        if one.status == "copied" and one.content_hash in failed
        else one
        for one in outcomes
    ]


def _groups(rows: list[PendingItem], size: int) -> Iterator[list[PendingItem]]:
    """As many rows as a batch has, or fewer where their files are large."""
    group: list[PendingItem] = []
    group_bytes = 0
    for row in rows:
        if group and (len(group) == size or group_bytes + row.size_bytes > BATCH_BYTES_MAX):
            yield group
            group, group_bytes = [], 0
        group.append(row)
        group_bytes += row.size_bytes
    if group:
        yield group


def _batches_in(running: deque[tuple[Work, Batch | None]]) -> int:
    return sum(batch is not None for _, batch in running)


def _die_with_coordinator() -> None:
    """So that no orphan writes a shard."""
    die_with_parent()
    coordinator = multiprocessing.parent_process()
    if coordinator is None or os.getppid() != coordinator.pid:  # it died before we asked; in a container it may be 1
        os._exit(1)
