"""What a person sees of a run: a bar on a terminal, lines of the log elsewhere. All of it on stderr."""

from __future__ import annotations

import logging
import math
import sys
from datetime import timedelta
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pipeline.lanes import Lane
from pipeline.messages import Tick
from pipeline.scheduler import Totals
from pipeline.terminal import printable

log = logging.getLogger("nightjar")

LINE_S_MIN, LINE_S_MAX = 1.0, 60.0  # between lines, growing with the work: a night leaves hundreds of them in a log


class LinePace:
    """When a line is due of work that begins now; the first one after `first_s`."""

    def __init__(self, first_s: float = LINE_S_MIN) -> None:
        self.start_s = monotonic()
        self.line_s = self.start_s + first_s

    def due(self) -> bool:
        now_s = monotonic()
        if now_s < self.line_s:
            return False
        self.line_s = now_s + min(LINE_S_MAX, max(LINE_S_MIN, now_s - self.start_s))
        return True

    def so_far(self) -> timedelta:
        return clock_time(monotonic() - self.start_s)


def clock_time(seconds: float) -> timedelta:
    """Whole seconds, which read as 1:23:45."""
    return timedelta(seconds=round(max(0.0, seconds)))


class Display:
    """Shows `total` rows of `root` going by; `deadline_s`, of time.monotonic(), is when the budget of this source ends.
    Silent with `quiet`."""

    def __init__(self, root: str, total: int, deadline_s: float = math.inf, *, quiet: bool) -> None:
        self.root, self.total, self.done, self.deadline_s = printable(root), total, 0, deadline_s
        self.lines, self.pace = not quiet and not sys.stderr.isatty(), LinePace(first_s=0.0)
        self.line_s, self.line_done = math.nan, 0  # of the last line; before the first, when engines were loaded
        self.bar = Progress(
            TextColumn("[bold]embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"), console=Console(stderr=True), disable=quiet or self.lines,
        )
        self.task = self.bar.add_task("embed", total=total, status="starting the engine")

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.bar.stop()

    def tick(self, lane: Lane, tick: Tick, totals: Totals) -> None:
        now_s = monotonic()
        if not self.done:
            self.line_s = now_s - tick.seconds
        self.done += tick.rows
        waits = (
            f"bad {totals.quarantined_new}  "
            f"waits: decode {tick.decode_wait_s:.2f} s, engine {tick.encode_wait_s:.2f} s -> {tick.bound} bound"
        )
        status = f"{lane.spec.name} {tick.rows / tick.seconds:,.1f} img/s  {waits}"
        self.bar.update(self.task, completed=self.done, status=status)
        if self.lines and self.pace.due():
            log.info("embedding %s: %s  %s %s", self.root, self._so_far(now_s), lane.spec.name, waits)
            self.line_s, self.line_done = now_s, self.done

    def _so_far(self, now_s: float) -> str:
        """Of all lanes, at the speed since the last line."""
        per_s = (self.done - self.line_done) / (now_s - self.line_s)
        left_s = (self.total - self.done) / per_s
        share = f"{self.done:,}/{self.total:,}  {100 * self.done / self.total:.0f} %"
        return f"{share}, {per_s:,.1f} img/s, {clock_time(left_s)} left{self._against_budget(now_s, left_s)}"

    def _against_budget(self, now_s: float, left_s: float) -> str:
        if self.deadline_s == math.inf:
            return ""
        budget_s = max(0.0, self.deadline_s - now_s)
        words = f", the budget ends in {clock_time(budget_s)}"
        if left_s <= budget_s:
            return words
        too_many = round((self.total - self.done) * (1 - budget_s / left_s))
        return f"{words}: about {too_many:,} stay for the next run"


class TransferBar:
    """Bytes going by, one bar per file."""

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(), console=Console(stderr=True),
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> TransferBar:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.bar.stop()

    def show(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=total)
        self.bar.update(self.tasks[what], completed=done)
