"""Folding: many small shards, or shards full of dead rows, become few segments of about 400 k rows.

A run leaves one shard per chunk, hundreds a night. A generation names at most 256 data files, because HDF5 keeps one
descriptor open per file of a virtual dataset and returns fill values, silently, once the process has no more of them.
Crash-safe: a segment is complete on disk before one transaction re-points its vectors; the folded files stay until no
kept generation names them. Copying runs at disk speed (1 KB a row at d = 512), re-pointing at about 90 k rows/s.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from pipeline.store.files import StoreDamaged
from pipeline.store.manifest import CONTENT_OF_EACH, next_id, transaction
from pipeline.store.places import DataFile
from pipeline.store.shards import PIECE_ROWS, Piece, ShardInfo, check_file, write_pieces

SEGMENT_ROWS = 400_000
FILES_MAX = 256  # data files of one generation
SMALL_MAX = 32  # files of less than half a segment; more are folded. 32 new descriptors fit any limit
DEAD_SHARE_MAX = 0.25  # of a file's rows, before it is written anew
UNKNOWN = "unknown"  # engine of a part that was written before engines were recorded, beside others
RUNS_MAX = 65_536  # stretches of live rows in one generation: 0.7 s to write as a virtual dataset, 0.2 s to open


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
        attrs = {"space": name, "engine": engines_of([file.info for file in group if file.live_rows])}
        info = write_pieces(path, rows, group[0].info.dim, pieces, attrs)
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
            moved = _move(db, space, hashes[file.live], file.number, number, start)
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
    shows = np.concatenate([file.shows[file.live] for file in group])
    return DataFile(number, info, shows, np.concatenate(repeats))


def _move(db: sqlite3.Connection, space: int, hashes: npt.NDArray[np.uint8], old: int, new: int, start: int) -> int:
    """Vectors of file `old` are rows of file `new` now, from `start` on. Returns of how many the manifest knew."""
    moved = 0
    for at in range(0, len(hashes), PIECE_ROWS):
        part = hashes[at : at + PIECE_ROWS]
        moved += db.execute(
            "UPDATE vector SET shard = :new, row = each.value FROM json_each(:rows) each "
            f"WHERE content_hash = {CONTENT_OF_EACH} AND space = :space AND shard = :old",
            {"contents": part, "rows": json.dumps([*range(start + at, start + at + len(part))]),
             "space": space, "old": old, "new": new},
        ).rowcount  # fmt: skip
    return moved


def engines_of(parts: Sequence[ShardInfo]) -> str:
    """Who made the vectors of a segment: the engine of its parts, or all of them where they do not agree."""
    names = {name for part in parts for name in (part.engine or UNKNOWN).split(", ")}
    return "" if names == {UNKNOWN} else ", ".join(sorted(names))


def register(db: sqlite3.Connection, space: int, info: ShardInfo) -> int:
    number = db.execute(
        "INSERT INTO shard(name, space, rows, bytes, digest, offset, engine) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (info.name, space, info.rows, info.bytes, info.digest, info.offset, info.engine),
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
            live = source.shows[piece] != 0
            if live.any():
                yield file["embeddings"][piece][live], file["id"][piece][live], file["content_hash"][piece][live]
