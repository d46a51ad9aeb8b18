"""The coordinator's store: one process writes an index, any number read its generations.

    with Store.open(out, space, dim) as store:
        run = store.begin_run(Scope("folder", root))
        store.observe(items); store.finish_listing()
        for chunk in ...: store.commit_chunk(write_shard(store.shard_path(), ...), outcomes)
        store.publish(spec, {})

A kill at any instant costs at most the chunks that were not committed. A commit costs a few fsyncs, so chunks
of a thousand rows reach 20 k rows/s and single rows a few hundred.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import h5py
import msgspec
import numpy as np
import numpy.typing as npt

from pipeline.batch import Item, Mark, Reason
from pipeline.store import publish as publishing
from pipeline.store.ann import Turn
from pipeline.store.files import DIGEST_BYTES, NoIndex, StoreDamaged, StoreError, sync, take_lock
from pipeline.store.fold import register
from pipeline.store.listing import Container, Listing, Observed, Preview, Scope
from pipeline.store.manifest import (
    CONTENT_OF_EACH,
    PENDING,
    RESTORE,
    ManifestDamaged,
    bump_state,
    connect,
    select_in,
    space_id,
    transaction,
    undone_from_memory,
)
from pipeline.store.records import clean_text
from pipeline.store.shards import ShardInfo, check_file, hash_rows

log = logging.getLogger(__name__)
EXAMPLES = 24  # of each reason
# What was just embedded needs not be looked for; of a copy, the original may have failed, or wait in another chunk.
IF_VECTOR = f"AND EXISTS(SELECT 1 FROM vector WHERE content_hash = {CONTENT_OF_EACH} AND space = :space)"


ContentHash: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


# Of these two there are thousands at once, hence without names in messages and without the garbage collector.
class PendingItem(msgspec.Struct, frozen=True, array_like=True, gc=False):
    id: int
    key: str
    locator: bytes
    size_bytes: int


class Outcome(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What became of one pending input. "embedded" ones stand in the order of the shard's rows."""

    id: int
    status: Literal["embedded", "copied", "quarantined"]
    content_hash: ContentHash | None  # None: its bytes could not be read
    reason: Reason | Literal[""] = ""
    mark: Mark = ""
    words: str = ""


class Committed(NamedTuple):
    embedded: int = 0
    copied: int = 0
    quarantined: int = 0
    quarantined_new: int = 0  # of these, the ones that were not known to be bad for this reason
    waiting: int = 0  # copies of a content that has no vector yet: still pending


class Quarantined(NamedTuple):
    key: str
    words: str  # the decoder's own
    locator: bytes
    size_bytes: int
    attempts: int
    first_seen: int  # run that listed the key first
    last_seen: int  # run that found its present bytes


@dataclass(frozen=True, slots=True)
class Quarantine:
    count: int
    examples: list[Quarantined]  # the newest


class Counts(NamedTuple):
    """Inputs of this scope by state; `quarantined` is the sum of `reasons`."""

    embedded: int
    pending: int
    quarantined: int
    deleted: int
    reasons: dict[str, Quarantine]


class Store:
    def __init__(self, out: Path, db: sqlite3.Connection, lock: int, space: tuple[int, str, int]) -> None:
        self.out, self._db, self._lock, self._space = out, db, lock, space
        self._listing: Listing | None = None
        self._shards = 0

    @classmethod
    def open(cls, out: Path, space: str, dim: int) -> Store:
        """Take the lock, open the manifest (a new one in a new folder), sweep what a killed run left."""
        out.mkdir(parents=True, exist_ok=True)
        lock = take_lock(out / "lock")
        try:
            refuse_lost_manifest(out)
            for name in (*publishing.FILE_FOLDERS, "generations", "runs"):
                (out / name).mkdir(exist_ok=True)
            sync(out)
            db = connect(out / "manifest.sqlite")
            try:
                store = cls(out, db, lock, (space_id(db, space, dim), space, dim))
                swept = publishing.sweep(db, out)
            except BaseException:
                db.close()
                raise
        except BaseException:
            os.close(lock)
            raise
        if swept:
            log.info("swept what an interrupted run left: %d files, such as %s", len(swept), swept[0])
        return store

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()
        os.close(self._lock)

    # --- one run's listing

    def begin_run(self, scope: Scope) -> int:
        """Returns the number of the run."""
        self._listing = Listing.begin(self._db, self._space[0], scope)
        self._shards = 0
        return self._listing.run

    @property
    def listing(self) -> Listing:
        if self._listing is None:
            raise StoreError("no run has begun; call begin_run first")
        return self._listing

    def observe(self, items: Sequence[Item]) -> Observed:
        return self.listing.observe(items)

    def container_unchanged(self, uri: str, size_bytes: int, etag: str) -> bool:
        return self.listing.container_unchanged(uri, size_bytes, etag)

    def container_seen(self, container: Container) -> None:
        self.listing.container_seen(container)

    def keep(self, key_prefix: str) -> None:
        """That part of the source could not be listed: what is known of it stays."""
        self.listing.mark_seen(key_prefix)

    def listing_preview(self) -> Preview:
        return self.listing.preview()

    def finish_listing(self) -> int:
        return self.listing.finish()

    def retry(self, reasons: Sequence[Reason]) -> int:
        """Quarantined inputs of this scope that are tried once more in this run; returns how many.

        They keep their reason until they have an outcome, so that one that fails again for it is not news.
        """
        sql = "UPDATE input SET status = 'pending' WHERE scope = ? AND status = 'quarantined' AND reason = ?"
        with transaction(self._db):
            return self._db.executemany(sql, ((self.listing.scope, reason) for reason in set(reasons))).rowcount

    # --- the work and its results

    def pending(self, limit: int, after_id: int = 0) -> list[PendingItem]:
        rows = self._db.execute(
            f"SELECT id, key, locator, size FROM input WHERE scope = ? AND {PENDING} AND id > ? ORDER BY id LIMIT ?",
            (self.listing.scope, after_id, limit),
        )
        return [PendingItem(*row) for row in rows]

    def has_vectors(self, hashes: Sequence[bytes]) -> list[bool]:
        """Which contents have a vector in this space."""
        rows = self._db.execute(
            "SELECT each.key FROM json_each(:numbers) each "
            f"CROSS JOIN vector ON content_hash = {CONTENT_OF_EACH} AND space = :space",
            {"contents": hash_rows(hashes), "numbers": json.dumps([*range(len(hashes))]), "space": self._space[0]},
        )
        found = [False] * len(hashes)
        for (row,) in rows:
            found[row] = True
        return found

    def shard_path(self) -> Path:
        """The name for the next shard of this run."""
        self._shards += 1
        return self.out / "shards" / f"{self.listing.run:06d}-{self._shards:06d}.h5"

    def commit_chunk(self, shard: ShardInfo | None, outcomes: Sequence[Outcome]) -> Committed:
        """Make a chunk exist, in one transaction: its shard, its vectors, the states of its inputs."""
        space = self._space[0]
        embedded = [outcome for outcome in outcomes if outcome.status == "embedded"]
        copied = [outcome for outcome in outcomes if outcome.status == "copied"]
        quarantined = [outcome for outcome in outcomes if outcome.status == "quarantined"]
        self._check_chunk(shard, embedded)
        with undone_from_memory(self._db), transaction(self._db):
            if shard is not None:
                number = register(self._db, space, shard)
                self._db.execute(  # equal contents keep their first vector; a second one is a dead row
                    "INSERT OR IGNORE INTO vector(content_hash, space, shard, row, mark) "
                    f"SELECT {CONTENT_OF_EACH}, :space, :shard, each.key, each.value FROM json_each(:marks) each",
                    {"contents": _contents(embedded), "marks": json.dumps([done.mark for done in embedded]),
                     "space": space, "shard": number},
                )  # fmt: skip
            settled, copies = self._settle(embedded), self._settle(copied, IF_VECTOR)
            bad, bad_new, lost = self._quarantine(quarantined)
            if settled or copies or lost:
                bump_state(self._db)
        return Committed(settled, copies, bad, bad_new, len(copied) - copies)

    def _check_chunk(self, shard: ShardInfo | None, embedded: Sequence[Outcome]) -> None:
        """The border where rows of a file and outcomes meet: from here on, row i is believed to be outcome i."""
        rows = shard.rows if shard else 0
        if rows != len(embedded):
            raise ValueError(f"the shard has {rows} rows, the chunk {len(embedded)} embedded outcomes; they must match")
        if shard is None:
            return
        path = self.out / shard.name
        check_file(path, shard, digest=False)
        with h5py.File(path, "r", locking=False) as file:
            ids, hashes = file["id"][:], file["content_hash"][:]
        want_ids = np.array([outcome.id for outcome in embedded], np.int64)
        want_hashes = _contents(embedded)
        wrong = np.flatnonzero((ids != want_ids) | (hashes != want_hashes).any(axis=1))
        if len(wrong):
            row = int(wrong[0])
            expected = f"input {want_ids[row]} with content {want_hashes[row].tobytes().hex()} in row {row}"
            found = f"input {ids[row]} with content {hashes[row].tobytes().hex()}"
            raise StoreDamaged(path, expected, found, "List embedded outcomes in the order of the shard's rows")

    def _settle(self, outcomes: Sequence[Outcome], condition: str = "") -> int:
        """Inputs whose content has a vector now. One that is no longer pending was deleted meanwhile, and stays so."""
        return self._db.execute(
            f"UPDATE input SET status = 'embedded', content_hash = {CONTENT_OF_EACH}, reason = '', words = '', "
            f"attempts = 0 FROM json_each(:ids) each WHERE input.id = each.value AND {PENDING} {condition}",
            {"contents": _contents(outcomes), "ids": json.dumps([done.id for done in outcomes]),
             "space": self._space[0]},
        ).rowcount  # fmt: skip

    def _quarantine(self, outcomes: Sequence[Outcome]) -> tuple[int, int, bool]:
        """How many, how many of them new, and whether a generation would look different."""
        sql = f"SELECT reason, content_hash FROM input WHERE {PENDING} AND id IN (?*)"
        before = list(select_in(self._db, sql, (), [bad.id for bad in outcomes]))
        # A picture that could not be read keeps the content it had: its last vector is served until it can be.
        count = self._db.executemany(
            "UPDATE input SET status = 'quarantined', reason = ?, words = ?, attempts = attempts + 1, "
            "content_hash = CASE WHEN ? = 'read_error' THEN content_hash ELSE ? END "
            f"WHERE id = ? AND {PENDING}",
            ((bad.reason, clean_text(bad.words), bad.reason, bad.content_hash, bad.id) for bad in outcomes),
        ).rowcount
        # One that was bad before, and is tried again, was not shown.
        shown = any(content and reason in ("", "read_error") for reason, content in before)
        lost = shown and any(bad.reason != "read_error" for bad in outcomes)
        return count, sum(reason == "" for reason, _ in before), lost

    # --- what is there

    def counts(self) -> Counts:
        def count(condition: str) -> int:
            sql = f"SELECT count(*) FROM input WHERE scope = ? {condition}"
            return int(self._db.execute(sql, (self.listing.scope,)).fetchone()[0])

        # Four scans of small indexes; a GROUP BY would read the table, which is ten times as large.
        pending, deleted = count(f"AND {PENDING}"), count("AND status = 'deleted'")
        reasons = {
            reason: Quarantine(number, self._examples(reason))
            for reason, number in self._db.execute(
                "SELECT reason, count(*) FROM input WHERE scope = ? AND status = 'quarantined' GROUP BY reason",
                (self.listing.scope,),
            ).fetchall()
        }
        quarantined = sum(entry.count for entry in reasons.values())
        return Counts(count("") - pending - deleted - quarantined, pending, quarantined, deleted, reasons)

    def _examples(self, reason: str) -> list[Quarantined]:
        rows = self._db.execute(
            "SELECT key, words, locator, size, attempts, first_seen, last_seen FROM input "
            "WHERE scope = ? AND status = 'quarantined' AND reason = ? ORDER BY id DESC LIMIT ?",
            (self.listing.scope, reason, EXAMPLES),
        )
        return [Quarantined(*row) for row in rows]

    def publish(
        self,
        spec: Mapping[str, Any],
        extra: Mapping[str, Any],
        keep: int = publishing.KEEP,
        review: publishing.Review | None = None,
        turn: Turn | None = None,
    ) -> int | None:
        """Make the present state visible to readers; returns the number of the generation that shows it.

        None: another model's generation is shown and this model lacks vectors of `missing` pictures, so nothing was
        published. `review(shown, new)` is called before a generation of another model takes the place of the shown one.
        `turn` says when the making of lists for approximate search leaves off (default: never).
        """
        return publishing.publish(self._db, self.out, self._space, spec, extra, keep, review, turn or Turn())

    def missing(self) -> int:
        """Pictures of all sources whose known bytes have no vector in this space."""
        return publishing.missing(self._db, self._space[0])

    @property
    def pinned(self) -> int | None:
        """The generation that was chosen to be shown whatever is published after it."""
        return publishing.pinned(self._db)


def _contents(outcomes: Sequence[Outcome]) -> npt.NDArray[np.uint8]:
    return hash_rows([outcome.content_hash or b"" for outcome in outcomes])


def show_generation(out: Path, number: int | None) -> int:
    """Make readers see generation `number` until another is chosen; None: the newest again, and from now on.

    Raises:
        NoIndex, StoreError: there is no such generation. Locked: a run is writing.
    """
    refuse_lost_manifest(out)
    if not (out / "manifest.sqlite").is_file():
        raise NoIndex(f"no index in {out}; make one: python -m pipeline.index --out {out} ...")
    lock = take_lock(out / "lock")
    try:
        db = connect(out / "manifest.sqlite")
        try:
            return publishing.show(db, out, number)
        finally:
            db.close()
    finally:
        os.close(lock)


def refuse_lost_manifest(out: Path) -> None:
    """Without its manifest every shard would look like garbage, and be swept; and the folder like one without an index.

    Raises:
        ManifestDamaged: it is not there, and something that it named is.
    """
    if (out / "manifest.sqlite").exists():
        return
    for kind in publishing.DATA_FOLDERS:
        if (found := next((out / kind).glob("*.h5"), None)) is not None:
            expected = f"the manifest of {found.relative_to(out)} and its like"
            raise ManifestDamaged(out / "manifest.sqlite", expected, "no file", RESTORE)
