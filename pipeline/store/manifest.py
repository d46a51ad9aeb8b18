"""The manifest: one SQLite file that says what exists. Only the coordinator opens it; readers use generations.

A file of the index that the manifest does not name is garbage, so one transaction (WAL, synchronous=FULL) decides
whether a shard exists. About 330 bytes per picture, 33 GB at 100 M. Indexes are partial where they can be: a run in
which nothing changed reads the (scope, key) index and writes nothing.

What each table says:
    input       one row per key ever listed; ids are never reused. `content_hash` is that of the bytes last read:
                while a picture is pending again, or cannot be read tonight, its last vector is still served.
                `last_seen` is settled when the row goes; a live row was seen in `source.listed` at the latest.
    vector      one row per (content, space); `row` is its place in `shard`
    metadata    JSON by its hash, so that a night that reads no container keeps it
    source      one row per scope; `space` is the one that the states of its inputs speak about
    generation  what was published and the files it names; they live as long as it is kept
    touched     inputs that the last generation may show otherwise than the manifest does, and the metadata that it
                shows. A trigger keeps it, so whatever changes an input touches it in the same transaction. Inputs
                whose content has no vector stay in it: any vector that comes may be theirs.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.store.files import DIGEST_BYTES, StoreDamaged, StoreError

SCHEMA_VERSION = 2
CACHE_KIB = 16_384  # more costs memory and gains nothing: the system caches the file too
VARIABLES = 5_000  # per statement; SQLite allows 32,766
INSERT_ROWS = 100  # per statement: half the time of a statement for each

# A file to read: new or changed ("pending"), or known bytes that have no vector in the space of this run ("rebuild").
PENDING = "status IN ('pending', 'rebuild')"
# Many contents go to SQLite as one blob, :contents, and what belongs to each as a JSON array for `json_each`: one
# statement for a chunk takes a third of the time of one for each row.
CONTENT_OF_EACH = f"substr(:contents, 1 + {DIGEST_BYTES} * each.key, {DIGEST_BYTES})"
# A picture a generation shows, if its content has a vector in the generation's space.
LIVE = "(i.status IN ('embedded', 'pending', 'rebuild') OR (i.status = 'quarantined' AND i.reason = 'read_error'))"

_TOUCHED = f"""
CREATE TABLE touched(id INTEGER PRIMARY KEY, meta_hash BLOB);
CREATE TRIGGER input_touched AFTER UPDATE OF content_hash, meta_hash, locator, size, status, reason ON input
WHEN OLD.content_hash IS NOT NEW.content_hash OR OLD.meta_hash IS NOT NEW.meta_hash
    OR OLD.locator <> NEW.locator OR OLD.size <> NEW.size
    OR {LIVE.replace("i.", "OLD.")} <> {LIVE.replace("i.", "NEW.")}
BEGIN INSERT OR IGNORE INTO touched VALUES (OLD.id, OLD.meta_hash); END;
"""
_SCHEMA = f"""
CREATE TABLE meta(key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE space(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, dim INTEGER NOT NULL);
CREATE TABLE source(
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, root TEXT NOT NULL, options TEXT NOT NULL,
    space INTEGER NOT NULL REFERENCES space, listed INTEGER NOT NULL, UNIQUE(kind, root, options));
CREATE TABLE run(number INTEGER PRIMARY KEY AUTOINCREMENT, scope INTEGER NOT NULL, space INTEGER NOT NULL,
    started_s INTEGER NOT NULL);
CREATE TABLE input(
    id INTEGER PRIMARY KEY AUTOINCREMENT, scope INTEGER NOT NULL REFERENCES source, key TEXT NOT NULL,
    locator BLOB NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, etag TEXT NOT NULL,
    content_hash BLOB, meta_hash BLOB, status TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
    words TEXT NOT NULL DEFAULT '', attempts INTEGER NOT NULL DEFAULT 0,
    first_seen INTEGER NOT NULL, last_seen INTEGER NOT NULL, UNIQUE(scope, key));
CREATE INDEX input_pending ON input(scope, id) WHERE {PENDING};
CREATE INDEX input_quarantined ON input(scope, reason, id) WHERE status = 'quarantined';
CREATE INDEX input_deleted ON input(scope, id) WHERE status = 'deleted';
CREATE TABLE metadata(meta_hash BLOB PRIMARY KEY, json TEXT NOT NULL);
CREATE TABLE container(scope INTEGER NOT NULL, uri TEXT NOT NULL, size INTEGER NOT NULL, etag TEXT NOT NULL,
    PRIMARY KEY(scope, uri)) WITHOUT ROWID;
CREATE TABLE shard(
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, space INTEGER NOT NULL, rows INTEGER NOT NULL,
    bytes INTEGER NOT NULL, digest TEXT NOT NULL, offset INTEGER NOT NULL, engine TEXT NOT NULL DEFAULT '');
CREATE TABLE vector(
    content_hash BLOB NOT NULL, space INTEGER NOT NULL, shard INTEGER NOT NULL, row INTEGER NOT NULL,
    mark TEXT NOT NULL, PRIMARY KEY(content_hash, space)) WITHOUT ROWID;
CREATE TABLE generation(number INTEGER PRIMARY KEY AUTOINCREMENT, space INTEGER NOT NULL, state INTEGER NOT NULL,
    files TEXT NOT NULL);
{_TOUCHED.strip()}
INSERT INTO meta VALUES ('schema', {SCHEMA_VERSION}), ('state', 0);
"""


# What an index of the first schema lacks.
_FROM_1 = f"""
ALTER TABLE shard ADD COLUMN engine TEXT NOT NULL DEFAULT '';
{_TOUCHED.strip()}
UPDATE meta SET value = {SCHEMA_VERSION} WHERE key = 'schema';
"""


class ManifestFailed(StoreError, sqlite3.OperationalError):
    """SQLite could not do what was asked, for a reason outside of it."""


class ManifestDamaged(StoreDamaged, sqlite3.DatabaseError):
    """It is lost, or its bytes are not what SQLite wrote."""


# By the first words of SQLite's own name for what happened.
_DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
RESTORE = (
    "Restore manifest.sqlite from a backup, or index the sources again into a new folder: it cannot be made again from "
    "the other files; what was published is searched as before"
)
_REMEDIES = {
    "SQLITE_BUSY": "another program holds it, such as a backup or a sqlite3 shell; wait for it or end it",
    "SQLITE_LOCKED": "another program holds it, such as a backup or a sqlite3 shell; wait for it or end it",
    "SQLITE_FULL": "its disk is full; make room",
    "SQLITE_IOERR": "its disk fails, or is full; look at the system log and at df",
    "SQLITE_READONLY": "it may not be written; look at the rights of the file and its folder, and how it is mounted",
    "SQLITE_CANTOPEN": "it cannot be opened; look at the rights of the file and its folder",
}


class _Connection(sqlite3.Connection):
    """Names the file and what helps, where SQLite says "disk I/O error"."""

    path: Path

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        try:
            return super().execute(sql, *args)
        except sqlite3.DatabaseError as error:
            raise explained(self.path, error) from error

    def executemany(self, sql: str, *args: Any) -> sqlite3.Cursor:
        try:
            return super().executemany(sql, *args)
        except sqlite3.DatabaseError as error:
            raise explained(self.path, error) from error


def explained(path: Path, error: sqlite3.DatabaseError) -> sqlite3.DatabaseError:
    """The same error with the file and what helps, as a `StoreError`; a fault of ours stays as it is."""
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(_DAMAGE):
        return ManifestDamaged(path, "a sound SQLite file", f"{error} ({name})", RESTORE)
    remedy = next((words for start, words in _REMEDIES.items() if name.startswith(start)), "")
    if not remedy or isinstance(error, ManifestFailed):
        return error
    return ManifestFailed(
        f"{path}: {error} ({name}): {remedy}, and run the same command again: what was committed is kept"
    )


def connect(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, isolation_level=None, factory=_Connection)
    except sqlite3.OperationalError as error:
        raise explained(path, error) from error
    db.path = path
    try:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", f"cache_size = -{CACHE_KIB}"):
            db.execute(f"PRAGMA {pragma}")
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            with transaction(db):
                for statement in _SCHEMA.strip().split(";\n"):
                    db.execute(statement)
        found = db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()[0]
        if found == 1:
            with transaction(db):
                for statement in _FROM_1.strip().split(";\n"):
                    db.execute(statement)
            found = SCHEMA_VERSION
        if found != SCHEMA_VERSION:
            raise StoreError(other_schema(path, found))
    except BaseException:
        db.close()
        raise
    return db


def other_schema(path: Path, found: int) -> str:
    """Of a manifest that cannot be read as it is: `connect` brings the first schema up to date, a reader may not."""
    remedy = "use the version that wrote it, or index into a new folder with --out"
    if found < SCHEMA_VERSION:
        remedy = "any run of pipeline.index or pipeline.nightly into this index brings it up to date; do that first"
    return f"{path} has schema {found}, this version of nightjar reads {SCHEMA_VERSION}; {remedy}"


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All or nothing. On a full disk SQLite has rolled back already, hence the question before our own."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def undone_from_memory(db: sqlite3.Connection) -> Iterator[None]:
    """For a transaction whose statements are about a chunk of rows each. What such a statement changes is kept, so that
    it could be undone alone: a few megabytes, else in /var/tmp, which may be full or not ours to write."""
    db.execute("PRAGMA temp_store = MEMORY")
    try:
        yield
    finally:
        db.execute("PRAGMA temp_store = DEFAULT")


def select_in(db: sqlite3.Connection, sql: str, args: Sequence[Any], values: Sequence[Any]) -> Iterator[Any]:
    """Rows of `sql`, whose last condition is `... IN (?*)`, over any number of values."""
    for start in range(0, len(values), VARIABLES):
        part = values[start : start + VARIABLES]
        marks = ",".join("?" * len(part))
        yield from db.execute(sql.replace("?*", marks), (*args, *part))


def insert_rows(db: sqlite3.Connection, sql: str, values: str, rows: Sequence[Sequence[Any]]) -> None:
    """`sql` ends with VALUES; `values` stands for one row, such as (?, ?, 1)."""
    for start in range(0, len(rows), INSERT_ROWS):
        part = rows[start : start + INSERT_ROWS]
        db.execute(f"{sql} {','.join([values] * len(part))}", list(chain.from_iterable(part)))


def next_id(db: sqlite3.Connection, table: str) -> int:
    """The id that the next row of an AUTOINCREMENT table gets; there is one writer, so nobody takes it before us."""
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
    return 1 + (row[0] if row else 0)


def bump_state(db: sqlite3.Connection) -> None:
    """What a generation would show has changed: the next publish must write one."""
    db.execute("UPDATE meta SET value = value + 1 WHERE key = 'state'")


def read_state(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT value FROM meta WHERE key = 'state'").fetchone()[0])


def read_basis(db: sqlite3.Connection) -> int | None:
    """The generation since which `touched` is kept; None where the next one has to be read from the whole manifest."""
    row = db.execute("SELECT value FROM meta WHERE key = 'basis'").fetchone()
    return int(row[0]) if row else None


def set_basis(db: sqlite3.Connection, generation: int, lacking: Iterable[int]) -> None:
    """The generation shows what the manifest says, but for inputs that lack a vector."""
    db.execute("INSERT OR REPLACE INTO meta VALUES ('basis', ?)", (generation,))
    db.execute("DELETE FROM touched")
    db.executemany("INSERT INTO touched(id) VALUES (?)", ((number,) for number in lacking))


def forget_basis(db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM meta WHERE key = 'basis'")


def space_id(db: sqlite3.Connection, name: str, dim: int) -> int:
    row = db.execute("SELECT id, dim FROM space WHERE name = ?", (name,)).fetchone()
    if row is None:
        with transaction(db):
            return int(db.execute("INSERT INTO space(name, dim) VALUES (?, ?)", (name, dim)).lastrowid or 0)
    if row[1] != dim:
        raise StoreError(f"space {name} has {row[1]} components, the model has {dim}; rebuild its artifact")
    return int(row[0])
