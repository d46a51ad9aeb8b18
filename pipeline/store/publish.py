"""Publishing: everything a reader needs becomes visible at once, by one rename of the link `current`.

    generations/<n>/generation.json    data files with offsets, rows, digests, stretches of live rows; the spec
    generations/<n>/ann.npy            which rows the keys of the lists have; see `lists`
    generations/<n>/index.h5           for any h5py user, one row per live key, ordered by data file and row:
        /embeddings                    (rows, d) float16, virtual, NaN where a data file is missing
        /key /id /content_hash /mark   /key is relative to the root of its source
        /source /locator /size_bytes   where the picture is read: number in generation.json, percent-encoded place
        /metadata/<name>               text ("" where missing), int64 when complete, else float64 with NaN

A vector that several keys show is stored once in the data files; its further rows are copied into index.h5 (/repeated),
at the end of the table, so that a virtual dataset of any collection has few parts. A table costs what changed since the
last one (`amend`), or about 10 s per million keys where it is written whole (`table`).
The virtual dataset names "shards/x.h5": valid beside INDEX/index.h5, and inside a generation through two links, so the
first place HDF5 looks is always the right one and the folder can be moved.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pipeline.store import ann, table
from pipeline.store.amend import Staged, stage
from pipeline.store.files import (
    GENERATION_SCHEMA,
    NoIndex,
    StoreError,
    digest_file,
    point_link,
    sync,
    temporary,
    write_text,
)
from pipeline.store.fold import FILES_MAX, fold, plan
from pipeline.store.list_files import FOLDER
from pipeline.store.manifest import next_id, read_state, set_basis, transaction
from pipeline.store.places import DataFile, scan
from pipeline.store.shards import ShardInfo

log = logging.getLogger(__name__)
KEEP = 3  # generations, the current one included
WriteTable: TypeAlias = Callable[[Path, sqlite3.Connection, Path, int, Sequence[DataFile]], table.Written]
Review: TypeAlias = Callable[[int, int], None]  # numbers of the generation that is shown and of the one to be shown
DATA_FOLDERS = ("shards", "segments")
FILE_FOLDERS = (*DATA_FOLDERS, FOLDER)
OUR_DATA = re.compile(r"\d{6,}(-\d{6,})?\.(h5|usearch|keys)(\.tmp)?")
OUR_REPORT_DRAFT = re.compile(r"\d+\.(json|html)\.tmp")
OUR_GENERATION = re.compile(r"\d+(\.tmp)?")


def publish(
    db: sqlite3.Connection,
    out: Path,
    space: tuple[int, str, int],
    spec: Mapping[str, Any],
    extra: Mapping[str, Any],
    keep: int,
    review: Review | None,
    turn: ann.Turn,
) -> int | None:
    """Write the next generation and show it; when nothing changed since the last one of this space, and its lists are
    complete or no time is left for them, show that one.

    None: another model's generation is shown, and this one's vectors are not complete, so that one stays. Once they
    are, `review` compares the two before readers see the new one. While a generation is pinned (see `show`), the new
    one is written and waits.
    """
    space_number, name, dim = space
    state = read_state(db)
    shown, shown_space = shown_generation(db, out)
    changes_model = shown_space not in (None, space_number)
    if changes_model and missing(db, space_number):
        return None
    last = db.execute("SELECT number, space, state FROM generation ORDER BY number DESC LIMIT 1").fetchone()
    if last and last[1:] == (space_number, state) and _is_done(folder(out, last[0]), turn):
        switch(db, out, last[0])  # a crash may have come between writing it and switching to it
        return int(last[0])

    staged = stage(db, out, space_number, dim)
    if isinstance(staged, Staged):
        files, found, write_table = staged.files, staged.found, staged.write
    else:
        if last:
            log.info("index.h5 is written whole: %s", staged)
        files, found = scan(db, space_number, dim)
        write_table = partial(table.write, marks=found.marks)
    stale: list[str] = []
    for group in plan(files):
        if turn.out_of_time() and sum(file.live_rows > 0 for file in files) < FILES_MAX:
            log.info("files are folded by the next run that has time left")
            break
        segment = fold(db, out, space_number, name, group)
        stale += [file.info.name for file in group]
        files = [file for file in files if file not in group] + ([segment] if segment else [])
    files = [file for file in files if file.live_rows]
    assert len(files) < FILES_MAX, f"{len(files)} data files and index.h5, a generation may name {FILES_MAX}"
    number = next_id(db, "generation")
    head = {"schema": GENERATION_SCHEMA, "number": number, "space": name, "dim": dim}
    named = write_generation(db, out, head, files, write_table, {"spec": dict(spec), "extra": dict(extra)}, turn)
    with transaction(db):
        db.execute(
            "INSERT INTO generation(number, space, state, files) VALUES (?, ?, ?, ?)",
            (number, space_number, state, json.dumps(named)),
        )
        set_basis(db, number, found.lacking)
    if changes_model and review is not None and shown is not None:
        review(shown, number)
    switch(db, out, number)
    prune(db, out, stale, keep)
    return number


def _is_done(home: Path, turn: ann.Turn) -> bool:
    """Whether another generation of the same pictures would show nothing better: its lists may be unfinished."""
    return (home / "generation.json").is_file() and (turn.out_of_time() or ann.is_complete(home))


def shown_generation(db: sqlite3.Connection, out: Path) -> tuple[int | None, int | None]:
    """Number and space of what readers see; None where nothing was published."""
    current = out / "current"
    if not current.is_symlink():
        return None, None
    target = os.readlink(current)
    number = int(target.rpartition("/")[2]) if re.fullmatch(r"generations/\d+", target) else None
    if number is None:
        raise StoreError(
            f"{current} is a link to {target!r}, expected one to generations/<number>; "
            "python -m pipeline.verify --repair puts it right"
        )
    row = db.execute("SELECT space FROM generation WHERE number = ?", (number,)).fetchone()
    return number, int(row[0]) if row else None


def missing(db: sqlite3.Connection, space: int) -> int:
    """Pictures of all sources that another model's generation shows and one of this space could not. Those that cannot
    be read do not count: they would keep the new model out for ever."""
    sql = (
        "SELECT count(*) FROM input i WHERE i.status IN ('embedded', 'pending', 'rebuild') "
        "AND i.content_hash IS NOT NULL "
        "AND NOT EXISTS(SELECT 1 FROM vector v WHERE v.content_hash = i.content_hash AND v.space = ?)"
    )
    return int(db.execute(sql, (space,)).fetchone()[0])


def folder(out: Path, number: int) -> Path:
    return out / "generations" / str(number)


def write_generation(
    db: sqlite3.Connection,
    out: Path,
    head: dict[str, Any],
    files: Sequence[DataFile],
    write_table: WriteTable,
    tail: dict[str, Any],
    turn: ann.Turn,
) -> list[str]:
    """Write the folder under a temporary name, make it durable, name it. Returns the data files and lists it needs."""
    home = folder(out, head["number"])
    draft = temporary(home)
    for left_over in (draft, home):  # of a run that was killed before the manifest named it
        if left_over.exists():
            shutil.rmtree(left_over)
    draft.mkdir()
    for kind in DATA_FOLDERS:
        (draft / kind).symlink_to(f"../../{kind}")
    index = draft / "index.h5"
    rows, repeated, offset, whole_table = write_table(index, db, out, head["dim"], files)
    own = ShardInfo(
        f"generations/{home.name}/index.h5", repeated, head["dim"], index.stat().st_size, digest_file(index), offset
    )
    whole = (index, own, np.array([[0, repeated]], np.int64))
    last = db.execute(
        "SELECT max(number) FROM generation WHERE space = (SELECT id FROM space WHERE name = ?)", (head["space"],)
    ).fetchone()[0]
    lists = ann.update(
        out,
        draft,
        head["number"],
        [*((out / file.info.name, file.info, file.runs()) for file in files), whole],
        ann.last_entry(folder(out, last)) if last else None,
        turn,
    )
    sources = db.execute("SELECT id, kind, root, options FROM source ORDER BY id")
    content = {
        **head,
        "rows": rows,
        "sources": [
            {"id": number, "kind": kind, "root": root, "options": json.loads(options)}
            for number, kind, root, options in sources
        ],
        "index": asdict(own),
        "table": whole_table or {"number": head["number"], "rows": rows, "bytes": own.bytes},
        "files": [{**asdict(file.info), "runs": file.runs().tolist()} for file in files],
        "ann": lists,
        **tail,
    }
    write_text(draft / "generation.json", json.dumps(content, indent=1))
    sync(index)
    sync(draft)
    draft.rename(home)
    sync(home.parent)
    return [*(file.info.name for file in files), *ann.names_of(lists)]


def switch(db: sqlite3.Connection, out: Path, number: int) -> None:
    """Show generation `number`, or the pinned one."""
    target = f"generations/{pinned(db) or number}"
    current = out / "current"
    if not (out / "index.h5").is_symlink():  # first: it leads to the first generation as soon as that is shown
        point_link(out / "index.h5", "current/index.h5")
    if not (current.is_symlink() and os.readlink(current) == target):
        point_link(current, target)


def show(db: sqlite3.Connection, out: Path, number: int | None) -> int:
    """Pin a kept generation: readers see it until another is shown. None takes the pin off: the newest is shown."""
    kept = [row[0] for row in db.execute("SELECT number FROM generation ORDER BY number")]
    if not kept:
        raise NoIndex(f"{out} has no generation yet; make one: python -m pipeline.index --out {out} ...")
    if number is not None and number not in kept:
        raise StoreError(f"generation {number} is not kept in {out}; kept: {', '.join(map(str, kept))}")
    with transaction(db):
        db.execute("DELETE FROM meta WHERE key = 'pinned'")
        if number is not None:
            db.execute("INSERT INTO meta VALUES ('pinned', ?)", (number,))
    switch(db, out, kept[-1])
    return number or int(kept[-1])


def pinned(db: sqlite3.Connection) -> int | None:
    row = db.execute("SELECT value FROM meta WHERE key = 'pinned'").fetchone()
    return int(row[0]) if row else None


def prune(db: sqlite3.Connection, out: Path, stale: Sequence[str], keep: int) -> None:
    """Forget generations beyond the last `keep` and the pinned one, and delete what nothing kept names, `stale` files
    too. A model goes with its last generation, unless a source is still indexed with it."""
    old = db.execute(
        "SELECT number, files, space FROM generation WHERE number IS NOT ? ORDER BY number DESC LIMIT -1 OFFSET ?",
        (pinned(db), keep),
    ).fetchall()
    in_use = "SELECT space FROM generation UNION SELECT space FROM source"
    unnamed = {*stale, *(name for _, files, _ in old for name in json.loads(files))}
    with transaction(db):
        db.executemany("DELETE FROM generation WHERE number = ?", ((number,) for number, _, _ in old))
        for space in {space for _, _, space in old} - {row[0] for row in db.execute(in_use)}:
            unnamed |= {row[0] for row in db.execute("SELECT name FROM shard WHERE space = ?", (space,))}
            db.execute("DELETE FROM vector WHERE space = ?", (space,))
            db.execute("DELETE FROM shard WHERE space = ?", (space,))
    kept = named_files(db)
    for number, _, _ in old:
        shutil.rmtree(folder(out, number))
    for name in unnamed - kept:
        (out / name).unlink(missing_ok=True)


def named_files(db: sqlite3.Connection) -> set[str]:
    """Every data file that the manifest or a kept generation names."""
    named = {row[0] for row in db.execute("SELECT name FROM shard")}
    for (files,) in db.execute("SELECT files FROM generation"):
        named.update(json.loads(files))
    return named


def sweep(db: sqlite3.Connection, out: Path) -> list[str]:
    """Delete what a killed run left: data files and generations that the manifest does not name. Only names that this
    store gives are touched."""
    garbage: list[Path] = []
    named = named_files(db)
    for kind in FILE_FOLDERS:
        for path in (out / kind).glob("*"):  # an index of an earlier version has no folder of lists
            if OUR_DATA.fullmatch(path.name) and f"{kind}/{path.name}" not in named:
                garbage.append(path)
                path.unlink()
    numbers = {str(row[0]) for row in db.execute("SELECT number FROM generation")}
    for path in (out / "generations").iterdir():
        if OUR_GENERATION.fullmatch(path.name) and path.name not in numbers:
            garbage.append(path)
            shutil.rmtree(path)
    drafts = [path for path in (out / "runs").iterdir() if OUR_REPORT_DRAFT.fullmatch(path.name)]
    for path in (temporary(out / "current"), temporary(out / "index.h5"), *drafts):
        if os.path.lexists(path):
            garbage.append(path)
            path.unlink()
    return [str(path.relative_to(out)) for path in garbage]
