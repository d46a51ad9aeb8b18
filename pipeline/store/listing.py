"""One listing of a source against the manifest: what is new, changed, as it was, or gone.

Which rows were seen is a byte per id (100 MB at 100 M), not a column: a night in which nothing changed writes no row.
A key costs about 2 us when it is unchanged and 10 us when it is new.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.batch import Item
from pipeline.store.manifest import PENDING, VARIABLES, bump_state, insert_rows, next_id, transaction
from pipeline.store.records import INT64, NUMBERED, NUMBERS, QUOTES, RECORDS, hex_of, pack_all, place_of, records_of

log = logging.getLogger(__name__)
Bits: TypeAlias = npt.NDArray[np.bool_]
FETCH_ROWS = 8_192
RANGE_FACTOR = 2  # rows of a range that are read for each key that was listed in it


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


class _Part(NamedTuple):
    """Some rows of the manifest."""

    sql: str
    args: tuple[Any, ...]


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
        hashes, metadata = pack_all(items)
        keys = [item.key for item in items]
        # Sources list in order: then one range takes half the time of look-ups.
        part = self._range(keys) if keys == sorted(keys) else None
        if part is not None:
            known, lowest, highest = self._db.execute(f"{RECORDS} {part.sql}", part.args).fetchone()
            listed = records_of(items, hashes) if lowest else ""  # nothing known: nothing to compare
            # Almost always all are as they were. Equal texts are equal rows: with nothing escaped and no quotation mark
            # too many, every text in them ends where it seems to.
            if listed == known and "\\" not in listed and listed.count('"') == QUOTES * len(items):
                together = highest - lowest < len(items)
                ids = slice(lowest, highest + 1) if together else self._read(NUMBERS, part)
                if lowest > 0 and not self._seen[ids].any():
                    self._seen[ids] = True
                    return Observed(unchanged=len(items))
        rows = [row for some in ([part] if part else self._parts(keys)) for row in self._read(NUMBERED, some)]
        return self._observe_each(items, hashes, metadata, {row[0]: row for row in rows})

    def _range(self, keys: list[str]) -> _Part | None:
        """None: most of the range is not listed, such as between two containers, where a folder was."""
        if not keys:
            return None
        part = _Part("FROM input WHERE scope = ? AND key BETWEEN ? AND ?", (self.scope, keys[0], keys[-1]))
        limit = RANGE_FACTOR * len(keys)
        count = self._db.execute(f"SELECT count(*) FROM (SELECT 1 {part.sql} LIMIT {limit})", part.args).fetchone()[0]
        return part if count < limit else None

    def _parts(self, keys: list[str]) -> Iterator[_Part]:
        for start in range(0, len(keys), VARIABLES):
            some = keys[start : start + VARIABLES]
            yield _Part(f"FROM input WHERE scope = ? AND key IN ({','.join('?' * len(some))})", (self.scope, *some))

    def _read(self, select: str, part: _Part) -> list[Any]:
        found: list[Any] = json.loads(self._db.execute(f"{select} {part.sql}", part.args).fetchone()[0])
        return found

    def _observe_each(
        self,
        items: Sequence[Item],
        hashes: Sequence[bytes | None],
        metadata: dict[bytes, str],
        known: dict[str, list[Any]],
    ) -> Observed:
        seen = self._seen.data  # a third of the time of the array's own items
        new: dict[str, tuple[Any, ...]] = {}
        needed: set[bytes | None] = set()
        changed: list[tuple[Any, ...]] = []
        relabelled: list[tuple[Any, ...]] = []
        repeated = unchanged = 0
        bump = False
        # `known` has records with the id behind them, below 0 where the row is deleted.
        for item, meta_hash in zip(items, hashes, strict=True):
            had = known.get(item.key)
            number = had[6] if had else 0
            if (number and seen[abs(number)]) or item.key in new:
                repeated += 1
                log.warning("key listed twice in one run, the first one counts: %r", item.key)
                continue
            mtime_ns = item.mtime_ns if item.mtime_ns < INT64.stop else INT64.stop - 1  # may claim the year 2400
            found = (item.size_bytes, mtime_ns, item.etag, item.locator, meta_hash)
            if had is None:
                new[item.key] = (item.key, *found)
                needed.add(meta_hash)
                continue
            was_deleted, number = number < 0, abs(number)
            seen[number] = True
            same_bytes = had[1:4] == [*found[:3]] and not was_deleted
            same_place, same_metadata = had[4] == place_of(item), had[5] == hex_of(meta_hash)
            if same_bytes and same_place and same_metadata:
                unchanged += 1
                continue
            needed.add(meta_hash)
            if same_bytes:
                relabelled.append((item.locator, meta_hash, number))
                bump = bump or not same_metadata
            else:
                # What a deleted key held is forgotten; what a changed one held is served until it is read again.
                changed.append((*found, was_deleted, self.run, number))
        seen.release()
        if new or changed or relabelled:
            packed = {meta_hash: text for meta_hash, text in metadata.items() if meta_hash in needed}
            self._write(new, changed, relabelled, packed, bump)
        return Observed(len(new), len(changed), len(relabelled), unchanged, repeated)

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
            insert_rows(
                self._db,
                "INSERT INTO input(key, size, mtime_ns, etag, locator, meta_hash, scope, first_seen, last_seen, status)"
                " VALUES",
                f"(?, ?, ?, ?, ?, ?, {self.scope}, {self.run}, {self.run}, 'pending')",
                list(new.values()),
            )
            self._db.executemany(
                "UPDATE input SET size = ?1, mtime_ns = ?2, etag = ?3, locator = ?4, meta_hash = ?5,"
                " content_hash = CASE WHEN ?6 THEN NULL ELSE content_hash END,"
                " first_seen = CASE WHEN ?6 THEN ?7 ELSE first_seen END,"
                " status = 'pending', reason = '', words = '', attempts = 0, last_seen = ?7 WHERE id = ?8",
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
        """How many inputs of the last listing that came to its end are gone, of how many that it left.

        What came up since was never shown: if it counted, a root with other pictures would hide that ours are gone.
        """
        since = self._bits(f"{PENDING} AND first_seen > (SELECT listed FROM source WHERE source.id = scope)")
        known = self._count_live() - int(np.count_nonzero(since))
        return Preview(known - int(np.count_nonzero(self._seen_live() & ~since)), known)

    def finish(self) -> int:
        """The listing is complete: what it did not show is gone. Returns how many."""
        some = self._count_live() > np.count_nonzero(self._seen_live())
        gone = self._gone() if some else np.empty(0, np.int64)
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

    def _seen_live(self) -> Bits:
        """Of them, the ones that were seen: a container that is as it was may hold keys that were deleted before."""
        return self._seen & ~self._bits("status = 'deleted'")

    def _gone(self) -> npt.NDArray[np.int64]:
        """Ids of the inputs of this scope that are neither deleted nor seen."""
        return np.flatnonzero(self._bits("true") & ~self._bits("status = 'deleted'") & ~self._seen)

    def _bits(self, condition: str) -> Bits:
        bits = np.zeros(len(self._seen), np.bool_)
        set_bits(bits, self._db.execute(f"SELECT id FROM input WHERE scope = ? AND {condition}", (self.scope,)))
        return bits


def set_bits(bits: Bits, rows: sqlite3.Cursor) -> None:
    while part := rows.fetchmany(FETCH_ROWS):
        bits[np.fromiter((row[0] for row in part), np.int64, len(part))] = True


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


def after_prefix(prefix: str) -> str | bytes:
    """What sorts right above every text that starts with `prefix`: SQLite compares UTF-8 bytes, and any blob is above
    any text."""
    head = prefix.rstrip("\U0010ffff")
    if not head:
        return b""
    point = ord(head[-1]) + 1
    return head[:-1] + chr(0xE000 if point == 0xD800 else point)
