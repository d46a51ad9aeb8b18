"""The table of a generation: index.h5, one row per live key, for our readers and for any h5py user.

`publish` says what is in it. Rows come from the manifest by id, 8,192 at a time, in the order of the data files.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_from_bytes

import h5py
import numpy as np

from pipeline.store.files import DIGEST_BYTES
from pipeline.store.fold import DataFile, Ids
from pipeline.store.hdf5 import new_h5
from pipeline.store.manifest import select_in
from pipeline.store.shards import PIECE_ROWS, map_embeddings

# HDF5 takes time quadratic in the stretches of one selection, and 25 KB for every selection: 128 suits both.
RUNS_PER_MAPPING = 128

SAFE_TEXT = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/_.-~ :,()+=@"
_ROWS = """
    SELECT i.id, i.key, i.content_hash, i.scope, i.locator, i.size, m.json
    FROM input i LEFT JOIN metadata m ON m.meta_hash = i.meta_hash WHERE i.id IN (?*)"""
_KINDS = """
    SELECT e.key, e.type FROM input i CROSS JOIN metadata m ON m.meta_hash = i.meta_hash, json_each(m.json) e
    WHERE i.id IN (?*)"""


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
    path: Path, db: sqlite3.Connection, out: Path, dim: int, files: Sequence[DataFile], marks: Mapping[int, str]
) -> tuple[int, int, int]:
    """Write index.h5. Returns its rows, how many vectors it repeats, and their offset in it."""
    firsts = sum(file.live_rows for file in files)
    rows = firsts + sum(len(file.repeats) for file in files)
    with new_h5(path) as (h5, check):
        table = _Table(h5, db, rows, _columns(db, files), marks)
        for file in files:
            table.append(file.ids[file.live])
            check()
        repeated = h5.create_dataset("repeated", (rows - firsts, dim), "<f2")
        for file in files:
            if len(file.repeats):
                repeated[table.at - firsts : table.at - firsts + len(file.repeats)] = map_embeddings(
                    out / file.info.name, file.info
                )[file.repeats[:, 0]]
                table.append(file.repeats[:, 1])
                check()
        _virtual(h5, files, rows, firsts, dim)
        h5.flush()
        return rows, rows - firsts, repeated.id.get_offset() or 0


def _pieces(ids: Ids) -> Iterator[list[int]]:
    for start in range(0, len(ids), PIECE_ROWS):
        yield ids[start : start + PIECE_ROWS].tolist()


def _columns(db: sqlite3.Connection, files: Sequence[DataFile]) -> list[Column]:
    columns: dict[str, Column] = {}
    if not db.execute("SELECT 1 FROM metadata LIMIT 1").fetchone():
        return []
    for file in files:
        for ids in (file.ids[file.live], file.repeats[:, 1]):
            for piece in _pieces(ids):
                for (name, kind), count in Counter(select_in(db, _KINDS, (), piece)).items():
                    columns.setdefault(name, Column(name)).add(kind, count)
    return [columns[name] for name in sorted(columns)]


class _Table:
    """Every column of index.h5 but the vectors, filled from the manifest row by row."""

    def __init__(
        self, h5: h5py.File, db: sqlite3.Connection, rows: int, columns: Sequence[Column], marks: Mapping[int, str]
    ) -> None:
        self._h5, self._db, self._metadata, self._marks, self.at = h5, db, columns, marks, 0
        for name in ("key", "mark", "locator"):
            h5.create_dataset(name, (rows,), h5py.string_dtype())
        h5.create_dataset("id", (rows,), "<i8")
        h5.create_dataset("source", (rows,), "<i4")
        h5.create_dataset("size_bytes", (rows,), "<i8")
        h5.create_dataset("content_hash", (rows, DIGEST_BYTES), "u1")
        group = h5.create_group("metadata")
        for column in columns:
            column.create(group, rows)

    def append(self, ids: Ids) -> None:
        for piece in _pieces(ids):
            found = {row[0]: row for row in select_in(self._db, _ROWS, (), piece)}
            self._write(slice(self.at, self.at + len(piece)), [found[number] for number in piece])
            self.at += len(piece)

    def _write(self, part: slice, records: Sequence[tuple[Any, ...]]) -> None:
        h5 = self._h5
        ids, keys, hashes, sources, locators, sizes, packed = zip(*records, strict=True)
        h5["id"][part], h5["source"][part], h5["size_bytes"][part] = ids, sources, sizes
        h5["key"][part] = list(keys)
        h5["content_hash"][part] = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, DIGEST_BYTES)
        if not self._marks.keys().isdisjoint(ids):  # few are marked, and what is not written reads as ""
            h5["mark"][part] = [self._marks.get(number, "") for number in ids]
        h5["locator"][part] = [_quoted(locator) for locator in locators]
        if self._metadata:
            unpacked = [json.loads(text) if text else {} for text in packed]
            for column in self._metadata:
                h5["metadata"][column_path(column.name)][part] = column.values(unpacked)


def _quoted(locator: bytes) -> str:
    # Five times as fast as quoting when nothing is to be quoted, which is the rule.
    return quote_from_bytes(locator, safe=SAFE_TEXT) if locator.translate(None, SAFE_TEXT) else locator.decode()


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
