"""The table of a generation: index.h5, one row per live key, for our readers and for any h5py user.

`publish` says what is in it. `write` makes it from the manifest alone, by id, 8,192 rows at a time, in the order of the
data files: 8 s per million rows. `amend` makes the same from the last one and what was touched since. For its sake
columns are chunked: they can grow, and a chunk moves as it is, its strings stay where they lie in the file.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, quote_from_bytes

import h5py
import numpy as np

from pipeline.store.files import DIGEST_BYTES
from pipeline.store.hdf5 import new_h5
from pipeline.store.manifest import select_in
from pipeline.store.places import DataFile, Ids
from pipeline.store.shards import PIECE_ROWS, map_embeddings

log = logging.getLogger(__name__)

CHUNK_ROWS_MIN, CHUNK_ROWS_MAX = 256, PIECE_ROWS
# HDF5 takes time quadratic in the stretches of one selection, and 25 KB for every selection: 128 suits both.
RUNS_PER_MAPPING = 128
# Columns of metadata: a source may name the fields of every record otherwise, and each column costs every reader.
COLUMNS_MAX = 1_024
NAMES_MAX = 16 * COLUMNS_MAX  # that are counted at all, to find the most frequent

SAFE_TEXT = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/_.-~ :,()+=@"
_ROWS = """
    SELECT i.id, i.key, i.content_hash, i.scope, i.locator, i.size, m.json
    FROM input i LEFT JOIN metadata m ON m.meta_hash = i.meta_hash WHERE i.id IN (?*)"""


class Written(NamedTuple):
    rows: int
    repeated: int  # vectors that index.h5 holds itself
    offset: int  # of them
    whole: dict[str, int] | None = None  # of the table that was amended: when it was whole, with which size


@dataclass(slots=True)
class Column:
    """A metadata column: `kind` is the narrowest of int64, float64 and text that holds every value."""

    name: str
    counts: list[int] = field(default_factory=lambda: [0, 0, 0])  # values that are integers, reals, texts

    @property
    def kind(self) -> str:
        return "text" if self.counts[2] else "real" if self.counts[1] else "integer"

    def layout(self, rows: int) -> tuple[str, str]:
        """Kind and numpy's name for it in a table of `rows`: whole numbers are floats where one is missing."""
        if self.kind == "text":
            return "text", "O"
        return self.kind, "<i8" if self.kind == "integer" and sum(self.counts) == rows else "<f8"

    def create(self, group: h5py.Group, rows: int, shown_rows: int, chunk_rows: int) -> h5py.Dataset:
        kind, dtype = self.layout(shown_rows)
        fill = np.nan if dtype == "<f8" else None
        dataset = _grows(group, column_path(self.name), (rows,), chunk_rows, dtype, fill)
        dataset.attrs.update(name=self.name, kind=kind)
        self.remember(dataset)
        return dataset

    def remember(self, dataset: h5py.Dataset) -> None:
        dataset.attrs["values"] = self.counts

    def values(self, unpacked: Sequence[Mapping[str, Any]]) -> list[Any]:
        if self.kind == "text":
            return [str(values.get(self.name, "")) for values in unpacked]
        return [values.get(self.name, np.nan) for values in unpacked]


def column_path(name: str) -> str:
    """A name HDF5 takes for a dataset; the attribute `name` keeps the original."""
    return quote(name, safe=" !#$&'()*+,:;<=>?@[]^`{|}~") if name not in ("", ".") else f"%{name}"


def chunk_rows(rows: int) -> int:
    """A power of two, so that a small table is a small file."""
    return min(CHUNK_ROWS_MAX, max(CHUNK_ROWS_MIN, 1 << max(rows - 1, 0).bit_length()))


def write(
    path: Path, db: sqlite3.Connection, out: Path, dim: int, files: Sequence[DataFile], marks: Mapping[int, str]
) -> Written:
    """Write index.h5. `files` and `marks` are those of `places.scan`."""
    firsts, repeated = count_rows(files)
    rows = firsts + repeated
    with new_h5(path) as (h5, check):
        columns, left_out = _columns(db, files)
        _create(h5, rows, columns, left_out)
        writer = Writer(h5, db, marks, columns)
        for ids in shown_by(files):
            writer.append(ids)
            check()
        offset = write_repeated(h5, out, files, dim)
        check()
        write_virtual(h5, files, rows, firsts, dim)
        h5.flush()
        return Written(rows, repeated, offset)


def count_rows(files: Sequence[DataFile]) -> tuple[int, int]:
    """Vectors that are shown, and how often one of them is shown again."""
    return sum(file.live_rows for file in files), sum(len(file.repeats) for file in files)


def shown_by(files: Sequence[DataFile]) -> Iterator[Ids]:
    """Who shows the rows of the table, in their order: those of one data file after the other, then the repetitions."""
    for file in files:
        yield file.shows[file.live]
    for file in files:
        yield file.repeats[:, 1]


# --- metadata


def _columns(db: sqlite3.Connection, files: Sequence[DataFile]) -> tuple[list[Column], int]:
    """The columns of the table, in order, and how many were left out because there are too many."""
    columns: dict[str, Column] = {}
    if not db.execute("SELECT 1 FROM metadata LIMIT 1").fetchone():
        return [], 0
    uncounted = 0
    for file in files:
        for ids in (file.shows[file.live], file.repeats[:, 1]):
            for piece in _pieces(ids):
                uncounted += count_values(db, metadata_of(db, piece), columns)
    kept = sorted(columns.values(), key=lambda column: (-sum(column.counts), column.name))[:COLUMNS_MAX]
    left_out = len(columns) - len(kept) + uncounted
    if left_out:
        rare = sorted(columns.keys() - {column.name for column in kept})[:3]
        log.warning(
            "metadata has more than %s names; index.h5 has the %s most frequent as columns, the others are not in it "
            "(such as %s). Give the records of all sources the same field names", f"{COLUMNS_MAX:,}",
            f"{COLUMNS_MAX:,}", ", ".join(map(repr, rare)),
        )  # fmt: skip
    return sorted(kept, key=lambda column: column.name), left_out


def metadata_of(db: sqlite3.Connection, ids: Sequence[int]) -> Counter[bytes]:
    """How many of the inputs have which metadata, by its hash."""
    sql = "SELECT meta_hash FROM input WHERE meta_hash IS NOT NULL AND id IN (?*)"
    return Counter(row[0] for row in select_in(db, sql, (), ids))


def count_values(db: sqlite3.Connection, times: Mapping[bytes, int], columns: dict[str, Column]) -> int:
    """Add the values of some metadata, each as often as it is there (or gone), to the counts of `columns`. Returns how
    many were not counted because there are `NAMES_MAX` names already."""
    uncounted = 0
    sql = "SELECT meta_hash, json FROM metadata WHERE meta_hash IN (?*)"
    for meta_hash, packed in select_in(db, sql, (), list(times)):
        for name, value in json.loads(packed).items():
            if name not in columns:
                if len(columns) >= NAMES_MAX:
                    uncounted += 1
                    continue
                columns[name] = Column(name)
            kind = 2 if isinstance(value, str) else 1 if isinstance(value, float) else 0
            columns[name].counts[kind] += times[meta_hash]
    return uncounted


# --- columns


def _create(h5: h5py.File, rows: int, columns: Sequence[Column], left_out: int) -> None:
    chunk = chunk_rows(rows)
    for name, dtype in (("key", "O"), ("mark", "O"), ("locator", "O"), ("id", "<i8"), ("source", "<i4"),
                        ("size_bytes", "<i8")):  # fmt: skip
        _grows(h5, name, (rows,), chunk, dtype)
    _grows(h5, "content_hash", (rows, DIGEST_BYTES), chunk, "u1")
    group = h5.create_group("metadata")
    group.attrs["left_out"] = left_out
    for column in columns:
        column.create(group, rows, rows, chunk)


def _grows(
    group: h5py.Group, name: str, shape: tuple[int, ...], chunk: int, dtype: str, fill: float | None = None
) -> h5py.Dataset:
    """What is never written takes no space, and reads as `fill`."""
    kind: Any = h5py.string_dtype() if dtype == "O" else dtype
    chunks, most = (chunk, *shape[1:]), (None, *shape[1:])
    return group.create_dataset(name, shape, kind, chunks=chunks, maxshape=most, fillvalue=fill)


class Writer:
    """Fills every column of index.h5 but the vectors, from the manifest, row by row."""

    def __init__(
        self, h5: h5py.File, db: sqlite3.Connection, marks: Mapping[int, str], columns: Sequence[Column], at: int = 0
    ) -> None:
        self._h5, self._db, self._columns, self._marks, self._at = h5, db, columns, marks, at

    def append(self, ids: Ids) -> None:
        for piece in _pieces(ids):
            found = {row[0]: row for row in select_in(self._db, _ROWS, (), piece)}
            self._write(slice(self._at, self._at + len(piece)), [found[number] for number in piece])
            self._at += len(piece)

    def _write(self, part: slice, records: Sequence[tuple[Any, ...]]) -> None:
        h5 = self._h5
        ids, keys, hashes, sources, locators, sizes, packed = zip(*records, strict=True)
        h5["id"][part], h5["source"][part], h5["size_bytes"][part] = ids, sources, sizes
        h5["key"][part] = list(keys)
        h5["content_hash"][part] = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, DIGEST_BYTES)
        if not self._marks.keys().isdisjoint(ids):  # few are marked, and what is not written reads as ""
            h5["mark"][part] = [self._marks.get(number, "") for number in ids]
        h5["locator"][part] = _quoted(locators)
        if self._columns:
            unpacked = [json.loads(text) if text else {} for text in packed]
            there = {name for values in unpacked for name in values}
            for column in self._columns:
                if column.name in there:
                    h5["metadata"][column_path(column.name)][part] = column.values(unpacked)


def _pieces(ids: Ids) -> Iterator[list[int]]:
    for start in range(0, len(ids), PIECE_ROWS):
        yield ids[start : start + PIECE_ROWS].tolist()


def _quoted(locators: Sequence[bytes]) -> list[str]:
    # Nothing is to be quoted, that is the rule; then all at once take a tenth of the time.
    together = b"\0".join(locators)
    if len(together.translate(None, SAFE_TEXT)) == len(locators) - 1:
        return together.decode().split("\0")
    return [quote_from_bytes(locator, safe=SAFE_TEXT) for locator in locators]


# --- vectors


def write_repeated(h5: h5py.File, out: Path, files: Iterable[DataFile], dim: int) -> int:
    """Copies of the vectors that several rows show, for all rows but the first. Returns their offset in the file."""
    files = [file for file in files if len(file.repeats)]
    dataset = h5.create_dataset("repeated", (sum(len(file.repeats) for file in files), dim), "<f2")
    at = 0
    for file in files:
        rows = file.repeats[:, 0]
        dataset[at : at + len(rows)] = map_embeddings(out / file.info.name, file.info)[rows]
        at += len(rows)
    return int(dataset.id.get_offset() or 0)


def write_virtual(h5: h5py.File, files: Sequence[DataFile], rows: int, firsts: int, dim: int) -> None:
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
