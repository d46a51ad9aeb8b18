"""Folding: many small shards, or shards full of dead rows, become few segments of about 400 k rows.

A run leaves one shard per chunk, hundreds a night. A generation names at most 256 data files, because HDF5 keeps one
descriptor open per file of a virtual dataset and returns fill values, silently, once the process has no more of them.
Crash-safe: a segment is complete on disk before one transaction re-points its vectors; the folded files stay until no
kept generation names them. Copying runs at disk speed (1 KB a row at d = 512), re-pointing at about 90 k rows/s.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import h5py
import numpy as np
import numpy.typing as npt

from pipeline.store.files import StoreDamaged
from pipeline.store.listing import FETCH_ROWS, Bits
from pipeline.store.manifest import LIVE, next_id, transaction
from pipeline.store.shards import PIECE_ROWS, Piece, ShardInfo, check_file, write_pieces

Ids: TypeAlias = npt.NDArray[np.int64]

SEGMENT_ROWS = 400_000
FILES_MAX = 256  # data files of one generation
SMALL_MAX = 32  # files of less than half a segment; more are folded. 32 new descriptors fit any limit
DEAD_SHARE_MAX = 0.25  # of a file's rows, before it is written anew
RUNS_MAX = 65_536  # stretches of live rows in one generation: 0.7 s to write as a virtual dataset, 0.2 s to open


@dataclass(slots=True, eq=False)
class DataFile:
    """A data file and who shows its vectors: 8 bytes a row, 800 MB at 100 M."""

    number: int  # shard id of the manifest
    info: ShardInfo
    ids: Ids  # per row: the first input that shows it, 0 where it is dead
    repeats: Ids  # (k, 2) row and input, ordered: further inputs with the same content

    @property
    def live(self) -> Bits:
        live: Bits = self.ids != 0
        return live

    @property
    def live_rows(self) -> int:
        return int(np.count_nonzero(self.ids))

    def runs(self) -> Ids:
        """(k, 2): first row and count of each stretch of live rows."""
        edges = np.flatnonzero(np.diff(self.live, prepend=False, append=False))
        return np.stack([edges[::2], edges[1::2] - edges[::2]], axis=1)


def scan(db: sqlite3.Connection, space: int, dim: int) -> tuple[list[DataFile], dict[int, str]]:
    """Every data file of a space with the inputs that show its rows; and the marks of the few that have one."""
    shards = db.execute(
        "SELECT id, name, rows, bytes, digest, offset FROM shard WHERE space = ? ORDER BY id", (space,)
    ).fetchall()
    starts = np.cumsum([0] + [shard[2] for shard in shards])
    start_of = np.zeros(next_id(db, "shard"), np.int64)
    start_of[[shard[0] for shard in shards]] = starts[:-1]
    ids = np.zeros(starts[-1], np.int64)  # over the rows of all files, one after the other
    repeats = [np.empty((0, 2), np.int64)]
    marks: dict[int, str] = {}
    # CROSS JOIN fixes the order: walk the inputs by id, look the vector up by its primary key.
    cursor = db.execute(
        "SELECT v.shard, v.row, i.id, v.mark FROM input i CROSS JOIN vector v "
        f"WHERE v.content_hash = i.content_hash AND v.space = ? AND {LIVE} ORDER BY i.id",
        (space,),
    )
    while part := cursor.fetchmany(FETCH_ROWS):
        shard_of, row_of, id_of, mark_of = zip(*part, strict=True)
        marks.update((number, mark) for number, mark in zip(id_of, mark_of, strict=True) if mark)
        place = start_of[np.array(shard_of)] + np.array(row_of)
        shows = np.array(id_of, np.int64)
        first = np.zeros(len(part), np.bool_)
        first[np.unique(place, return_index=True)[1]] = True
        first &= ids[place] == 0
        ids[place[first]] = shows[first]
        repeats.append(np.stack([place[~first], shows[~first]], axis=1))
    again = np.concatenate(repeats)
    again = again[np.lexsort((again[:, 1], again[:, 0]))]
    cuts = np.searchsorted(again[:, 0], starts)
    files = [
        DataFile(
            number,
            ShardInfo(name, rows, dim, size, digest, offset),
            ids[starts[at] : starts[at + 1]],
            again[cuts[at] : cuts[at + 1]] - [starts[at], 0],
        )
        for at, (number, name, rows, size, digest, offset) in enumerate(shards)
    ]
    return files, marks


def plan(files: Sequence[DataFile]) -> list[list[DataFile]]:
    """Which files to write anew, in groups of one segment each."""
    # Past 40 M rows segments grow, so that files of half a segment or more are never more than 200.
    target = max(SEGMENT_ROWS, sum(file.live_rows for file in files) // 100)
    chosen = {file.number for file in files if file.live_rows < (1 - DEAD_SHARE_MAX) * file.info.rows}
    small = {file.number for file in files if file.live_rows < target // 2}
    if len(small - chosen) > SMALL_MAX:
        chosen |= small
    broken_up = sorted((len(file.runs()), file.number) for file in files if file.number not in chosen)
    runs = sum(count for count, _ in broken_up)
    while runs > RUNS_MAX:
        count, number = broken_up.pop()
        chosen.add(number)
        runs -= count
    groups: list[list[DataFile]] = []
    rows = target
    for file in files:
        if file.number in chosen:
            if rows >= target:
                groups.append([])
                rows = 0
            groups[-1].append(file)
            rows += file.live_rows
    return groups


def fold(db: sqlite3.Connection, out: Path, space: int, name: str, group: Sequence[DataFile]) -> DataFile | None:
    """Write the live rows of `group` as one segment and forget the rest. None: there was no live row."""
    rows = sum(file.live_rows for file in group)
    number = next_id(db, "shard")
    info: ShardInfo | None = None
    if rows:
        pieces = (piece for file in group for piece in live_pieces(out, file))
        path = out / "segments" / f"{number:08d}.h5"
        info = write_pieces(path, rows, group[0].info.dim, pieces, {"space": name})
    with transaction(db):
        if info is not None:
            register(db, space, info)
        start = 0
        for file in group:
            hashes = read_hashes(out, file.info)
            dead = np.flatnonzero(~file.live)
            db.executemany(
                "DELETE FROM vector WHERE content_hash = ? AND space = ? AND shard = ? AND row = ?",
                ((hashes[row].tobytes(), space, file.number, int(row)) for row in dead),
            )
            moved = db.executemany(
                "UPDATE vector SET shard = ?, row = ? WHERE content_hash = ? AND space = ? AND shard = ?",
                (
                    (number, row, hashes[old].tobytes(), space, file.number)
                    for row, old in enumerate(np.flatnonzero(file.live), start)
                ),
            ).rowcount
            if moved != file.live_rows:
                raise StoreDamaged(
                    out / file.info.name,
                    f"the content hashes of {file.live_rows} vectors of the manifest",
                    f"{moved} of them",
                    "Nothing was changed; index the source again into a new folder",
                )
            start += file.live_rows
            db.execute("DELETE FROM shard WHERE id = ?", (file.number,))
    if info is None:
        return None
    starts = np.cumsum([0] + [file.live_rows for file in group])
    repeats = [
        np.stack([np.cumsum(file.live)[file.repeats[:, 0]] - 1 + start, file.repeats[:, 1]], axis=1)
        for file, start in zip(group, starts, strict=False)
    ]
    return DataFile(number, info, np.concatenate([file.ids[file.live] for file in group]), np.concatenate(repeats))


def register(db: sqlite3.Connection, space: int, info: ShardInfo) -> int:
    number = db.execute(
        "INSERT INTO shard(name, space, rows, bytes, digest, offset) VALUES (?, ?, ?, ?, ?, ?)",
        (info.name, space, info.rows, info.bytes, info.digest, info.offset),
    ).lastrowid
    assert number is not None
    return number


def read_hashes(out: Path, info: ShardInfo) -> npt.NDArray[np.uint8]:
    check_file(out / info.name, info, digest=False)
    with h5py.File(out / info.name, "r", locking=False) as file:
        hashes: npt.NDArray[np.uint8] = file["content_hash"][:]
    return hashes


def live_pieces(out: Path, source: DataFile) -> Iterator[Piece]:
    """The live rows of a file, some thousand at a time: what is held at once does not grow with the segment."""
    check_file(out / source.info.name, source.info, digest=False)
    with h5py.File(out / source.info.name, "r", locking=False) as file:
        for start in range(0, source.info.rows, PIECE_ROWS):
            piece = slice(start, start + PIECE_ROWS)
            live = source.ids[piece] != 0
            if live.any():
                yield file["embeddings"][piece][live], file["id"][piece][live], file["content_hash"][piece][live]
