"""Work sharing: cuts pending rows into chunks, hands them to lanes first come first served, commits what comes back.

Every pending row is handed out until it has an outcome. When a lane dies or hangs, the rows it had in hand are retried
alone, one per chunk; one that takes a lane down by itself is quarantined, and everything else goes back to the queue.
A lane whose GPU memory was full starts again with half the batch. A lane that cannot go on is given up and the others
finish its work. Each lane holds two chunks, so that it never waits for the coordinator between them.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait

from pipeline.batch import Reason
from pipeline.history import Sample, Throughput
from pipeline.lanes import STOP_GRACE_S, TICK_S, Lane, LaneSpec
from pipeline.messages import Broken, Chunk, Claim, Done, Lost, Message, Ready, Refused, Tick, Verdict
from pipeline.shares import Dynamic, Pace, Policy
from pipeline.store import Outcome, PendingItem, Store

log = logging.getLogger(__name__)

CHUNKS_PER_LANE = 2
LANE_DEATHS_MAX = 3  # deaths in a row with nobody to blame: it is not the pictures
READ_CRASHES_MAX = 3  # rows of one container that take their reader down; then its others are not read


class LaneFailed(Exception):
    """No lane can do the work; the words are the lane's own."""


class LaneRefused(LaneFailed):
    """A lane that the user asked for cannot be had at all."""


@dataclass
class Totals:
    """What this run did, by outcome."""

    embedded: int = 0
    copied: int = 0
    quarantined_new: int = 0
    decoders: Counter[str] = field(default_factory=Counter)
    bound_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # by bound stage
    throughput: Throughput = field(default_factory=Throughput)
    sample: Sample = field(default_factory=Sample)  # of the embedded inputs
    engines: dict[str, str] = field(default_factory=dict)  # lane -> runtime and precision, and what became of it


@dataclass
class Sharing:
    """The coordinator's loop over one store and its lanes."""

    store: Store
    specs: Sequence[LaneSpec]
    stopping: Callable[[], bool]
    on_tick: Callable[[Lane, Tick, Totals], None]
    all_needed: bool = True  # a lane that cannot even start ends the run
    policy: Policy = field(default_factory=Dynamic)
    totals: Totals = field(default_factory=Totals)
    lanes: list[Lane] = field(default_factory=list)
    returned: deque[PendingItem] = field(default_factory=deque)  # of chunks whose lane died
    suspects: deque[PendingItem] = field(default_factory=deque)  # to be retried alone
    cursor: int = 0  # rows up to here have been handed out in this pass
    left: int = 0  # rows of this pass not handed out yet
    chunk_number: int = 0
    claimed: dict[bytes, int] = field(default_factory=dict)  # content hash -> chunk that computes it
    accused: dict[str, tuple[PendingItem, Lane]] = field(default_factory=dict)  # lane -> what it died of, alone
    crashed_reads: Counter[str] = field(default_factory=Counter)  # by container; rows that took their reader down
    deaths: Counter[str] = field(default_factory=Counter)  # of each lane, since its last finished chunk
    start_s: float = field(default_factory=time.monotonic)
    _left_before: int = sys.maxsize  # pending rows when this pass began

    def run(self) -> Totals:
        """Until every pending row has an outcome, or the run is stopped.

        Raises:
            LaneFailed: a lane met a bug of ours, or every lane was given up. LaneRefused: one cannot be had at all.
        """
        self.left = self.store.counts().pending
        self.lanes = [Lane.start(spec) for spec in self.specs]
        try:
            while not self.stopping() and self._hand_out():
                self._listen(timeout_s=0.2)
                self._kill_the_hung()
            if self.stopping():
                self._drain()
        finally:
            for lane in self.lanes:
                lane.close()
        return self.totals

    # ---- handing out -----------------------------------------------------------------------------------------------

    def _hand_out(self) -> bool:
        """Top every lane up; False when every row has its outcome."""
        for _ in range(CHUNKS_PER_LANE):
            for lane in self.lanes:
                if lane.ready and not lane.alone and len(lane.chunks) < CHUNKS_PER_LANE:
                    self._give(lane)
        # A lane that is still starting is waited for only if it must judge a picture, or there is no other.
        if self.accused or any(lane.chunks for lane in self.lanes) or not any(lane.ready for lane in self.lanes):
            return True
        if self._left_to_give():  # the policy wants every lane to be there
            return True
        return self._another_pass()

    def _give(self, lane: Lane) -> None:
        if self.suspects:
            if lane.chunks:
                return  # wait: a suspect must be alone, so that a second death can only be its own
            rows = self._without_crashers([self.suspects.popleft()])
            lane.alone = bool(rows)
        else:
            rows = self._without_crashers(self._next_rows(self._chunk_rows(lane)))
        if rows:
            self.chunk_number += 1
            lane.give(Chunk(self.chunk_number, self.store.shard_path(), rows))

    def _chunk_rows(self, lane: Lane) -> int:
        if not (left := self._left_to_give()):
            return 0
        paces = {
            other.spec.name: Pace(
                other.ready.batch,
                other.rows_per_s or other.ready.rows_per_s or 1.0,  # an engine that was never measured has no rate
                sum(len(chunk.rows) for chunk in other.chunks.values()),
                seen=bool(other.rows_per_s),
            )
            for other in self.lanes
            if other.ready and not other.alone
        }
        return self.policy.chunk_rows(lane.spec.name, left, paces, sum(not other.ready for other in self.lanes))

    def _left_to_give(self) -> int:
        return self.left + len(self.returned)

    def _next_rows(self, count: int) -> list[PendingItem]:
        if not count:
            return []
        if self.returned:
            return [self.returned.popleft() for _ in range(min(count, len(self.returned)))]
        rows = self.store.pending(count, self.cursor)
        if rows:
            self.cursor, self.left = rows[-1].id, self.left - len(rows)
        else:
            self.left = 0
        return rows

    def _another_pass(self) -> bool:
        """Copies whose original failed, or sat in a chunk that never came back, are still pending: start over."""
        left = self.store.counts().pending
        if left and left >= self._left_before:
            raise LaneFailed(f"{left} rows stay pending although every one was handed out; this is a bug of ours")
        self.left, self._left_before, self.cursor = left, left, 0
        return left > 0

    # ---- listening -------------------------------------------------------------------------------------------------

    def _listen(self, timeout_s: float) -> None:
        by_conn = {lane.conn: lane for lane in self.lanes}
        for conn in wait(list(by_conn), timeout_s):
            lane = by_conn[conn]  # type: ignore[index]
            try:
                self._handle(lane, lane.hear())
            except (EOFError, ConnectionError):
                self._bury(lane, Lost(""))

    def _handle(self, lane: Lane, message: Message) -> None:
        match message:
            case Claim():
                lane.tell(Verdict(self._judge(message)))
            case Done():
                self._commit(lane, message)
            case Tick():
                if message.seconds >= TICK_S or not lane.rows_per_s:  # shorter ones end a chunk
                    lane.saw(message.rows / message.seconds)
                self.totals.bound_s[message.bound] += message.seconds
                self.totals.throughput.add(message, time.monotonic() - self.start_s)
                self.on_tick(lane, message, self.totals)
            case Ready():
                self._welcome(lane, message)
            case Refused(words):
                if lane.spec.name not in self.totals.engines and (self.all_needed or len(self.specs) == 1):
                    raise LaneRefused(words)
                self._give_up(lane, words)
            case Lost():
                self._bury(lane, message)
            case Broken(words):
                raise LaneFailed(words)

    def _judge(self, claim: Claim) -> list[bool]:
        """New contents are reserved for the asking chunk, so that equal bytes are computed once."""
        new = []
        for content_hash, known in zip(claim.hashes, self.store.has_vectors(claim.hashes), strict=True):
            new.append(not known and content_hash not in self.claimed)
            if new[-1]:
                self.claimed[content_hash] = claim.chunk
        return new

    def _commit(self, lane: Lane, done: Done) -> None:
        committed = self.store.commit_chunk(done.shard, done.outcomes)
        self.totals.embedded += committed.embedded
        self.totals.sample.add([outcome.id for outcome in done.outcomes if outcome.status == "embedded"])
        self.totals.copied += committed.copied
        self.totals.quarantined_new += committed.quarantined_new
        self.totals.decoders.update(done.decoders)
        self._release(lane, done.chunk)
        lane.alone = False
        del self.deaths[lane.spec.name]

    def _release(self, lane: Lane, chunk_number: int) -> Chunk:
        self.claimed = {h: number for h, number in self.claimed.items() if number != chunk_number}
        return lane.chunks.pop(chunk_number)

    # ---- deaths ----------------------------------------------------------------------------------------------------

    def _kill_the_hung(self) -> None:
        for lane in self.lanes:
            if not lane.hung and (late := lane.board.overdue()):
                lane.hung = late
                lane.process.kill()  # the end of file on its pipe does the rest

    def _bury(self, lane: Lane, lost: Lost) -> None:
        """A lane died: settle its rows and start another in its place."""
        name, log_path, in_hand = lane.spec.name, lane.spec.log_path, lane.board.in_hand()
        lane.kill()
        lane.killed = not lost.words and not lane.hung and lane.process.exitcode == -signal.SIGKILL
        rows = self._rows_of(lane)
        self.lanes.remove(lane)
        if lost.full_at:
            self._shrink(lane, lost, rows)
            return
        suspects = [row for row in rows if lane.alone or any(first <= row.id <= last for first, last in in_hand)]
        blamed = {row.id for row in suspects}
        self.returned.extend(row for row in rows if row.id not in blamed)
        if lane.alone:
            self.accused[name] = (suspects.pop(), lane)
        self.suspects.extend(suspects)
        if lost.words or not in_hand or lane.hung == "read":
            self.deaths[name] += 1
        log.warning(
            "%s died (exit code %s%s); %d unfinished rows are retried, %d of them alone; its last words: %s",
            name,
            lane.process.exitcode,
            lost.words and f": {lost.words}",
            len(rows),
            len(suspects),
            log_path,
        )
        if self.deaths[name] >= LANE_DEATHS_MAX:
            why = f"with no picture in hand: out of memory, or a fault of the engine; see the system log and {log_path}"
            if lane.hung == "read":
                why = f"waiting for bytes of {lane.spec.source.root}: is it there, and does it answer?"
            self._give_up(
                lane, f"{name} died {self.deaths[name]} times in a row (exit code {lane.process.exitcode}) {why}"
            )
        elif not self.stopping():
            self.lanes.append(Lane.start(lane.spec))

    def _shrink(self, lane: Lane, lost: Lost, rows: list[PendingItem]) -> None:
        """GPU memory was full: nobody's picture is to blame, and the lane goes on with half the batch."""
        (self.suspects if lane.alone else self.returned).extend(rows)
        if lost.full_at == 1:
            self._give_up(lane, f"{lane.spec.name}: its memory is full even with one picture at a time: {lost.words}")
        elif not self.stopping():
            batch = lost.full_at // 2
            log.warning(
                "%s: GPU memory is full with batches of %d (%s); it goes on with %d",
                lane.spec.name,
                lost.full_at,
                lost.words,
                batch,
            )
            self.lanes.append(Lane.start(replace(lane.spec, batch=batch)))

    def _give_up(self, lane: Lane, words: str) -> None:
        """The run goes on with what is left. What the lane was accused of is open again: it may be the lane's fault."""
        name = lane.spec.name
        self.totals.engines[name] = f"{self.totals.engines.get(name, '')} (given up)".strip()
        if name in self.accused:
            self.suspects.append(self.accused.pop(name)[0])
        if lane in self.lanes:
            lane.kill()
            self.lanes.remove(lane)
            self.returned.extend(self._rows_of(lane))
        if not self.lanes:
            raise LaneFailed(f"{words}. No lane is left; what is done is committed, and the same command goes on there")
        left = ", ".join(other.spec.name for other in self.lanes)
        log.error("%s is given up, the run goes on with %s: %s", name, left, words)

    def _rows_of(self, lane: Lane) -> list[PendingItem]:
        return [row for number in list(lane.chunks) for row in self._release(lane, number).rows]

    def _welcome(self, lane: Lane, ready: Ready) -> None:
        """A device that starts again and gives right pixels is not what killed the lane that had one row in hand."""
        lane.ready, self.totals.engines[lane.spec.name] = ready, ready.engine
        log.info("%s runs %s, batches of %d", lane.spec.name, ready.engine, ready.batch)
        if accused := self.accused.pop(lane.spec.name, None):
            row, dead = accused
            reading = dead.board.reading()
            if reading and not dead.hung and not dead.killed:
                self.crashed_reads[_container(row)] += 1
            reason: Reason = "timeout" if dead.hung else "decoder_crash"
            words = f"took its {'reader' if reading else 'decoder'} process down twice, the second time alone"
            decoding = any(first <= row.id <= last for first, last in dead.board.in_hand())
            if not decoding:
                words = "the engine died twice with it, the second time with it alone, after it was decoded"
            if dead.hung == "read" or dead.killed or not decoding:  # not the picture: it is tried again in the next run
                reason = "read_error"
            if dead.killed:
                words += "; no crash, it was killed, mostly for want of memory: see the system log"
            self._condemn([row], reason, f"{words} (exit code {dead.process.exitcode})")

    def _condemn(self, rows: Sequence[PendingItem], reason: Reason, words: str) -> None:
        outcomes = [Outcome(row.id, "quarantined", None, reason, words=words) for row in rows]
        self.totals.quarantined_new += self.store.commit_chunk(None, outcomes).quarantined_new

    def _without_crashers(self, rows: list[PendingItem]) -> list[PendingItem]:
        """A parquet file that takes its reader down does so with row after row; it is not given the chance."""
        crashers = {name for name, rows_lost in self.crashed_reads.items() if rows_lost >= READ_CRASHES_MAX}
        if not crashers:
            return rows
        lost = [row for row in rows if _container(row) in crashers]
        if lost:
            self._condemn(lost, "decoder_crash", f"{READ_CRASHES_MAX} pictures beside it took their reader down")
        return [row for row in rows if _container(row) not in crashers]

    def _drain(self) -> None:
        """The run is stopped: lanes drop the batch in flight and hand in the rows that are done."""
        for lane in self.lanes:
            lane.board.stop()
        deadline_s = time.monotonic() + STOP_GRACE_S
        while any(lane.chunks for lane in self.lanes) and time.monotonic() < deadline_s:
            self._listen(timeout_s=0.2)


def _container(row: PendingItem) -> str:
    return row.key.rpartition("/")[0]
