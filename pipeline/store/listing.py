"""One listing of a source against the manifest: what is new, changed, as it was, or gone.

Which rows were seen is a byte per id (100 MB at 100 M), not a column: a night in which nothing changed writes no row.
A key costs about 4 us when it is unchanged and 10 us when it is new.
"""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from pipeline.batch import Item
from pipeline.store.files import DIGEST_BYTES
from pipeline.store.manifest import PENDING, bump_state, next_id, select_in, transaction

log = logging.getLogger(__name__)
Bits: TypeAlias = npt.NDArray[np.bool_]
FETCH_ROWS = 8_192
RANGE_FACTOR = 2  # rows of a range that are read for each key that was listed in it
REPLACEMENT = "\ufffd"
INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class Scope:
    """What one listing covers; all three parts tell scopes apart, for two splits below one root are two listings.

    A key is deleted only when its own scope was listed without it.
    """

    kind: str
    root: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Container(Protocol):
    """A tar or parquet file: unchanged, it costs one stat a night."""

    @property
    def uri(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def etag(self) -> str: ...
    @property
    def key_prefix(self) -> str: ...


class Observed(NamedTuple):
    new: int = 0
    changed: int = 0
    relabelled: int = 0  # metadata or place differ, bytes do not
    unchanged: int = 0
    repeated: int = 0  # the source listed the key before in this run; the first one counts


class Preview(NamedTuple):
    gone: int
    of: int


class Listing:
    """The state of one run's listing; made by `begin`."""

    def __init__(self, db: sqlite3.Connection, scope: int, run: int) -> None:
        self._db, self.scope, self.run = db, scope, run
        self._seen: Bits = np.zeros(next_id(db, "input"), np.bool_)
        self._containers: dict[str, tuple[int, str, int, str]] = {}

    @classmethod
    def begin(cls, db: sqlite3.Connection, space: int, scope: Scope) -> Listing:
        options = json.dumps(dict(scope.options), sort_keys=True)
        with transaction(db):
            db.execute(
                "INSERT OR IGNORE INTO source(kind, root, options, space, listed) VALUES (?, ?, ?, ?, 0)",
                (scope.kind, scope.root, options, space),
            )
            number, had_space = db.execute(
                "SELECT id, space FROM source WHERE kind = ? AND root = ? AND options = ?",
                (scope.kind, scope.root, options),
            ).fetchone()
            if had_space != space:
                _turn_to_space(db, number, space)
            db.execute(  # a picture that could not be read is tried again in every run
                "UPDATE input SET status = 'pending' "
                "WHERE scope = ? AND status = 'quarantined' AND reason = 'read_error'",
                (number,),
            )
            run = db.execute(
                "INSERT INTO run(scope, space, started_s) VALUES (?, ?, ?)", (number, space, int(time.time()))
            ).lastrowid
        assert run is not None
        return cls(db, number, run)

    def observe(self, items: Sequence[Item]) -> Observed:
        known = self._known([item.key for item in items])
        seen = self._seen.data  # a third of the time of the array's own items
        new: dict[str, tuple[Any, ...]] = {}
        changed: list[tuple[Any, ...]] = []
        relabelled: list[tuple[Any, ...]] = []
        metadata: dict[bytes, str] = {}
        repeated = unchanged = 0
        bump = False
        for item in items:
            row = known.get(item.key)
            if (row is not None and seen[row[1]]) or item.key in new:
                repeated += 1
                log.warning("key listed twice in one run, the first one counts: %r", item.key)
                continue
            meta_hash, packed = pack_metadata(item.metadata) if item.metadata else (None, "")
            mtime_ns = item.mtime_ns if item.mtime_ns < INT64.stop else INT64.stop - 1  # may claim the year 2400
            found = (item.size_bytes, mtime_ns, item.etag, item.locator, meta_hash)
            if row is None:
                new[item.key] = (self.scope, item.key, *found, self.run, self.run)
            else:
                number, status, had = row[1], row[2], row[3:]
                seen[number] = True
                if had == found and status != "deleted":
                    unchanged += 1
                    continue
                if had[:3] != found[:3] or status == "deleted":
                    # What a deleted key held is forgotten; what a changed one held is served until it is read again.
                    changed.append((*found, status == "deleted", self.run, number))
                else:
                    relabelled.append((item.locator, meta_hash, number))
                    bump = bump or had[4] != meta_hash
            if meta_hash is not None:
                metadata[meta_hash] = packed
        seen.release()
        if new or changed or relabelled:
            self._write(new, changed, relabelled, metadata, bump)
        return Observed(len(new), len(changed), len(relabelled), unchanged, repeated)

    def _known(self, keys: list[str]) -> dict[str, tuple[Any, ...]]:
        """What the manifest has of them. Sources list in order: then one range takes half the time of look-ups."""
        columns = "SELECT key, id, status, size, mtime_ns, etag, locator, meta_hash FROM input WHERE scope = ? AND "
        if keys and keys == sorted(keys):
            sql = f"{columns} key BETWEEN ? AND ? LIMIT ?"
            limit = RANGE_FACTOR * len(keys)
            rows = self._db.execute(sql, (self.scope, keys[0], keys[-1], limit)).fetchall()
            if len(rows) < limit:  # or most of the range is not listed: between two containers, where a folder was
                return {row[0]: row for row in rows}
        return {row[0]: row for row in select_in(self._db, f"{columns} key IN (?*)", (self.scope,), keys)}

    def _write(
        self,
        new: dict[str, tuple[Any, ...]],
        changed: list[tuple[Any, ...]],
        relabelled: list[tuple[Any, ...]],
        metadata: dict[bytes, str],
        bump: bool,
    ) -> None:
        first = next_id(self._db, "input")
        with transaction(self._db):
            self._db.executemany("INSERT OR IGNORE INTO metadata VALUES (?, ?)", metadata.items())
            self._db.executemany(
                "INSERT INTO input(scope, key, size, mtime_ns, etag, locator, meta_hash, first_seen, last_seen, status)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 'pending')",
                new.values(),
            )
            self._db.executemany(
                "UPDATE input SET size = ?, mtime_ns = ?, etag = ?, locator = ?, meta_hash = ?,"
                " content_hash = CASE WHEN ? THEN NULL ELSE content_hash END,"
                " status = 'pending', reason = '', words = '', attempts = 0, last_seen = ? WHERE id = ?",
                changed,
            )
            self._db.executemany("UPDATE input SET locator = ?, meta_hash = ? WHERE id = ?", relabelled)
            if bump:
                bump_state(self._db)
        # AUTOINCREMENT and one writer: the new rows got the next ids, in order.
        end = first + len(new)
        if end > len(self._seen):
            self._seen = np.concatenate([self._seen, np.zeros(end, np.bool_)])  # doubles: few copies
        self._seen[first:end] = True

    def container_unchanged(self, uri: str, size_bytes: int, etag: str) -> bool:
        row = self._db.execute(
            "SELECT size, etag FROM container WHERE scope = ? AND uri = ?", (self.scope, uri)
        ).fetchone()
        return bool(row == (size_bytes, etag))

    def container_seen(self, container: Container) -> None:
        """Its keys are all listed: they were observed one by one, or it is as it was and they are seen with it."""
        if self.container_unchanged(container.uri, container.size_bytes, container.etag):
            self.mark_seen(container.key_prefix)
        self._containers[container.uri] = (self.scope, container.uri, container.size_bytes, container.etag)

    def mark_seen(self, key_prefix: str) -> None:
        rows = self._db.execute(
            "SELECT id FROM input WHERE scope = ? AND key >= ? AND key < ?",
            (self.scope, key_prefix, after_prefix(key_prefix)),
        )
        set_bits(self._seen, rows)

    def preview(self) -> Preview:
        """How many inputs `finish` would delete, of how many that are there now."""
        live = self._count_live()
        return Preview(live - self._count_seen(), live)

    def finish(self) -> int:
        """The listing is complete: what it did not show is gone. Returns how many."""
        gone = self._gone() if self.preview().gone else np.empty(0, np.int64)
        with transaction(self._db):
            self._db.executemany(
                "UPDATE input SET status = 'deleted', last_seen = max(last_seen, "
                "(SELECT listed FROM source WHERE source.id = scope)) WHERE id = ?",
                ((int(number),) for number in gone),
            )
            # Containers are remembered only now: had they been before, a run killed in between would make the next one
            # take keys for seen that have left their container.
            self._db.execute("DELETE FROM container WHERE scope = ?", (self.scope,))
            self._db.executemany("INSERT INTO container VALUES (?, ?, ?, ?)", self._containers.values())
            self._db.execute("UPDATE source SET listed = ? WHERE id = ?", (self.run, self.scope))
            if len(gone):
                bump_state(self._db)
        return len(gone)

    def _count_live(self) -> int:
        """Inputs of this scope that are not deleted: counting over indexes takes a tenth of reading the ids."""
        sql = "SELECT count(*) FROM input WHERE scope = ?"
        every, gone = (self._db.execute(sql + more, (self.scope,)) for more in ("", " AND status = 'deleted'"))
        return int(every.fetchone()[0]) - int(gone.fetchone()[0])

    def _count_seen(self) -> int:
        """Of them, the ones that were seen: a container that is as it was may hold keys that were deleted before."""
        deleted = np.zeros(len(self._seen), np.bool_)
        rows = self._db.execute("SELECT id FROM input WHERE scope = ? AND status = 'deleted'", (self.scope,))
        set_bits(deleted, rows)
        return int(np.count_nonzero(self._seen & ~deleted))

    def _gone(self) -> npt.NDArray[np.int64]:
        """Ids of the inputs of this scope that are neither deleted nor seen."""
        gone = np.zeros(len(self._seen), np.bool_)
        set_bits(gone, self._db.execute("SELECT id FROM input WHERE scope = ?", (self.scope,)))
        set_bits(gone, self._db.execute("SELECT id FROM input WHERE scope = ? AND status = 'deleted'", (self.scope,)),
                 value=False)  # fmt: skip
        return np.flatnonzero(gone & ~self._seen)


def set_bits(bits: Bits, rows: sqlite3.Cursor, value: bool = True) -> None:
    while part := rows.fetchmany(FETCH_ROWS):
        bits[np.fromiter((row[0] for row in part), np.int64, len(part))] = value


def _turn_to_space(db: sqlite3.Connection, scope: int, space: int) -> None:
    """Another model than in the last run of this source: what lacks a vector in its space has to be read again."""
    has_vector = "EXISTS(SELECT 1 FROM vector v WHERE v.content_hash = input.content_hash AND v.space = ?)"
    db.execute(
        f"UPDATE input SET status = 'embedded' WHERE scope = ? AND status = 'rebuild' AND {PENDING} AND {has_vector}",
        (scope, space),
    )
    db.execute(
        f"UPDATE input SET status = 'rebuild' WHERE scope = ? AND status = 'embedded' AND NOT {has_vector}",
        (scope, space),
    )
    db.execute("UPDATE source SET space = ? WHERE id = ?", (space, scope))


def pack_metadata(metadata: Mapping[str, Any]) -> tuple[bytes | None, str]:
    """Canonical JSON and its hash. What no reader could store is left out or replaced: a value that is not finite is
    missing, a whole number past 64 bits is text, NUL and lone surrogates become U+FFFD."""
    if not metadata:
        return None, ""
    clean: dict[str, str | int | float] = {}
    for name, value in metadata.items():
        if isinstance(value, int):
            clean[clean_text(name)] = int(value) if value in INT64 else str(value)
        elif isinstance(value, float):
            if math.isfinite(value):
                clean[clean_text(name)] = value
        else:
            clean[clean_text(name)] = clean_text(value)
    packed = json.dumps(clean, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return blake3(packed.encode()).digest(length=DIGEST_BYTES), packed


def clean_text(value: str) -> str:
    if "\0" not in value and value.isprintable():  # a lone surrogate is not printable
        return value
    return value.replace("\0", REPLACEMENT).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def after_prefix(prefix: str) -> str | bytes:
    """What sorts right above every text that starts with `prefix`: SQLite compares UTF-8 bytes, and any blob is above
    any text."""
    head = prefix.rstrip("\U0010ffff")
    if not head:
        return b""
    point = ord(head[-1]) + 1
    return head[:-1] + chr(0xE000 if point == 0xD800 else point)
