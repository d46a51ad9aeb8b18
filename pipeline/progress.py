"""What a person sees of a run: a bar on a terminal, one plain line per second elsewhere. All of it on stderr."""

from __future__ import annotations

import sys
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


class Display:
    """Shows `total` rows going by; silent with `quiet`."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self.total, self.done = total, 0
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
        if self.lines:
            print(f"{self.done:,}/{self.total:,}  {status}", file=sys.stderr, flush=True)


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
