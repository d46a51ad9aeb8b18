"""Looks at a whole store and names what is wrong: data files, manifest and generations against each other.

Nothing is trusted: every byte of the data files is read once, for its digest and for the norms of its vectors, and only
a file whose digest is right is given to HDF5. Memory is about 40 bytes a row; a million rows of d = 512 take seconds.
Reading alone: `drop` takes out what was found, `pipeline.verify` is the command.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from pipeline.store.files import DIGEST_BYTES
from pipeline.store.listing import FETCH_ROWS
from pipeline.store.manifest import next_id
from pipeline.store.shards import ShardInfo

What: TypeAlias = Literal[
    "manifest",  # the SQLite file itself
    "missing file",
    "truncated file",
    "damaged file",  # its bytes, or more bytes, are not what was written
    "wrong layout",  # not the data sets, shapes or offset that the manifest says
    "wrong space",  # vectors of another model than the manifest or the generation says
    "manifest row without shard row",
    "shard row without manifest row",
    "input without vector",
    "duplicate id",
    "norm",
    "generation",  # generation.json against the manifest
    "ann out of step",  # lists against the generation that names them
    "index out of step",  # rows of index.h5 against the manifest and the data files
    "wrong link",
    "vector",  # not what its picture gives when it is embedded again
]
Prints: TypeAlias = npt.NDArray[np.uint64]  # a content hash in 8 bytes; 0 stands for none

# float16 rounding moves a norm by up to 2^-11, and an engine that normalises in float16 by as much again: twice that.
UNIT_TOLERANCE = 0.002
CHECK_ROWS = 1024  # 1 MB at d = 512, so that digest and norms find it in the cache
EXAMPLES = 3
REINDEX = "python -m pipeline.verify --repair embeds exactly these pictures again"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    what: What
    where: str  # file and rows, relative to the index
    expected: str
    found: str
    remedy: str


@dataclass(slots=True)
class Broken:
    """What `drop` takes out, by the names the manifest has for it."""

    shards: set[int] = field(default_factory=set)  # whole files
    rows: set[tuple[int, int]] = field(default_factory=set)  # shard and row of a vector
    contents: set[tuple[bytes, int]] = field(default_factory=set)  # content hash and space of a vector
    generations: set[int] = field(default_factory=set)
    lists: set[str] = field(default_factory=set)  # files of approximate search
    republish: bool = False  # the manifest is right and what readers see is not


@dataclass(slots=True)
class Health:
    """What a check found. No finding: every file, row and link is what the manifest says."""

    findings: list[Finding] = field(default_factory=list)
    broken: Broken = field(default_factory=Broken)
    files: int = 0
    bytes: int = 0
    vectors: int = 0
    inputs: int = 0  # rows of index.h5 compared with the manifest
    generation: int | None = None  # what readers see
    behind: str = ""  # what the next run of pipeline.index makes visible; no damage

    def add(self, what: What, where: str, expected: str, found: str, remedy: str = REINDEX) -> None:
        self.findings.append(Finding(what, where, expected, found, remedy))


@dataclass(frozen=True, slots=True)
class Shard:
    number: int
    space: int
    start: int  # of its rows among those of all shards
    info: ShardInfo

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.info.rows)


@dataclass(slots=True)
class FileLook:
    """A data file as it is on the disk."""

    problem: tuple[What, str, str] | None = None  # what, expected, found: then nothing else is known
    norms_off: dict[int, float] = field(default_factory=dict)  # row -> norm
    space: str = ""
    ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    prints: Prints = field(default_factory=lambda: np.empty(0, np.uint64))


def open_readonly(out: Path) -> sqlite3.Connection:
    """The manifest as of now, for looking alone. On a read-only file system it must have been closed properly."""
    frozen = "" if os.access(out, os.W_OK) else "&immutable=1"
    uri = f"{(out / 'manifest.sqlite').resolve().as_uri()}?mode=ro{frozen}"
    return sqlite3.connect(uri, uri=True, isolation_level=None)


@dataclass(slots=True)
class Contents:
    """What has a vector, by space."""

    known: dict[int, Prints]  # sorted
    unnamed: dict[tuple[int, int], str]  # space and print of a content that lies in a file alone -> file and row


def check_data(out: Path, db: sqlite3.Connection, health: Health) -> Contents:
    """Manifest against data files."""
    shards, spaces = read_shards(db)
    named = _read_places(db, shards, health)
    parts: dict[int, list[Prints]] = {}
    for shard in shards:
        parts.setdefault(shard.space, []).append(named[shard.rows])
    contents = Contents({space: np.sort(np.concatenate(several)) for space, several in parts.items()}, {})
    last_id = next_id(db, "input")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        looks = pool.map(lambda shard: look_at(out / shard.info.name, shard.info), shards)
        for shard, look in zip(shards, looks, strict=True):
            health.files += 1
            health.bytes += shard.info.bytes
            _compare(shard, look, named[shard.rows], spaces[shard.space], last_id, health)
            if not look.problem:
                alone = (named[shard.rows] == 0) & ~among(look.prints, contents.known[shard.space])
                for row in np.flatnonzero(alone).tolist():
                    contents.unnamed[shard.space, int(look.prints[row])] = f"{shard.info.name}, row {row}"
    return contents


def read_shards(db: sqlite3.Connection) -> tuple[list[Shard], dict[int, str]]:
    """Every data file the manifest names, and the names of the spaces."""
    spaces = {number: (name, dim) for number, name, dim in db.execute("SELECT id, name, dim FROM space")}
    shards: list[Shard] = []
    start = 0
    for number, space, name, rows, size, digest, offset, engine in db.execute(
        "SELECT id, space, name, rows, bytes, digest, offset, engine FROM shard ORDER BY id"
    ):
        info = ShardInfo(name, rows, spaces[space][1], size, digest, offset, engine)
        shards.append(Shard(number, space, start, info))
        start += rows
    return shards, {number: name for number, (name, _) in spaces.items()}


# A row of the vector table that points at a row of a shard of its own space.
PLACED = (
    "EXISTS(SELECT 1 FROM shard s WHERE s.id = vector.shard AND s.space = vector.space "
    f"AND vector.row BETWEEN 0 AND s.rows - 1) AND length(content_hash) = {DIGEST_BYTES}"
)


def _read_places(db: sqlite3.Connection, shards: Sequence[Shard], health: Health) -> Prints:
    """Over the rows of all shards: the content that the manifest says is there."""
    named = np.zeros(sum(shard.info.rows for shard in shards), np.uint64)
    start_of = np.zeros(next_id(db, "shard"), np.int64)
    for shard in shards:
        start_of[shard.number] = shard.start
    placed = 0
    cursor = db.execute(f"SELECT content_hash, shard, row FROM vector WHERE {PLACED}")
    while part := cursor.fetchmany(FETCH_ROWS):
        hashes, numbers, rows = zip(*part, strict=True)
        named[start_of[np.array(numbers)] + np.array(rows)] = prints(b"".join(hashes))
        placed += len(part)
    health.vectors = int(db.execute("SELECT count(*) FROM vector").fetchone()[0])
    if placed < health.vectors:
        sql = f"SELECT lower(hex(content_hash)), shard, row FROM vector WHERE NOT ({PLACED}) LIMIT {EXAMPLES}"
        examples = [f"content {content} in shard {number}, row {row}" for content, number, row in db.execute(sql)]
        health.add(
            "manifest row without shard row", "manifest.sqlite, table vector", "a row of a shard for every vector",
            few(health.vectors - placed, examples),
        )  # fmt: skip
    if np.count_nonzero(named) < placed:
        sql = f"SELECT shard, row FROM vector WHERE {PLACED} GROUP BY shard, row HAVING count(*) > 1"
        doubled = db.execute(sql).fetchall()
        health.broken.rows.update(doubled)
        health.add(
            "manifest row without shard row", "manifest.sqlite, table vector", "one content for every row of a shard",
            few(len(doubled), [f"shard {number}, row {row} holds several" for number, row in doubled]),
        )  # fmt: skip
    return named


def prints(hashes: bytes) -> Prints:
    """Content hashes, one after the other, in 8 bytes each: two that differ give the same by chance once in 2^64."""
    halves = np.frombuffer(hashes, "<u8").reshape(-1, 2)
    both: Prints = np.bitwise_xor(halves[:, 0], halves[:, 1])
    return both


def among(found: Prints, ordered: Prints) -> npt.NDArray[np.bool_]:
    """Which of `found` are in the sorted `ordered`."""
    if not len(ordered):
        return np.zeros(len(found), np.bool_)
    at = np.minimum(np.searchsorted(ordered, found), len(ordered) - 1)
    same: npt.NDArray[np.bool_] = ordered[at] == found
    return same


def few(count: int, examples: Iterable[str]) -> str:
    """A count with its first examples."""
    shown = list(examples)[:EXAMPLES]
    rest = f" and {count - len(shown):,} more" if count > len(shown) else ""
    return f"{count:,}: {'; '.join(shown)}{rest}"


def look_at(path: Path, info: ShardInfo) -> FileLook:
    """Read a data file once, from end to end."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return FileLook(("missing file", f"a file of {info.bytes:,} bytes", "no file"))
    if size != info.bytes:
        what: What = "truncated file" if size < info.bytes else "damaged file"
        return FileLook((what, f"{info.bytes:,} bytes", f"{size:,} bytes"))
    try:
        digest, norms_off = _read_through(path, info)
    except OSError as error:
        return FileLook(("damaged file", "a file that can be read", str(error)))
    if digest != info.digest:
        return FileLook(("damaged file", f"digest {info.digest}", f"digest {digest}"))
    try:
        with h5py.File(path, "r", locking=False) as file:
            emb = file["embeddings"]
            layout = (emb.dtype.str, emb.shape, emb.id.get_offset(), file["id"].shape, file["content_hash"].shape)
            expected = ("<f2", (info.rows, info.dim), info.offset, (info.rows,), (info.rows, DIGEST_BYTES))
            if layout != expected:
                return FileLook(("wrong layout", str(expected), str(layout)))
            space, ids, hashes = str(file.attrs.get("space", "")), file["id"][:], file["content_hash"][:]
    except (OSError, KeyError) as error:
        return FileLook(("wrong layout", "HDF5 with /embeddings, /id and /content_hash", str(error)))
    return FileLook(None, norms_off, space, ids, prints(hashes.tobytes()))


def _read_through(path: Path, info: ShardInfo) -> tuple[str, dict[int, float]]:
    """Digest of the file; rows whose norm is off, with it. Plain reads: mapped pages would count as our memory."""
    hasher, norms_off = blake3(), {}
    buffer = memoryview(bytearray(CHECK_ROWS * info.dim * 2))
    with path.open("rb", buffering=0) as file:
        hasher.update(file.read(info.offset))
        for first in range(0, info.rows, CHECK_ROWS):
            rows = min(CHECK_ROWS, info.rows - first)
            piece = buffer[: rows * info.dim * 2]
            if file.readinto(piece) != len(piece):
                break  # somebody cuts it while it is read; the digest tells
            hasher.update(piece)
            wide = np.frombuffer(piece, "<f2").reshape(rows, info.dim).astype(np.float32)
            norms = np.sqrt(np.einsum("nd,nd->n", wide, wide))
            for row in np.flatnonzero(~(np.abs(norms - 1) <= UNIT_TOLERANCE)):  # the negation also catches NaN
                norms_off[first + int(row)] = float(norms[row])
        while tail := file.read(len(buffer)):
            hasher.update(tail)
    return hasher.hexdigest(length=DIGEST_BYTES), norms_off


def _compare(shard: Shard, look: FileLook, named: Prints, space: str, last_id: int, health: Health) -> None:
    """One data file against what the manifest says of it."""
    name = shard.info.name
    if look.problem:
        health.broken.shards.add(shard.number)
        health.add(look.problem[0], name, look.problem[1], look.problem[2])
        return
    if look.space != space:
        health.broken.shards.add(shard.number)
        health.add("wrong space", name, f"vectors of {space}", f"vectors of {look.space or 'no space'}")
        return
    live = named != 0
    if wrong := np.flatnonzero(live & (look.prints != named)).tolist():
        health.broken.rows.update((shard.number, row) for row in wrong)
        expected = "in every row the content that the manifest says"
        health.add("manifest row without shard row", name, expected, few(len(wrong), _rows(wrong)))
    if wrong := np.flatnonzero(live & ((look.ids < 1) | (look.ids >= last_id))).tolist():
        health.broken.rows.update((shard.number, row) for row in wrong)
        examples = [f"row {row} has id {look.ids[row]}" for row in wrong[:EXAMPLES]]
        health.add("shard row without manifest row", name, f"ids from 1 to {last_id - 1}", few(len(wrong), examples))
    if name.startswith("shards/"):  # a segment may hold what an input showed before and after it changed
        order = np.argsort(look.ids, kind="stable")
        again = order[1:][np.diff(look.ids[order]) == 0]
        if wrong := sorted(int(row) for row in again if live[row]):
            health.broken.rows.update((shard.number, row) for row in wrong)
            examples = [f"id {look.ids[row]} again in row {row}" for row in wrong[:EXAMPLES]]
            health.add("duplicate id", name, "every input once", few(len(wrong), examples))
    if wrong := sorted(row for row in look.norms_off if live[row]):
        health.broken.rows.update((shard.number, row) for row in wrong)
        examples = [f"row {row} has norm {look.norms_off[row]:.4f}" for row in wrong[:EXAMPLES]]
        health.add("norm", name, f"1 within {UNIT_TOLERANCE}", few(len(wrong), examples))


def _rows(rows: Sequence[int]) -> list[str]:
    return [f"row {row}" for row in rows[:EXAMPLES]]
