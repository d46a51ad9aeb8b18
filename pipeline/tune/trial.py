"""Measures lanes as they will run: real processes on real pictures, with nobody else's work between the readings.

There is no store: the pictures are a sample of the user's own, read once before so that all settings find them in the
page cache, and every content counts as new each time it comes. How fast a source can be read is not measured.
"""

from __future__ import annotations

import logging
import random
import signal
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

import psutil

from pipeline.batch import BadImage, Item
from pipeline.lanes import KILL_S, READ_THREADS, Lane, LaneSpec
from pipeline.messages import Broken, Chunk, Claim, Done, Lost, Ready, Refused, Tick, Verdict
from pipeline.shares import CHUNK_ROWS_MAX
from pipeline.sources import Source
from pipeline.store import PendingItem
from pipeline.tune.halving import Measured

log = logging.getLogger(__name__)

BLOCK_ROWS, BLOCKS = 64, 32  # pictures that lie together are read together, as a run does
LIST_S, WARM_S = 10.0, 10.0
PATIENCE = 8  # a measurement may take so many times its window, and START_S more
START_S = 60.0
IDLE = ("idle", "iowait", "guest", "guest_nice")  # guests are part of user time


def sample(source: Source) -> list[PendingItem]:
    """Up to 2,048 pictures that can be read, in blocks from all over what is listed within `LIST_S`."""
    blocks: list[list[Item]] = []
    block: list[Item] = []
    seen, chance, start_s = 0, random.Random(0), time.monotonic()
    for found in source.list(lambda uri, size, etag: False):
        if isinstance(found, Item):
            block.append(found)
        if len(block) == BLOCK_ROWS:
            seen += 1
            if len(blocks) < BLOCKS:
                blocks.append(block)
            elif (at := chance.randrange(seen)) < BLOCKS:
                blocks[at] = block
            block = []
            if time.monotonic() - start_s > LIST_S:
                break
    items = [item for one in blocks or [block] for item in one]
    rows = [PendingItem(number, item.key, item.locator, item.size_bytes) for number, item in enumerate(items, 1)]
    return _readable(source, rows)


def _readable(source: Source, rows: Sequence[PendingItem]) -> list[PendingItem]:
    end_s = time.monotonic() + WARM_S

    def read(row: PendingItem) -> bool:
        if time.monotonic() > end_s:
            return False
        with suppress(BadImage):
            source.read(row.locator, row.size_bytes)
            return True
        return False

    with ThreadPoolExecutor(READ_THREADS) as pool:
        good = list(pool.map(read, rows))
    return [row for row, is_good in zip(rows, good, strict=True) if is_good]


class LaneDied(Exception):
    """Without a word; these rows were in its hands."""

    def __init__(self, name: str, rows: list[tuple[int, int]]) -> None:
        super().__init__(f"{name} died")
        self.rows = rows


class Rehearsal:
    """Lanes at work on `rows`, over and over."""

    def __init__(self, rows: Sequence[PendingItem], folder: Path, end_s: float) -> None:
        """`end_s` of time.monotonic() ends any measurement; one that it cuts says nothing of its setting."""
        self.rows, self._folder, self._end_s, self._chunks = list(rows), folder, end_s, 0

    def measure(self, specs: Sequence[LaneSpec], seconds: float) -> Measured:
        """All lanes at once, for `seconds` after every one of them has done its first second; rates add up."""
        try:
            return self._measure(specs, seconds)
        except LaneDied as died:
            # A picture that takes its decoder down is not what is measured here.
            self.rows = [row for row in self.rows if not any(a <= row.id <= b for a, b in died.rows)]
            if not died.rows or not self.rows:
                return Measured(0.0, seconds, 0, str(died))
            return self.measure(specs, seconds)

    def _measure(self, specs: Sequence[LaneSpec], seconds: float) -> Measured:
        ticks: defaultdict[str, list[Tick]] = defaultdict(list)
        give_up_s = time.monotonic() + START_S + PATIENCE * seconds
        lanes, busy_s, start_s = [Lane.start(spec) for spec in specs], _busy_s(), time.monotonic()
        together = False
        try:
            while any(_seconds(ticks[lane.spec.name]) < seconds for lane in lanes):
                by_conn = {lane.conn: lane for lane in lanes}
                for conn in wait(list(by_conn), 0.2):
                    problem = self._listen(by_conn[conn], ticks)  # type: ignore[index]
                    if problem:
                        return Measured(0.0, seconds, 0, problem)
                if not together and len(ticks) == len(lanes):
                    together = True
                    for found in ticks.values():  # what a lane did while another still started, it did alone
                        del found[:-1]
                if late := [lane for lane in lanes if lane.board.overdue()]:
                    raise LaneDied(late[0].spec.name, late[0].board.in_hand())
                if time.monotonic() > self._end_s:
                    return Measured(0.0, 0.0, 0)
                if time.monotonic() > give_up_s:
                    return Measured(0.0, seconds, 0, f"too slow to be measured: not {seconds:.0f} s of work in time")
            rates = [sum(tick.rows for tick in found[1:]) / _seconds(found) for found in ticks.values()]
            peak_bytes = sum(_peak_bytes(lane.process.pid) for lane in lanes)
            ours_s = sum(_cpu_s(lane.process.pid) for lane in lanes)
            others_s = max(0.0, _busy_s() - busy_s - ours_s)
            others = others_s / (psutil.cpu_count() or 1) / (time.monotonic() - start_s)
            return Measured(sum(rates), seconds, peak_bytes, others=others)
        finally:
            for lane in lanes:
                lane.kill()

    def _listen(self, lane: Lane, ticks: defaultdict[str, list[Tick]]) -> str:
        """What makes the setting impossible, if anything does."""
        try:
            message = lane.hear()
        except (EOFError, ConnectionError):
            lane.process.join(KILL_S)
            if lane.process.exitcode == -signal.SIGKILL:  # no picture's fault: decoders have limits of their own
                return f"{lane.spec.name} was killed, mostly for want of memory"
            raise LaneDied(lane.spec.name, lane.board.in_hand()) from None
        match message:
            case Ready() | Done():
                if isinstance(message, Done):
                    lane.chunks.pop(message.chunk)
                    if message.shard:
                        (self._folder / message.shard.name).unlink()
                while len(lane.chunks) < 2:
                    lane.give(self._chunk())
            case Claim():
                lane.tell(Verdict([True] * len(message.hashes)))
            case Tick():
                ticks[lane.spec.name].append(message)
            case Refused(words) | Broken(words) | Lost(words, _):
                return words
        return ""

    def _chunk(self) -> Chunk:
        """Each begins where the last one ended."""
        first = self._chunks * CHUNK_ROWS_MAX
        self._chunks += 1
        rows = [self.rows[(first + at) % len(self.rows)] for at in range(CHUNK_ROWS_MAX)]
        return Chunk(self._chunks, self._folder / "shards" / f"{self._chunks:06d}.h5", rows)


def _seconds(ticks: Sequence[Tick]) -> float:
    """The first tick has the start-up in it."""
    return sum(tick.seconds for tick in ticks[1:])


def _busy_s() -> float:
    """CPU time of the whole host since it started, what other virtual machines took from it included."""
    times = psutil.cpu_times()._asdict()
    return float(sum(seconds for name, seconds in times.items() if name not in IDLE))


def _cpu_s(pid: int) -> float:
    with suppress(psutil.NoSuchProcess):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0


def _peak_bytes(pid: int) -> int:
    with suppress(OSError):  # it has just died
        lines: Iterable[str] = Path(f"/proc/{pid}/status").read_text().splitlines()
        return max((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), default=0)
    return 0
