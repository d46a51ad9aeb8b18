"""Which rows of the data files a generation shows, and who shows them.

Two ways to the same answer: `scan` walks the manifest (5 s per million inputs), `amend` takes the last generation and
looks only at what was touched since.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.store.listing import FETCH_ROWS, Bits
from pipeline.store.manifest import LIVE, next_id
from pipeline.store.shards import ShardInfo

Ids: TypeAlias = npt.NDArray[np.int64]

# Inputs that are live, and where their vectors are: the shard is NULL where there is none. The order of the joins is
# fixed: walk the inputs by id, look the vector up by its primary key.
PLACES = f"""
    SELECT i.id, v.shard, v.row, v.mark FROM input i
    LEFT JOIN vector v ON v.content_hash = i.content_hash AND v.space = ?
    WHERE i.content_hash IS NOT NULL AND {LIVE}"""


@dataclass(slots=True, eq=False)
class DataFile:
    """A data file and who shows its vectors: 8 bytes a row, 800 MB at 100 M.

    Who that is, is a number above 0: an input's id after a `scan`, 1 + a row of the amended table after an amendment.
    """

    number: int  # shard id of the manifest
    info: ShardInfo
    shows: Ids  # per row: who shows it first, 0 where it is dead
    repeats: Ids  # (k, 2) row and who shows it too, ordered

    @property
    def live(self) -> Bits:
        live: Bits = self.shows != 0
        return live

    @property
    def live_rows(self) -> int:
        return int(np.count_nonzero(self.shows))

    def runs(self) -> Ids:
        """(k, 2): first row and count of each stretch of live rows."""
        edges = np.flatnonzero(np.diff(self.live, prepend=False, append=False))
        return np.stack([edges[::2], edges[1::2] - edges[::2]], axis=1)


class Places:
    """The rows of all data files of a space, one after the other, to be filled with who shows them."""

    def __init__(self, db: sqlite3.Connection, space: int, dim: int) -> None:
        shards = db.execute(
            "SELECT id, name, rows, bytes, digest, offset, engine FROM shard WHERE space = ? ORDER BY id", (space,)
        ).fetchall()
        self.numbers: list[int] = [shard[0] for shard in shards]
        self.infos = [ShardInfo(name, rows, dim, *rest) for _, name, rows, *rest in shards]
        self.starts = np.cumsum([0] + [info.rows for info in self.infos])
        self._start_of = np.zeros(next_id(db, "shard"), np.int64)
        self._start_of[self.numbers] = self.starts[:-1]
        self.shows = np.zeros(self.starts[-1], np.int64)
        self._repeats = [np.empty((0, 2), np.int64)]

    def add(self, shard_of: Sequence[int], row_of: Sequence[int], shows: Ids) -> None:
        """The first that comes to a row shows it, the others repeat it."""
        place = self._start_of[np.asarray(shard_of, np.int64)] + np.asarray(row_of, np.int64)
        first = np.zeros(len(place), np.bool_)
        first[np.unique(place, return_index=True)[1]] = True
        first &= self.shows[place] == 0
        self.shows[place[first]] = shows[first]
        self._repeats.append(np.stack([place[~first], shows[~first]], axis=1))

    def files(self) -> list[DataFile]:
        again = np.concatenate(self._repeats)
        again = again[np.lexsort((again[:, 1], again[:, 0]))]
        cuts = np.searchsorted(again[:, 0], self.starts)
        return [
            DataFile(
                number,
                info,
                self.shows[self.starts[at] : self.starts[at + 1]],
                again[cuts[at] : cuts[at + 1]] - [self.starts[at], 0],
            )
            for at, (number, info) in enumerate(zip(self.numbers, self.infos, strict=True))
        ]


@dataclass(slots=True)
class Found:
    """What a look at live inputs adds to the places."""

    marks: dict[int, str] = field(default_factory=dict)  # of the few that have one
    lacking: list[int] = field(default_factory=list)  # inputs whose known content has no vector yet

    def split(self, part: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """The rows of `PLACES` that have a place."""
        placed = [row for row in part if row[1] is not None]
        if len(placed) < len(part):
            self.lacking += [row[0] for row in part if row[1] is None]
        self.marks.update((number, mark) for number, _, _, mark in placed if mark)
        return placed


def scan(db: sqlite3.Connection, space: int, dim: int) -> tuple[list[DataFile], Found]:
    """Every data file of a space with the inputs that show its rows."""
    places, found = Places(db, space, dim), Found()
    cursor = db.execute(f"{PLACES} ORDER BY i.id", (space,))
    while part := cursor.fetchmany(FETCH_ROWS):
        if placed := found.split(part):
            ids, shard_of, row_of, _ = zip(*placed, strict=True)
            places.add(shard_of, row_of, np.array(ids, np.int64))
    return places.files(), found
