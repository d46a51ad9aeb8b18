"""Work sharing: cuts pending rows into chunks, hands them to lanes first come first served, commits what comes back.

Every pending row is handed out until it has an outcome. When a lane dies or hangs, what it had goes back to the queue,
but for the rows that `pipeline.blame` wants to be tried alone, and another lane starts in its place. A lane whose GPU
memory was full starts again with half the batch. A lane that cannot go on is given up and the others finish its work.
Each lane holds two chunks, so that it never waits for the coordinator between them.
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

from pipeline.blame import Blame
from pipeline.history import Sample, Throughput
from pipeline.lanes import KILL_S, STOP_GRACE_S, TICK_S, Lane, LaneSpec
from pipeline.messages import Broken, Chunk, Claim, Done, Lost, Message, Ready, Refused, Tick, Verdict
from pipeline.shares import Dynamic, Pace, Policy
from pipeline.store import Outcome, PendingItem, Store

log = logging.getLogger(__name__)

CHUNKS_PER_LANE = 2


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
    commits: int = 0
    commit_s: float = 0.0  # of the coordinator's, while lanes go on
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
    cursor: int = 0  # rows up to here have been handed out in this pass
    left: int = 0  # rows of this pass not handed out yet
    chunk_number: int = 0
    claimed: dict[bytes, int] = field(default_factory=dict)  # content hash -> chunk that computes it
    start_s: float = field(default_factory=time.monotonic)
    blame: Blame = field(init=False)
    _left_before: int = sys.maxsize  # pending rows when this pass began

    def __post_init__(self) -> None:
        self.blame = Blame(self.specs[0].source.container_of, self._quarantine)

    def run(self) -> Totals:
        """Until every pending row has an outcome, or the run is stopped.

        Raises:
            LaneFailed: a lane met a bug of ours, or every lane was given up. LaneRefused: one cannot be had at all.
        """
        counts = self.store.counts()
        self.left, self.blame.proven = counts.pending, counts.embedded > 0
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
        if self.blame.accused or any(lane.chunks for lane in self.lanes) or not any(lane.ready for lane in self.lanes):
            return True
        if self.blame.suspects or self._left_to_give():  # the policy wants every lane to be there
            return True
        return self._another_pass()

    def _give(self, lane: Lane) -> None:
        if rows := self._rows_for(lane):
            self.chunk_number += 1
            lane.give(Chunk(self.chunk_number, self.store.shard_path(), rows))

    def _rows_for(self, lane: Lane) -> list[PendingItem]:
        """A chunk, or the one row that the lane gets alone because its next death has to be judged."""
        if not self.blame.wants(lane):
            return self.blame.spared(self._next_rows(self._chunk_rows(lane)))
        if lane.chunks:
            return []  # wait: what is judged must be alone, so that a second death can only be its own
        rows = self.blame.spared(self.blame.next_alone(lane, self._one_from_elsewhere))
        lane.alone, lane.content = bool(rows), None
        return rows

    def _one_from_elsewhere(self) -> list[PendingItem]:
        """The farthest from where a lane died: large pictures, bad files and the like lie side by side."""
        return [self.returned.pop()] if self.returned else self._next_rows(1)

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
                lane.tell(Verdict(self._judge(lane, message)))
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
                needed = lane.spec.name not in self.totals.engines and (self.all_needed or len(self.specs) == 1)
                if needed and not self.stopping():
                    raise LaneRefused(words)
                self._give_up(lane, words)
            case Lost():
                self._bury(lane, message)
            case Broken(words):
                raise LaneFailed(words)

    def _judge(self, lane: Lane, claim: Claim) -> list[bool]:
        """New contents are reserved for the asking chunk, so that equal bytes are computed once."""
        lane.content = claim.hashes[0]
        new = []
        for content_hash, known in zip(claim.hashes, self.store.has_vectors(claim.hashes), strict=True):
            new.append(not (known or content_hash in self.claimed or content_hash in self.blame.condemned))
            if new[-1]:
                self.claimed[content_hash] = claim.chunk
        return new

    def _commit(self, lane: Lane, done: Done) -> None:
        start_s = time.monotonic()
        committed = self.store.commit_chunk(done.shard, self.blame.settled(done.outcomes))
        self.totals.commit_s += time.monotonic() - start_s
        self.totals.commits += 1
        self.totals.embedded += committed.embedded
        self.totals.sample.add([outcome.id for outcome in done.outcomes if outcome.status == "embedded"])
        self.totals.copied += committed.copied
        self.totals.quarantined_new += committed.quarantined_new
        self.totals.decoders.update(done.decoders)
        self._release(lane, done.chunk)
        self.blame.finished(lane)
        lane.alone = False

    def _quarantine(self, outcomes: Sequence[Outcome]) -> None:
        self.totals.quarantined_new += self.store.commit_chunk(None, outcomes).quarantined_new

    def _release(self, lane: Lane, chunk_number: int) -> Chunk:
        self.claimed = {h: number for h, number in self.claimed.items() if number != chunk_number}
        return lane.chunks.pop(chunk_number)

    # ---- deaths ----------------------------------------------------------------------------------------------------

    def _kill_the_hung(self) -> None:
        for lane in list(self.lanes):
            if lane.hung and time.monotonic() > lane.hung_until_s:
                self._bury(lane, Lost(""))  # a driver holds it in the kernel: no end of file will come
            elif not lane.hung and (late := lane.board.overdue()):
                lane.hung, lane.hung_until_s = late, time.monotonic() + KILL_S
                lane.process.kill()  # the end of file on its pipe does the rest

    def _bury(self, lane: Lane, lost: Lost) -> None:
        """A lane died: settle its rows and start another in its place."""
        lane.kill()
        lane.lost = lost.words
        lane.killed = not lost.words and not lane.hung and lane.process.exitcode == -signal.SIGKILL
        rows = self._rows_of(lane)
        self.lanes.remove(lane)
        if lost.full_at:
            self._shrink(lane, lost, rows)
            return
        back = self.blame.died(lane, rows)
        self.returned.extend(back)
        log.warning(
            "%s died (exit code %s%s); %d unfinished rows are retried, %d of them alone; its last words: %s",
            lane.spec.name,
            lane.process.exitcode,
            ": killed, mostly for want of memory" if lane.killed else lost.words and f": {lost.words}",
            len(rows),
            len(rows) - len(back),
            lane.spec.log_path,
        )
        if self.stopping():
            return  # nobody starts again, so nobody is judged: what it held stays pending
        if words := self.blame.lane_itself(lane):
            self._give_up(lane, words)
        else:
            self.lanes.append(Lane.start(lane.spec))

    def _shrink(self, lane: Lane, lost: Lost, rows: list[PendingItem]) -> None:
        """GPU memory was full: nobody's picture is to blame, and the lane goes on with half the batch."""
        (self.blame.suspects if lane.alone else self.returned).extend(rows)
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
        self.blame.given_up(lane)
        if lane in self.lanes:
            lane.kill()
            self.lanes.remove(lane)
            self.returned.extend(self._rows_of(lane))
        if not self.lanes:
            if self.stopping():
                return
            raise LaneFailed(f"{words}. No lane is left; what is done is committed, and the same command goes on there")
        left = ", ".join(other.spec.name for other in self.lanes)
        log.error("%s is given up, the run goes on with %s: %s", name, left, words)

    def _rows_of(self, lane: Lane) -> list[PendingItem]:
        return [row for number in list(lane.chunks) for row in self._release(lane, number).rows]

    def _welcome(self, lane: Lane, ready: Ready) -> None:
        name = lane.spec.name
        lane.ready, self.totals.engines[name] = ready, ready.engine
        log.info("%s runs %s, batches of %d", name, ready.engine, ready.batch)
        self.blame.started(lane)

    def _drain(self) -> None:
        """The run is stopped: lanes drop the batch in flight and hand in the rows that are done.

        Raises:
            LaneFailed: a lane met a bug of ours, and the others have handed in.
        """
        for lane in self.lanes:
            lane.board.stop()
        deadline_s = time.monotonic() + STOP_GRACE_S
        broken: list[LaneFailed] = []
        while any(lane.chunks for lane in self.lanes) and time.monotonic() < deadline_s:
            try:
                self._listen(timeout_s=0.2)
            except LaneFailed as error:
                broken.append(error)
        if broken:
            raise broken[0]
