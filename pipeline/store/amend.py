"""Publishing costs what changed: the next index.h5 is the last one, copied and amended.

    stage    what was touched since the last generation against the table it has: who shows which row now
    write    the copied table, grown by the touched rows, put into the new order, cut to its new size

A thousand new rows beside a million take half a second, most of it for copying the file and for its digest. Rows move
by chunks of HDF5, without being read: 16 bytes for a string, which itself stays where it lies. What rows leave behind
stays in the file until a third of it is of no use; then, and wherever `stage` says why, the table is written whole
again (`table.write`). Both ways give the same table, but for the order of its rows.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt

from pipeline.store.files import StoreDamaged
from pipeline.store.hdf5 import edit_h5
from pipeline.store.manifest import read_basis, select_in
from pipeline.store.places import PLACES, DataFile, Found, Ids, Places
from pipeline.store.shards import ShardInfo, check_file
from pipeline.store.table import (
    COLUMNS_MAX,
    Column,
    Writer,
    Written,
    chunk_rows,
    column_path,
    count_rows,
    count_values,
    metadata_of,
    shown_by,
    write_repeated,
    write_virtual,
)

USELESS_MAX = 1.5  # bytes a row, against the table that was written whole
TOUCHED_SHARE_MAX = 0.5  # of the rows: reading all of them is as fast then
STRING_BYTES = 16  # in its column: length, and where in the file it lies
ID_PIECE = 1 << 20
COLUMNS = ("key", "mark", "locator", "id", "source", "size_bytes", "content_hash")
Why: TypeAlias = str  # the table has to be written whole


@dataclass(frozen=True, slots=True)
class Basis:
    """The last generation."""

    path: Path  # of its index.h5
    rows: int
    firsts: int  # of them in data files; the others repeat one
    files: list[dict[str, Any]]  # of generation.json
    whole: dict[str, int]  # number, rows and bytes of the table that was written whole

    @classmethod
    def find(cls, db: sqlite3.Connection, out: Path, space: int) -> Basis | Why:
        number = read_basis(db)
        last = db.execute("SELECT number, space FROM generation ORDER BY number DESC LIMIT 1").fetchone()
        if number is None or last != (number, space):
            return "there is no generation that its changes are known of"
        try:
            text = (out / "generations" / str(number) / "generation.json").read_text(encoding="utf-8")
            content = json.loads(text)
            own = ShardInfo(**content["index"])
            check_file(out / own.name, own, digest=True)
        except (OSError, ValueError, KeyError, TypeError, StoreDamaged) as error:
            return f"the last generation cannot be read: {error}"
        rows, whole = content["rows"], content["table"]
        if not rows or chunk_rows(rows) >= 4 * chunk_rows(whole["rows"]):
            return "the index has grown much"
        if own.bytes * whole["rows"] > USELESS_MAX * whole["bytes"] * rows:
            return "a third of it is of no use any more"
        return cls(out / own.name, rows, rows - own.rows, content["files"], whole)


@dataclass(frozen=True, slots=True)
class Staged:
    """What the next table is made of: rows of the last one, and after them the touched rows, as numbers from 1."""

    basis: Basis
    files: list[DataFile]
    found: Found
    ids: Ids  # touched inputs that are shown, in order
    columns: list[Column]

    def write(self, path: Path, db: sqlite3.Connection, out: Path, dim: int, files: Sequence[DataFile]) -> Written:
        """Write index.h5 for `files`, which may have been folded since they were staged."""
        before, (firsts, repeated) = self.basis.rows, count_rows(files)
        source = np.empty(firsts + repeated, np.int64)
        at = 0
        for ids in shown_by(files):
            np.subtract(ids, 1, out=source[at : at + len(ids)])
            at += len(ids)
        first_moved = _first_moved(source)
        shutil.copyfile(self.basis.path, path)
        with h5py.File(self.basis.path, "r", locking=False) as last, edit_h5(path) as (h5, check):
            del h5["embeddings"]
            self._fit_columns(h5, before + len(self.ids), len(source))
            names = [*COLUMNS, *(f"metadata/{name}" for name in h5["metadata"])]
            Writer(h5, db, self.found.marks, self.columns, at=before).append(self.ids)
            check()
            for name in names:
                _put_in_order(h5[name], last.get(name), source, first_moved, before)
                check()
            if np.array_equal(source[firsts:], np.arange(self.basis.firsts, before)):
                offset = int(h5["repeated"].id.get_offset() or 0)
            else:
                del h5["repeated"]
                offset = write_repeated(h5, out, files, dim)
                check()
            write_virtual(h5, files, len(source), firsts, dim)
            h5.flush()
        return Written(len(source), repeated, offset, self.basis.whole)

    def _fit_columns(self, h5: h5py.File, rows: int, shown_rows: int) -> None:
        for name in COLUMNS:
            h5[name].resize(rows, axis=0)
        group = h5["metadata"]
        wanted = {column_path(column.name): column for column in self.columns}
        for name in group.keys() - wanted.keys():
            del group[name]
        for name, column in wanted.items():
            if name in group:
                group[name].resize(rows, axis=0)
                column.remember(group[name])
            else:
                column.create(group, rows, shown_rows, h5["key"].chunks[0])


def stage(db: sqlite3.Connection, out: Path, space: int, dim: int) -> Staged | Why:
    """What the generation to be written shows, by what was touched since the last one; or why that is not enough."""
    basis = Basis.find(db, out, space)
    if isinstance(basis, str):
        return basis
    count = db.execute("SELECT count(*) FROM touched").fetchone()[0]
    if count > TOUCHED_SHARE_MAX * basis.rows:
        return f"{count:,} of {basis.rows:,} rows have changed"
    places = Places(db, space, dim)
    at_of = {info.name: at for at, info in enumerate(places.infos)}
    if not all(file["name"] in at_of for file in basis.files):
        return "its data files were folded"
    rows = db.execute("SELECT id, meta_hash FROM touched ORDER BY id").fetchall()
    touched, had = np.array([row[0] for row in rows], np.int64), [row[1] for row in rows]
    with h5py.File(basis.path, "r", locking=False) as h5:
        last_row = _rows_of(h5["id"], touched)
        repeats: Ids = h5["id"][basis.firsts :]
        columns = _read_columns(h5["metadata"])
        if h5["metadata"].attrs["left_out"]:
            return "metadata has too many names to keep count of"
    _keep(places, basis, at_of, last_row[last_row >= 0])

    again = np.flatnonzero(~np.isin(repeats, touched))  # what was a repeat may be the first now
    found, ids = Found(), np.concatenate([touched, repeats[again]])
    placed = found.split(list(select_in(db, f"{PLACES} AND i.id IN (?*)", (space,), ids.tolist())))
    placed.sort()
    number = np.array([row[0] for row in placed], np.int64)
    is_new = np.isin(number, touched)
    staged = number[is_new]
    row_of = np.empty(len(number), np.int64)
    row_of[is_new] = basis.rows + np.arange(len(staged))
    order = np.argsort(repeats)
    row_of[~is_new] = basis.firsts + order[np.searchsorted(repeats, number[~is_new], sorter=order)]
    if placed:
        _, shard_of, place_of, _ = zip(*placed, strict=True)
        places.add(shard_of, place_of, row_of + 1)

    files = places.files()
    shown_rows = sum(count_rows(files))
    layouts = {name: column.layout(basis.rows) for name, column in columns.items()}
    gone = Counter(meta for meta, row in zip(had, last_row.tolist(), strict=True) if meta is not None and row >= 0)
    count_values(db, {meta: -times for meta, times in gone.items()}, columns)
    if count_values(db, metadata_of(db, staged.tolist()), columns):
        return "metadata has too many names to keep count of"
    kept = [columns[name] for name in sorted(columns) if any(columns[name].counts)]
    for column in kept:
        if layouts.get(column.name, column.layout(shown_rows)) != column.layout(shown_rows):
            return f"metadata {column.name!r} is {' '.join(column.layout(shown_rows))} now"
    if not shown_rows or len(kept) > COLUMNS_MAX:
        return "no row is left" if not shown_rows else f"metadata has {len(kept):,} names"
    return Staged(basis, files, found, staged, kept)


def _rows_of(ids: h5py.Dataset, wanted: Ids) -> Ids:
    """Row of the table of each of the sorted `wanted` inputs, -1 where it has none."""
    rows = np.full(len(wanted), -1, np.int64)
    for first in range(0, len(ids), ID_PIECE):
        piece: Ids = ids[first : first + ID_PIECE]
        found = np.flatnonzero(np.isin(piece, wanted))
        rows[np.searchsorted(wanted, piece[found])] = first + found
    return rows


def _read_columns(group: h5py.Group) -> dict[str, Column]:
    columns = [Column(dataset.attrs["name"], dataset.attrs["values"].tolist()) for dataset in group.values()]
    return {column.name: column for column in columns}


def _keep(places: Places, basis: Basis, at_of: dict[str, int], gone: Ids) -> None:
    """Every row of the last table that is in a data file stays where it was, but for those that were touched."""
    gone = np.sort(gone)
    first_row = 0
    for file in basis.files:
        runs = np.array(file["runs"], np.int64).reshape(-1, 2)
        live = int(runs[:, 1].sum())
        before = np.cumsum(runs[:, 1]) - runs[:, 1]
        positions = np.repeat(runs[:, 0] - before, runs[:, 1]) + np.arange(live)
        shows = np.arange(first_row + 1, first_row + 1 + live)
        here = slice(*np.searchsorted(gone, [first_row, first_row + live]))
        shows[gone[here] - first_row] = 0
        places.shows[places.starts[at_of[file["name"]]] + positions] = shows
        first_row += live


def _first_moved(source: Ids) -> int:
    """The first row that is not where it was; their number where all of them are."""
    for first in range(0, len(source), ID_PIECE):
        part = source[first : first + ID_PIECE]
        if len(moved := np.flatnonzero(part != np.arange(first, first + len(part)))):
            return first + int(moved[0])
    return len(source)


def _put_in_order(dataset: h5py.Dataset, last: h5py.Dataset | None, source: Ids, first: int, before: int) -> None:
    """Row i of the column, from `first`, becomes row `source[i]` of what it is now: the last column and, from `before`,
    new rows."""
    chunk, stop = dataset.chunks[0], len(dataset)
    fill = _fill_row(dataset)
    new = _read_rows(dataset, before, stop, fill)
    rest = (0,) * (dataset.ndim - 1)
    for start in range(first // chunk * chunk, stop, chunk):
        rows = source[start : start + chunk]
        raw = np.full(chunk, fill)
        is_new = rows >= before
        raw[: len(rows)][is_new] = new[rows[is_new] - before]
        if last is not None:
            for number in np.unique(rows[~is_new] // chunk).tolist():
                part = (rows // chunk == number) & ~is_new
                found = _read_rows(last, number * chunk, (number + 1) * chunk, fill)
                raw[: len(rows)][part] = found[rows[part] - number * chunk]
        if (raw != fill).any() or _is_stored(dataset, (start, *rest)):
            dataset.id.write_direct_chunk((start, *rest), raw.tobytes())
    dataset.resize(len(source), axis=0)


def _fill_row(dataset: h5py.Dataset) -> npt.NDArray[np.void]:
    """A row that was never written, as it lies in the file."""
    if dataset.dtype.kind == "O":
        raw = bytes(STRING_BYTES)
    else:
        raw = np.full(dataset.shape[1:], dataset.fillvalue, dataset.dtype).tobytes()
    row: npt.NDArray[np.void] = np.frombuffer(raw, f"V{len(raw)}")[0]
    return row


def _read_rows(dataset: h5py.Dataset, start: int, stop: int, fill: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Rows as they lie in the file."""
    chunk, rest = dataset.chunks[0], (0,) * (dataset.ndim - 1)
    firsts = range(start // chunk * chunk, stop, chunk)
    parts = [np.full(chunk, fill) for _ in firsts]
    for at, first in enumerate(firsts):
        if _is_stored(dataset, (first, *rest)):
            parts[at] = np.frombuffer(dataset.id.read_direct_chunk((first, *rest))[1], fill.dtype)
        assert len(parts[at]) == chunk, f"a chunk of {dataset.name} has {len(parts[at])} rows, not {chunk}"
    joined = np.concatenate(parts) if parts else np.empty(0, fill.dtype)
    skip = start - start // chunk * chunk
    return joined[skip : skip + stop - start]


def _is_stored(dataset: h5py.Dataset, offset: tuple[int, ...]) -> bool:
    return dataset.id.get_chunk_info_by_coord(offset).byte_offset is not None
