"""What a person sees of a run: a bar on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

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

LINE_S_MIN, LINE_S_MAX = 1.0, 60.0  # between lines, growing with the run: a night leaves hundreds of them in a log


class Display:
    """Shows `total` rows going by; silent with `quiet`."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self.total, self.done = total, 0
        self.start_s = self.line_s = monotonic()
        self.lines = not quiet and not sys.stderr.isatty()
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
        self.done += tick.rows
        status = (
            f"{lane.spec.name} {tick.rows / tick.seconds:,.1f} img/s  bad {totals.quarantined_new}  "
            f"waits: decode {tick.decode_wait_s:.2f} s, engine {tick.encode_wait_s:.2f} s -> {tick.bound} bound"
        )
        self.bar.update(self.task, completed=self.done, status=status)
        now_s = monotonic()
        if self.lines and now_s >= self.line_s:
            self.line_s = now_s + min(LINE_S_MAX, max(LINE_S_MIN, now_s - self.start_s))
            print(f"{self._so_far(now_s)}  {status}", file=sys.stderr, flush=True)

    def _so_far(self, now_s: float) -> str:
        left_s = (now_s - self.start_s) * (self.total - self.done) / max(1, self.done)
        left = timedelta(seconds=round(max(0.0, left_s)))
        return f"{self.done:,}/{self.total:,}  {100 * self.done / self.total:.0f} %, {left} left"


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
