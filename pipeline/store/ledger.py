"""The manifest as an operator looks at it: what is in which state, and each picture that was given up, with its reason.

Read-only, without the lock, while a run writes: SQLite gives each look the state of one commit, and holds nobody up.
Searching never comes here; it needs nothing but a generation.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from pipeline.store.files import NoIndex
from pipeline.store.manifest import PENDING, explained
from pipeline.store.publish import pinned
from pipeline.store.store import refuse_lost_manifest

T = TypeVar("T")
PAGE_ROWS = 10_000
AFTER = "(scope, reason, i.id) > (?, ?, ?) ORDER BY scope, reason, i.id"  # as the index of the quarantined is sorted


class Entry(NamedTuple):
    """One quarantined picture."""

    source: int
    id: int
    key: str
    reason: str
    words: str  # the decoder's own
    content_hash: str  # hex; "" when its bytes could never be read
    attempts: int  # with these bytes
    first_seen_s: int  # seconds since 1970: start of the run that listed the key first, and of the last one that did
    last_seen_s: int


class SourceState(NamedTuple):
    number: int
    kind: str
    root: str
    options: dict[str, Any]
    embedded: int
    pending: int
    quarantined: int
    deleted: int
    reasons: dict[str, int]  # their sum is `quarantined`


class RunStart(NamedTuple):
    run: int
    source: int
    started_s: int


@dataclass(frozen=True, slots=True)
class Stock:
    """The state of one moment."""

    sources: list[SourceState]
    examples: list[Entry]  # a few of each source and reason, the newest
    runs: list[RunStart]  # newest first
    pinned: int | None  # the generation that was chosen by hand


def take_stock(index: Path, *, examples: int, runs: int) -> Stock:
    """About 2 s per 10 million pictures.

    Raises:
        NoIndex: there is no index. sqlite3.Error: its manifest is lost, or cannot be read.
    """

    def look(db: sqlite3.Connection) -> Stock:
        db.execute("BEGIN")  # one moment for all that follows
        sources = [_source_state(db, *row) for row in db.execute("SELECT id, kind, root, options FROM source")]
        entries = [
            entry
            for source in sources
            for reason in source.reasons
            for entry in _entries(db, "scope = ? AND reason = ? ORDER BY i.id DESC", (source.number, reason), examples)
        ]
        started = db.execute("SELECT number, scope, started_s FROM run ORDER BY number DESC LIMIT ?", (runs,))
        return Stock(sources, entries, [RunStart(*row) for row in started], pinned(db))

    return _read(index, look)


def quarantine_ledger(index: Path) -> Iterator[Entry]:
    """Every quarantined picture, by source and reason, in memory that their number does not change. Raises as above."""
    last: tuple[int, str, int] = (0, "", 0)
    while entries := _read(index, partial(_entries, condition=AFTER, values=last, limit=PAGE_ROWS)):
        yield from entries
        last = entries[-1].source, entries[-1].reason, entries[-1].id


def _source_state(db: sqlite3.Connection, number: int, kind: str, root: str, options: str) -> SourceState:
    def count(condition: str) -> int:
        return int(db.execute(f"SELECT count(*) FROM input WHERE scope = ? {condition}", (number,)).fetchone()[0])

    reasons = dict(
        db.execute(
            "SELECT reason, count(*) FROM input WHERE scope = ? AND status = 'quarantined' GROUP BY reason "
            "ORDER BY count(*) DESC",
            (number,),
        ).fetchall()
    )
    pending, deleted, quarantined = count(f"AND {PENDING}"), count("AND status = 'deleted'"), sum(reasons.values())
    embedded = count("") - pending - deleted - quarantined
    return SourceState(number, kind, root, json.loads(options), embedded, pending, quarantined, deleted, reasons)


def _entries(db: sqlite3.Connection, condition: str, values: tuple[Any, ...], limit: int) -> list[Entry]:
    rows = db.execute(
        "SELECT scope, i.id, key, reason, words, lower(hex(coalesce(content_hash, x''))), attempts, "
        "(SELECT started_s FROM run WHERE number = first_seen), "
        "(SELECT started_s FROM run WHERE number = max(last_seen, source.listed)) "
        f"FROM input i JOIN source ON source.id = scope WHERE status = 'quarantined' AND {condition} LIMIT ?",
        (*values, limit),
    )
    return [Entry(*row) for row in rows]


def _read(index: Path, look: Callable[[sqlite3.Connection], T]) -> T:
    """What `look` finds in the manifest, without writing a byte.

    An open manifest has a log beside it. Where there is none nobody writes, and the file is read as it is: SQLite would
    otherwise leave files there that belong to us, which the next run may not be allowed to open. Should a run begin
    meanwhile, we look again through its log.
    """
    path = index / "manifest.sqlite"
    refuse_lost_manifest(index)
    if not path.is_file():
        raise NoIndex(f"no index in {index}; make one: python -m pipeline.index --out {index} ...")
    try:
        return _look(path, look)
    except sqlite3.DatabaseError as error:
        if "no such table" in str(error):
            words = f"the first run into {index} ended before it knew a picture, maybe for a full disk; start it again"
            raise NoIndex(words) from error
        raise explained(path, error) from error


def _look(path: Path, look: Callable[[sqlite3.Connection], T]) -> T:
    log_file = path.with_name(path.name + "-wal")
    uri = f"file:{quote(str(path.absolute()))}"
    if not log_file.exists():
        try:
            with closing(sqlite3.connect(f"{uri}?immutable=1", uri=True, isolation_level=None)) as db:
                found = look(db)
            if not log_file.exists():
                return found
        except sqlite3.DatabaseError:
            if not log_file.exists():
                raise
    with closing(sqlite3.connect(f"{uri}?mode=ro", uri=True, isolation_level=None)) as db:
        return look(db)
