"""The table of a generation: index.h5, one row per live key, for our readers and for any h5py user.

`publish` says what is in it. Rows stream out of one sorted query in pieces of 8,192; nothing here grows with the index
but what SQLite spills to its temporary files (about 150 B a row, in SQLITE_TMPDIR).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_from_bytes

import h5py
import numpy as np

from pipeline.store.files import DIGEST_BYTES
from pipeline.store.fold import DataFile
from pipeline.store.hdf5 import new_h5
from pipeline.store.manifest import LIVE
from pipeline.store.shards import PIECE_ROWS

# HDF5 takes time quadratic in the stretches of one selection, and 25 KB for every selection: 128 suits both.
RUNS_PER_MAPPING = 128

_FROM = f"""
    FROM input i CROSS JOIN vector v LEFT JOIN metadata m ON m.meta_hash = i.meta_hash
    WHERE v.content_hash = i.content_hash AND v.space = ? AND {LIVE}"""
_ROWS = f"""
    SELECT v.shard, v.row, i.key, i.id, i.content_hash, v.mark, i.scope, i.locator, i.size, m.json {_FROM}
    ORDER BY v.shard, v.row, i.key, i.id"""
_KINDS = f"""
    SELECT e.key, e.type, count(*) FROM (SELECT m.json AS json {_FROM} AND m.json IS NOT NULL) t, json_each(t.json) e
    GROUP BY e.key, e.type"""


@dataclass(slots=True)
class Column:
    """A metadata column: `kind` is the narrowest of int64, float64 and text that holds every value."""

    name: str
    kind: str = "integer"
    count: int = 0

    def add(self, kind: str, count: int) -> None:
        order = ("integer", "real", "text")
        self.kind = max(self.kind, kind, key=order.index)
        self.count += count

    def create(self, group: h5py.Group, rows: int) -> None:
        if self.kind == "integer" and self.count == rows:
            dataset = group.create_dataset(column_path(self.name), (rows,), "<i8")
        elif self.kind == "text":
            dataset = group.create_dataset(column_path(self.name), (rows,), h5py.string_dtype())
        else:
            dataset = group.create_dataset(column_path(self.name), (rows,), "<f8", fillvalue=np.nan)
        dataset.attrs.update(name=self.name, kind=self.kind)

    def values(self, packed: Sequence[Mapping[str, Any]]) -> list[Any]:
        if self.kind == "text":
            return [str(values.get(self.name, "")) for values in packed]
        return [values.get(self.name, np.nan) for values in packed]


def column_path(name: str) -> str:
    """A name HDF5 takes for a dataset; the attribute `name` keeps the original."""
    return quote(name, safe=" !#$&'()*+,:;<=>?@[]^`{|}~") if name not in ("", ".") else f"%{name}"


def write(
    path: Path, db: sqlite3.Connection, out: Path, space: int, dim: int, files: Sequence[DataFile], rows: int
) -> tuple[int, int]:
    """Write index.h5. Returns how many vectors it repeats, and their offset in it."""
    firsts = sum(file.live_rows for file in files)
    with new_h5(path) as (h5, check):
        for name in ("key", "mark", "locator"):
            h5.create_dataset(name, (rows,), h5py.string_dtype())
        h5.create_dataset("id", (rows,), "<i8")
        h5.create_dataset("source", (rows,), "<i4")
        h5.create_dataset("size_bytes", (rows,), "<i8")
        h5.create_dataset("content_hash", (rows, DIGEST_BYTES), "u1")
        repeated = h5.create_dataset("repeated", (rows - firsts, dim), "<f2")
        columns = _columns(db, space)
        group = h5.create_group("metadata")
        for column in columns:
            column.create(group, rows)
        first, again = _Rows(h5, check, columns, 0), _Rows(h5, check, columns, firsts)
        copy = _Copy(out, {file.number: file for file in files}, repeated)
        place: tuple[int, int] | None = None
        for record in db.execute(_ROWS, (space,)):
            if record[:2] == place:
                again.add(record)
                copy.add(*record[:2])
            else:
                place = record[:2]
                first.add(record)
        first.flush()
        again.flush()
        copy.close()
        # Placed by data file and row, the rows must meet the live rows that the virtual dataset maps.
        assert (first.at, again.at) == (firsts, rows), f"{(first.at, again.at)} rows written, planned {(firsts, rows)}"
        _virtual(h5, files, rows, firsts, dim)
        h5.flush()
        return rows - firsts, repeated.id.get_offset() or 0


def _columns(db: sqlite3.Connection, space: int) -> list[Column]:
    columns: dict[str, Column] = {}
    for name, kind, count in db.execute(_KINDS, (space,)):
        columns.setdefault(name, Column(name)).add(kind, count)
    return [columns[name] for name in sorted(columns)]


class _Rows:
    """Collects records and writes them to rows [at, ...) of every column."""

    def __init__(self, h5: h5py.File, check: Callable[[], None], columns: Sequence[Column], at: int) -> None:
        self._h5, self._check, self._columns, self.at = h5, check, columns, at
        self._records: list[Any] = []

    def add(self, record: Any) -> None:
        self._records.append(record)
        if len(self._records) == PIECE_ROWS:
            self.flush()

    def flush(self) -> None:
        if not self._records:
            return
        _, _, keys, ids, hashes, marks, sources, locators, sizes, packed = zip(*self._records, strict=True)
        part = slice(self.at, self.at + len(keys))
        self._h5["key"][part] = list(keys)
        self._h5["id"][part] = ids
        self._h5["content_hash"][part] = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, DIGEST_BYTES)
        if any(marks):  # few are marked, and what is not written reads as ""
            self._h5["mark"][part] = list(marks)
        self._h5["source"][part] = sources
        self._h5["size_bytes"][part] = sizes
        self._h5["locator"][part] = [quote_from_bytes(locator, safe="/ :,()+=@") for locator in locators]
        if self._columns:
            unpacked = [json.loads(text) if text else {} for text in packed]
            for column in self._columns:
                self._h5["metadata"][column_path(column.name)][part] = column.values(unpacked)
        self._check()
        self.at = part.stop
        self._records.clear()


class _Copy:
    """Copies single vectors out of the data files; they come ordered by file, so one file is open at a time."""

    def __init__(self, out: Path, files: Mapping[int, DataFile], repeated: h5py.Dataset) -> None:
        self._out, self._files, self._repeated = out, files, repeated
        self._open: tuple[int, Any] | None = None
        self._at = 0
        self._vectors: list[bytes] = []

    def add(self, number: int, row: int) -> None:
        info = self._files[number].info
        if self._open is None or self._open[0] != number:
            self._close_file()
            self._open = (number, (self._out / info.name).open("rb"))
        size = 2 * info.dim
        self._open[1].seek(info.offset + row * size)
        self._vectors.append(self._open[1].read(size))
        if len(self._vectors) == PIECE_ROWS:
            self._flush()

    def close(self) -> None:
        self._close_file()
        self._flush()

    def _close_file(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _flush(self) -> None:
        if self._vectors:
            end = self._at + len(self._vectors)
            self._repeated[self._at : end] = np.frombuffer(b"".join(self._vectors), "<f2").reshape(end - self._at, -1)
            self._at = end
            self._vectors.clear()


def _virtual(h5: h5py.File, files: Sequence[DataFile], rows: int, firsts: int, dim: int) -> None:
    """/embeddings over all live rows. h5py's VirtualLayout takes no selection of several stretches, hence its lower
    level."""
    if not rows:
        h5.create_dataset("embeddings", (0, dim), "<f2")
        return
    target = h5py.h5s.create_simple((rows, dim))
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_fill_value(np.array(np.nan, "<f2"))
    at = 0
    for file in files:
        source = h5py.h5s.create_simple((file.info.rows, dim))
        runs = file.runs()
        for start in range(0, len(runs), RUNS_PER_MAPPING):
            part = runs[start : start + RUNS_PER_MAPPING]
            source.select_none()
            for row, count in part.tolist():
                source.select_hyperslab((row, 0), (count, dim), op=h5py.h5s.SELECT_OR)
            count = int(part[:, 1].sum())
            target.select_hyperslab((at, 0), (count, dim))
            layout.set_virtual(target, file.info.name.encode(), b"/embeddings", source)
            at += count
    if firsts < rows:
        target.select_hyperslab((firsts, 0), (rows - firsts, dim))
        layout.set_virtual(target, b".", b"/repeated", h5py.h5s.create_simple((rows - firsts, dim)))
    target.select_all()
    h5py.h5d.create(h5.id, b"embeddings", h5py.h5t.IEEE_F16LE, target, layout)
