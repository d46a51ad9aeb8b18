"""Reading a published generation. Never opens the manifest, never reads through the virtual dataset.

    with Generation.open(Path("INDEX")) as generation:
        for block in generation.blocks():           # memory-mapped float16, one block per data file
            scores = block.emb_nd @ query           # positions in the file ...
            block.index_rows                        # ... to rows of index.h5, -1 where dead
        generation.keys(rows), generation.metadata(rows)

What `open` resolved stays readable through later publishes, folding and pruning: mappings outlive the names of their
files. A data file costs one descriptor: there are up to 32 small ones, one for every 400 k rows, never
more than 256.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote_to_bytes

import h5py
import numpy as np
import numpy.typing as npt

from pipeline.store.files import GENERATION_SCHEMA, NoIndex, StoreDamaged, StoreError, write_text
from pipeline.store.listing import Scope
from pipeline.store.shards import ShardInfo, check_file, map_embeddings

Check = Literal["size", "digest"]
DISTRUSTED = "distrusted.json"  # beside generation.json
ID_PIECE = 1 << 20
COLUMN_PIECE = 1 << 16  # rows of a column at once, some MB of texts


class Picture(NamedTuple):
    source: Scope
    locator: bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Block:
    """All vectors of one data file, dead ones too: scan them raw, then drop what maps to no row."""

    name: str
    emb_nd: npt.NDArray[np.float16]  # mapped
    first_row: int  # row of index.h5 that its first live vector has
    runs: npt.NDArray[np.int64]  # (k, 2): first position and count of each stretch of live vectors
    engine: str = ""  # as `ShardInfo.engine`

    @property
    def live(self) -> int:
        return int(self.runs[:, 1].sum())

    @property
    def index_rows(self) -> npt.NDArray[np.int64]:
        """(len(emb_nd),) the row of index.h5 of each position, -1 where it is dead."""
        rows = np.full(len(self.emb_nd), -1, np.int64)
        at = self.first_row
        for start, count in self.runs.tolist():
            rows[start : start + count] = np.arange(at, at + count)
            at += count
        return rows


class Distrusted(NamedTuple):
    """What a repair found wrong in lists, in a file of its own: generation.json is never changed."""

    files: list[str]  # not what was written, or not of these vectors: the generation is searched exactly without them
    keys: list[int]  # of vectors that were dropped: what the next lists must not take over

    @classmethod
    def read(cls, home: Path) -> Distrusted:
        path = home / DISTRUSTED
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else cls([], [])

    def write(self, home: Path) -> None:
        write_text(home / DISTRUSTED, json.dumps(self._asdict()))


class Generation:
    def __init__(self, index: Path, home: Path, check: Check) -> None:
        content = _load(home / "generation.json")
        self.number: int = content["number"]
        self.space: str = content["space"]
        self.dim: int = content["dim"]
        self.rows: int = content["rows"]
        self.spec: dict[str, Any] = content["spec"]
        self.extra: dict[str, Any] = content["extra"]
        entry = content.get("ann")
        # Of `lists`; None: exact search alone, for small indexes, those of versions before lists, and broken lists.
        has_lists = entry and "lists" in entry and not Distrusted.read(home).files
        self.ann: dict[str, Any] | None = entry if has_lists else None
        self.sources = {entry.pop("id"): Scope(**entry) for entry in content["sources"]}
        own = ShardInfo(**content["index"])
        check_file(index / own.name, own, check == "digest")
        self._blocks: list[Block] = []
        at = 0
        for entry in [*content["files"], {**content["index"], "runs": [[0, own.rows]]}]:
            runs = np.array(entry.pop("runs"), np.int64).reshape(-1, 2)
            info = ShardInfo(**entry)
            if not info.rows:
                continue
            emb_nd = map_embeddings(index / info.name, info, check == "digest")
            self._blocks.append(Block(info.name, emb_nd, at, runs, info.engine))
            at += int(runs[:, 1].sum())
        if at != self.rows:
            raise StoreDamaged(home / "generation.json", f"{self.rows} live rows", f"{at}", "Publish a new generation")
        self._table = h5py.File(index / own.name, "r", locking=False)
        self._opened: dict[str, h5py.Dataset] = {}  # opening one takes as long as reading a few rows of it

    @classmethod
    def open(cls, index: Path, check: Check = "size") -> Generation:
        """What `current` points at now. Should a publisher prune it while it is being opened, the newer one."""
        while True:
            home = (index / "current").resolve()
            if not home.is_dir():
                raise NoIndex(f"no index in {index}; make one: python -m pipeline.index --out {index} ...")
            try:
                return cls(index, home, check)
            except (StoreDamaged, FileNotFoundError):
                if (index / "current").resolve() == home:
                    raise

    @classmethod
    def at(cls, index: Path, number: int, check: Check = "size") -> Generation:
        """One that is kept, whether it is shown or not."""
        home = index / "generations" / str(number)
        if not home.is_dir():
            raise NoIndex(f"{index} has no generation {number}")
        return cls(index, home, check)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the table. Blocks that somebody holds stay readable."""
        self._opened.clear()
        self._table.close()
        self._blocks.clear()

    def blocks(self) -> Iterator[Block]:
        yield from self._blocks

    def keys(self, rows: npt.NDArray[np.int64]) -> list[str]:
        return self._strings("key", rows)

    def marks(self, rows: npt.NDArray[np.int64]) -> list[str]:
        return self._strings("mark", rows)

    def pictures(self, rows: npt.NDArray[np.int64]) -> list[Picture]:
        """Where each picture was read from, and can be read again while the source keeps it."""
        locators, sizes = self._strings("locator", rows), self._column("size_bytes", rows)
        return [
            Picture(self.sources[int(number)], unquote_to_bytes(locator), int(size))
            for number, locator, size in zip(self._column("source", rows), locators, sizes, strict=True)
        ]

    def content_hashes(self, rows: npt.NDArray[np.int64]) -> list[bytes]:
        return [row.tobytes() for row in self._column("content_hash", rows)]

    def metadata(self, rows: npt.NDArray[np.int64]) -> list[dict[str, str | int | float]]:
        """Per row, the values it has; a missing one is left out."""
        found: list[dict[str, str | int | float]] = [{} for _ in rows]
        for name, (kind, path) in self.metadata_columns.items():
            if kind == "text":
                for values, text in zip(found, self._strings(path, rows), strict=True):
                    if text:
                        values[name] = text
                continue
            for values, number in zip(found, self._column(path, rows), strict=True):
                if not np.isnan(number):
                    values[name] = int(number) if kind == "integer" else float(number)
        return found

    @cached_property
    def metadata_columns(self) -> dict[str, tuple[str, str]]:
        """Name -> kind (text, integer or real) and path in index.h5, which quotes what HDF5 does not take."""
        columns = self._table["metadata"].items()
        return {dataset.attrs["name"]: (dataset.attrs["kind"], f"metadata/{path}") for path, dataset in columns}

    def column(self, path: str) -> Iterator[npt.NDArray[Any]]:
        """A column of index.h5 from top to bottom, `COLUMN_PIECE` rows at a time; texts are bytes."""
        for first in range(0, self.rows, COLUMN_PIECE):
            yield self._table[path][first : first + COLUMN_PIECE]

    def ids(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Of the inputs; an id belongs to one key for ever, through all generations."""
        return np.asarray(self._column("id", rows), np.int64)

    def rows_of(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row of index.h5 of each input, -1 where it is not shown. Reads the id column once, in pieces."""
        order = np.argsort(ids)
        rows = np.full(len(ids), -1, np.int64)
        for first in range(0, self.rows, ID_PIECE):
            piece: npt.NDArray[np.int64] = self._table["id"][first : first + ID_PIECE]
            found = np.flatnonzero(np.isin(piece, ids))
            rows[order[np.searchsorted(ids, piece[found], sorter=order)]] = first + found
        return rows

    def vectors(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """(n, d), a copy."""
        emb_nd = np.empty((len(rows), self.dim), np.float16)
        for block in self._blocks:
            here = np.flatnonzero((rows >= block.first_row) & (rows < block.first_row + block.live))
            if len(here):
                ends = np.cumsum(block.runs[:, 1])
                nth = rows[here] - block.first_row  # live vector of this block
                run = np.searchsorted(ends, nth, side="right")
                emb_nd[here] = block.emb_nd[block.runs[run, 0] + nth - (ends[run] - block.runs[run, 1])]
        return emb_nd

    def _strings(self, path: str, rows: npt.NDArray[np.int64]) -> list[str]:
        return [text.decode() for text in self._column(path, rows)]

    def _column(self, path: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        # h5py wants increasing positions, each once.
        unique, back = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        if not len(unique):
            return np.empty(0)
        if path not in self._opened:
            self._opened[path] = self._table[path]
        values: npt.NDArray[Any] = self._opened[path][unique][back]
        return values


def content_of(home: Path) -> dict[str, Any]:
    """Of the generation.json in this folder, as it is; nothing where it cannot be read."""
    try:
        content: dict[str, Any] = json.loads((home / "generation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content


def _load(path: Path) -> dict[str, Any]:
    remedy = (
        "python -m pipeline.verify --repair publishes it again; until then python -m pipeline.generations --show N "
        "shows an older one"
    )
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreDamaged(path, "a generation", "no file", remedy) from None
    except ValueError as error:
        raise StoreDamaged(path, "JSON", str(error), remedy) from None
    if content.get("schema") != GENERATION_SCHEMA:
        raise StoreError(
            f"{path} has schema {content.get('schema')}, this version of nightjar reads {GENERATION_SCHEMA}; "
            "read it with the version that wrote it"
        )
    return content
