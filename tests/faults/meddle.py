"""Called in the process of a run: waits for the end of its listing, then changes what was listed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pictures import noisy_jpeg

from pipeline.scheduler import Sharing, Totals

FOLDER = ""  # set by the order


def _each(harm: Callable[[Path], object]) -> None:
    run = Sharing.run

    def meddled(self: Sharing) -> Totals:
        # A half of what is new, whatever is listed first.
        for path in sorted(Path(FOLDER).rglob("*.jpg"))[::2]:
            harm(path)
        return run(self)

    Sharing.run = meddled  # type: ignore[method-assign]


def replaced() -> None:
    _each(lambda path: path.write_bytes(noisy_jpeg(3, 51, 51)))


def truncated() -> None:
    _each(lambda path: os.truncate(path, 0))


def deleted() -> None:
    _each(lambda path: path.unlink())


def a_pipe() -> None:
    def harm(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    _each(harm)


def a_link_in_a_circle() -> None:
    def harm(path: Path) -> None:
        path.unlink()
        path.symlink_to(path.name)

    _each(harm)
