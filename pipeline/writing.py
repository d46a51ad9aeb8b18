"""Whether a run writes to an index now, and what to say of a folder that has nothing to read yet. Takes no lock."""

from __future__ import annotations

import os
import shlex
import sqlite3
import time
from pathlib import Path

from pipeline.store import StoreError
from pipeline.store.ledger import take_stock


def writer(index: Path) -> int | None:
    """Process that writes to the index now. Told by the kernel's list of locks: asking for the lock, even for a moment,
    could turn a run away that starts in that moment."""
    try:
        inode = (index / "lock").stat().st_ino
        locks = Path("/proc/locks").read_text().splitlines()
    except FileNotFoundError:
        return None
    for line in locks:
        match line.split():
            case [_, "FLOCK", _, "WRITE", pid, place, *_] if place.rpartition(":")[2] == str(inode):
                return int(pid)
    return None


def why_no_index(index: Path) -> str:
    """Of a folder without a generation to read: what it is, and what helps."""
    link, status = index / "current", shlex.join(["python", "-m", "pipeline.status", "--out", str(index)])
    if link.is_symlink():
        repair = shlex.join(["python", "-m", "pipeline.verify", "--repair", "--out", str(index)])
        return f"{link} is a link to {os.readlink(link)}, which is not there; run {repair}"
    if not (index / "manifest.sqlite").exists():
        found = "has none" if index.is_dir() else "is no folder"
        return (
            f"no index in {index}: expected the --out of a pipeline.index that has published, and it {found}; "
            f"make one: python -m pipeline.index --out {shlex.quote(str(index))} ..."
        )
    process = writer(index)
    if process is None:
        return (
            f"no index in {index} yet: a first run was begun, has not published, and is not seen to go on; the same "
            f"command goes on there. What is known of it: {status}"
        )
    return (
        f"no index in {index} yet: its first run goes on{_so_far(index)} (process {process}); ask again when it has "
        f"published. How far it is: {status}"
    )


def _so_far(index: Path) -> str:
    """Of the run that goes on; "" where the manifest has nothing to tell yet, or not to us."""
    try:
        stock = take_stock(index, examples=0, runs=1)
    except (StoreError, sqlite3.Error, OSError):
        return ""
    if not stock.runs:
        return ""
    done = sum(source.embedded + source.quarantined for source in stock.sources)
    listed = done + sum(source.pending for source in stock.sources)
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(stock.runs[0].started_s))
    return f" since {since}" + (f", {done:,} of {listed:,} listed pictures are done" if listed else "")
