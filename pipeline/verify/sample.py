"""Which pictures are embedded again: of all that the next publish would show, those that no reader has seen yet first.

Drawn from the manifest and read from the data files, so that tonight's vectors are looked at before a generation shows
them, on the very first night too. A source that is not there takes its own rows out, and no others.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.sources import Source, SourceError, open_source
from pipeline.store.check import Health
from pipeline.store.manifest import LIVE, select_in
from pipeline.store.shards import ShardInfo, map_embeddings

log = logging.getLogger("nightjar")

Ids: TypeAlias = npt.NDArray[np.int64]
Sources: TypeAlias = dict[int, Source]  # by their numbers in the manifest


class Space(NamedTuple):
    number: int
    name: str
    dim: int


@dataclass(frozen=True, slots=True)
class Drawn:
    ids: Ids  # of inputs, ascending
    away: int  # pictures of sources that are not there
    there: int  # all others


class Row(NamedTuple):
    """A picture and where its vector is."""

    id: int
    key: str
    scope: int
    locator: bytes
    size_bytes: int
    content_hash: bytes
    file: str
    row: int  # of the file


def open_sources(db: sqlite3.Connection) -> Sources:
    """Those that are there."""
    sources = {}
    for number, kind, root, options in db.execute("SELECT id, kind, root, options FROM source"):
        try:
            sources[number] = open_source(kind, root, split=json.loads(options).get("split"))
        except SourceError as error:
            log.warning("a source is not there, so its pictures are not embedded again: %s", error)
    return sources


def draw(
    db: sqlite3.Connection, space: Space, health: Health, sources: Sources, rows: int | None, seed: int
) -> Drawn:
    """`rows` of the pictures with a vector in a sound file, without a number all of them. Up to half of them are of
    files that readers do not see yet."""
    cursor = db.execute(
        "SELECT i.id, i.scope, v.shard FROM input i JOIN vector v ON v.content_hash = i.content_hash AND v.space = ? "
        f"JOIN shard s ON s.id = v.shard AND s.space = v.space AND v.row BETWEEN 0 AND s.rows - 1 WHERE {LIVE} "
        "ORDER BY i.id",
        (space.number,),
    )
    live = np.fromiter(cursor, [("id", np.int64), ("scope", np.int64), ("shard", np.int64)])
    live = live[~np.isin(live["shard"], list(health.broken.shards))]
    there = live[np.isin(live["scope"], list(sources))]
    away = len(live) - len(there)
    if rows is None or rows >= len(there):
        return Drawn(there["id"], away, len(there))
    rng = np.random.default_rng(seed)
    fresh = there["id"][~np.isin(there["shard"], _seen(db, health.generation))]
    first = rng.choice(fresh, min(len(fresh), (rows + 1) // 2), replace=False)
    others = rng.choice(np.setdiff1d(there["id"], first), rows - len(first), replace=False)
    return Drawn(np.sort(np.concatenate([first, others])), away, len(there))


def _seen(db: sqlite3.Connection, generation: int | None) -> list[int]:
    """Data files of what readers see."""
    sql = "SELECT id FROM shard WHERE name IN (SELECT value FROM generation, json_each(files) WHERE number = ?)"
    return [number for (number,) in db.execute(sql, (generation,))]


def read_rows(db: sqlite3.Connection, space: Space, ids: Ids) -> list[Row]:
    """In the order of the ids."""
    sql = (
        "SELECT i.id, i.key, i.scope, i.locator, i.size, i.content_hash, s.name, v.row FROM input i "
        "JOIN vector v ON v.content_hash = i.content_hash AND v.space = ? JOIN shard s ON s.id = v.shard "
        "WHERE i.id IN (?*)"
    )
    return sorted(starmap(Row, select_in(db, sql, (space.number,), ids.tolist())))


def read_files(db: sqlite3.Connection, space: Space) -> dict[str, ShardInfo]:
    sql = "SELECT name, rows, bytes, digest, offset, engine FROM shard WHERE space = ?"
    return {name: ShardInfo(name, rows, space.dim, *rest) for name, rows, *rest in db.execute(sql, (space.number,))}


def read_vectors(out: Path, files: dict[str, ShardInfo], rows: list[Row]) -> npt.NDArray[np.float16]:
    """(n, d), a copy; one file is mapped at a time, for a night may have left thousands."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.file, []).append(place)
    emb_nd = np.empty((len(rows), files[rows[0].file].dim), np.float16)
    for name, here in places.items():
        emb_nd[here] = map_embeddings(out / name, files[name])[[rows[place].row for place in here]]
    return emb_nd
