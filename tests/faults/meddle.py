"""Called in the process of a run before it begins; most wait for the end of its listing and change what it found."""

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


def into_cgroup() -> None:
    """The folder is a control group: the run and its lanes live in it, and are killed where it has no memory left."""
    (Path(FOLDER) / "cgroup.procs").write_text(str(os.getpid()))


def vanish() -> None:
    """The folder of pictures is gone after the tenth of them was listed."""
    from pipeline.sources import place_local

    look_at, looks = place_local._look_at, iter(range(10**9))

    def look_until_it_is_gone(*args):  # type: ignore[no-untyped-def]
        if next(looks) == 10:
            Path(FOLDER).rename(Path(FOLDER).with_name("unmounted"))
        return look_at(*args)

    place_local._look_at = look_until_it_is_gone
