"""Approximate search: inverted lists of vectors near the same centroids, in eight bits, as a generation names them.

    INDEX/ann/<generation>.h5        /centroids (l, d) float16, unit norm
    INDEX/ann/<generation>-<n>.h5    immutable, list after list: /codes (n, d) int8 and /scales (n,) float32 of what a
                                     vector has beyond its centroid, /keys (n,) uint64; /starts (l + 1,) int64
    generations/<n>/ann.npy          (2, rows): keys of all live rows, ascending, and their rows in index.h5

A vector is an entry of two lists (`centroids.two_lists`). A question reads the centroids, then the lists of the nearest
ones, in every file, until it has looked at `probed` entries: a megabyte or some, one after the other. What may be among
the k best is scored again from the vectors themselves, so scores are those of exact search (IVF of Faiss, with
residuals as in Jegou et al. 2011, https://doi.org/10.1109/TPAMI.2010.57).

What may be, is told by the scale of each entry: rounding moves its score by so much. Most questions leave some twenty
entries to be scored again, one amid a burst of 300 pictures, nearer to each other than eight bits tell, all of them.
Where half of an index was such bursts (d = 64), the best 80 entries gave a recall of .77, all that may be give .95.

The key of a vector is the first 8 bytes of its content hash: it stays the same through folding, renames and copies, so
lists outlive the data files they were made from. A key that a generation does not know is dead there, one that several
rows have answers with all of them. Rows that are in no list (`tail`) are scored exactly, so nothing is ever missing for
want of a list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numkong
import numpy as np
import numpy.typing as npt

from pipeline.store.centroids import LISTS_EACH, ListNumbers
from pipeline.store.files import StoreDamaged, digest_file
from pipeline.store.scan import LOWEST, Query, Rows, Scan, Scores, check_query, score, top
from pipeline.store.shards import Vectors

KEY_BYTES = 8
TAIL_COPY_BYTES = 16 << 20  # up to here the vectors of the tail are kept together in memory, for a fast scan
ROUNDING = 1 / math.sqrt(12)  # standard deviation of what is lost between a number and the whole one next to it
DEVIATIONS = 3.0  # that the score of an entry may be off, either way
SCORED_MAX = 4096  # entries that are scored again: a third of an index may be the same blank page
DEAD_MAX = 0.5  # of the candidates; past it the neighbourhood has died, and a wider search looks further
WIDER = 4  # times the entries, then
LONG_MAX = 16  # times the entries: very many vectors are nearly equal here, and an exact search needs less memory
CODE_MAX = 127
REPAIR = "python -m pipeline.verify --repair makes it again; --exact answers without it"

Keys = npt.NDArray[np.uint64]
Codes = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class OwnFile:
    """A file of approximate search, as generation.json remembers it."""

    name: str  # relative to the index folder
    bytes: int
    digest: str

    def check(self, path: Path, digest: bool) -> None:
        """
        Raises:
            StoreDamaged: it is not there, or not what was written.
        """
        found = path.stat().st_size if path.is_file() else None
        if found != self.bytes:
            words = "no file" if found is None else f"{found} bytes"
            raise StoreDamaged(path, f"a file of {self.bytes} bytes", words, REPAIR)
        if digest and (got := digest_file(path)) != self.digest:
            raise StoreDamaged(path, f"digest {self.digest}", f"digest {got}", REPAIR)


@dataclass(frozen=True, slots=True)
class ListFile:
    """A file of lists, as generation.json remembers it."""

    entries: int
    file: OwnFile

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ListFile:
        return cls(content["entries"], OwnFile(**content["file"]))


@dataclass(frozen=True, slots=True)
class Lists:
    """One file of lists, mapped; it stays valid after the file is unlinked."""

    codes_nd: Codes
    scales: Scores
    keys: Keys
    starts: Rows

    @classmethod
    def open(cls, path: Path, shape_ld: tuple[int, ...]) -> Lists:
        """The file of so many lists, of vectors of this length.

        Raises:
            StoreDamaged: this is no such file.
        """
        lists, dim = shape_ld
        with _reading(path, "a file of lists"), h5py.File(path, "r", locking=False) as file:
            starts: Rows = _column(file, "starts", "<i8", (lists + 1,))[:]
            entries = int(starts[-1])
            if starts[0] != 0 or np.any(np.diff(starts) < 0):
                raise ValueError(f"/starts of {starts[:3]} to {entries} that do not ascend from 0")
            raw = np.memmap(path, np.uint8, "r")
            codes_nd = _mapped(raw, _column(file, "codes", "i1", (entries, dim)))
            scales = _mapped(raw, _column(file, "scales", "<f4", (entries,)))
            keys = _mapped(raw, _column(file, "keys", "<u8", (entries,)))
        return cls(codes_nd, scales, keys, starts)

    @property
    def list_of(self) -> ListNumbers:
        """(n,) the list of each entry."""
        return np.repeat(np.arange(len(self.starts) - 1, dtype=np.uint16), np.diff(self.starts))


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Too many open files, or a failing disk, is no damage of a file: only what its bytes say is."""
    try:
        yield
    except (OSError, KeyError, ValueError, TypeError, EOFError) as error:
        if getattr(error, "errno", None):
            raise
        raise StoreDamaged(path, what, str(error), REPAIR) from None


def _column(file: h5py.File, name: str, dtype: str, shape: tuple[int, ...]) -> h5py.Dataset:
    dataset = file[name]
    if dataset.shape != shape or dataset.dtype != dtype:
        raise ValueError(f"/{name} is {dataset.dtype} {dataset.shape}, not {dtype} {shape}")
    return dataset


def _mapped(raw: npt.NDArray[np.uint8], dataset: h5py.Dataset) -> npt.NDArray[Any]:
    """A plain array over the mapping: slices of it cost a third of those of numpy's memmap."""
    return np.ndarray(dataset.shape, dataset.dtype, raw.data, dataset.id.get_offset())


def content_keys(hashes: npt.NDArray[np.uint8]) -> Keys:
    """(n,) keys of (n, 16) content hashes."""
    return np.ascontiguousarray(hashes[:, :KEY_BYTES]).view("<u8")[:, 0]


def key_of(content_hash: bytes) -> int:
    return int.from_bytes(content_hash[:KEY_BYTES], "little")


def read_centroids(path: Path, dim: int) -> Vectors:
    """
    Raises:
        StoreDamaged: these are no centroids of such vectors.
    """
    with _reading(path, "a file of centroids"), h5py.File(path, "r", locking=False) as file:
        centroids_ld: Vectors = _column(file, "centroids", "<f2", (len(file["centroids"]), dim))[:]
    return centroids_ld


def read_map(path: Path, rows: int) -> Keys:
    """
    Raises:
        StoreDamaged: it is not the map of so many rows.
    """
    with _reading(path, f"keys and rows of {rows:,} rows"):
        map_2n: Keys = np.asarray(np.load(path, mmap_mode="r"))
        if map_2n.shape != (2, rows) or map_2n.dtype != "<u8":
            raise ValueError(f"{map_2n.dtype} {map_2n.shape}")
    return map_2n


def encode(emb_nd: npt.NDArray[np.float16] | npt.NDArray[np.float32]) -> tuple[Codes, Scores]:
    """(n, d) codes and (n,) scales: `codes * scales` is within half a scale of the vectors."""
    wide_nd = emb_nd.astype(np.float32)
    scales = np.maximum(np.abs(wide_nd).max(axis=1) / np.float32(CODE_MAX), np.finfo(np.float32).tiny)
    return np.rint(wide_nd / scales[:, None]).astype(np.int8), scales


class Lookup:
    """Lists, the keys of a generation, and the exact scan for what is in no list. Safe to share among threads."""

    def __init__(
        self, centroids_ld: Vectors, lists: Sequence[Lists], map_2n: Keys, tail: Rows, scan: Scan, probed: int
    ) -> None:
        self._centroids, self._lists, self._scan = centroids_ld, list(lists), scan
        self._centroid_codes, self._centroid_scales = encode(centroids_ld)  # half the bytes for each question to read
        self._starts = [one.starts.tolist() for one in self._lists]
        self._sizes = np.sum([np.diff(one.starts) for one in self._lists], axis=0)
        self._keys, self._rows = map_2n[0], map_2n[1]
        self._tail = tail
        self._tail_vectors, self._tail_mask = np.empty((0, scan.dim), np.float16), None
        if 2 * scan.dim * len(tail) <= TAIL_COPY_BYTES:
            self._tail_vectors = scan.gather(tail)
        else:  # building was cut short
            self._tail_mask = np.zeros(scan.rows, np.bool_)
            self._tail_mask[tail] = True
        self.probed = probed

    @property
    def entries(self) -> int:
        return int(self._sizes.sum())

    @classmethod
    def open(cls, index: Path, entry: dict[str, Any], scan: Scan, digest: bool = False) -> Lookup:
        """What `generation.ann` names. Sizes are checked, and with `digest` every byte.

        Raises:
            StoreDamaged: a file is missing or another.
        """
        files = [ListFile.from_json(content).file for content in entry["lists"]]
        centroids, own = OwnFile(**entry["centroids"]), OwnFile(**entry["map"])
        for file in (centroids, own, *files):
            file.check(index / file.name, digest)
        tail = [np.arange(first, first + count) for first, count in entry["tail"]]
        centroids_ld = read_centroids(index / centroids.name, scan.dim)
        return cls(
            centroids_ld,
            [Lists.open(index / file.name, centroids_ld.shape) for file in files],
            read_map(index / own.name, scan.rows),
            np.concatenate([np.empty(0, np.int64), *tail]),
            scan,
            entry["probed"],
        )

    def tail(self, query_d: Query, k: int) -> tuple[Rows, Scores]:
        """The k best rows of the tail."""
        if self._tail_mask is not None:
            return self._scan.nearest(query_d, k, self._tail_mask)
        return top(self._tail, score(self._tail_vectors, query_d), k)

    def nearest(
        self, query_d: Query, k: int, tail: tuple[Rows, Scores] | None = None
    ) -> tuple[Rows, Scores] | None:
        """The k best live rows of the tail (here, or as found before) and of the lists that are looked at, with exact
        scores; best first, ties by row, but for which of very many equal ones are among them. None: too few rows live
        around the query, or too many do, so only an exact search can tell."""
        check_query(query_d, self._scan.dim)
        code_1d, scale = encode(query_d[None])
        order = np.argsort(_products(self._centroid_codes, code_1d) * -self._centroid_scales)
        entries_before = np.cumsum(self._sizes[order])
        for probed in (self.probed, WIDER * self.probed):
            count = min(int(np.searchsorted(entries_before, probed)) + 1, len(order))
            if entries_before[count - 1] > LONG_MAX * self.probed:
                return None
            rows = self._live_rows(query_d, code_1d, scale, order[:count], k)
            if rows is not None:
                break
        else:
            return None
        if tail is None:
            tail = self.tail(query_d, k)
        scores = score(self._scan.gather(rows), query_d)
        return top(np.concatenate([rows, tail[0]]), np.concatenate([scores, tail[1]]), k)

    def _live_rows(self, query_d: Query, code_1d: Codes, scale: Scores, probed: Rows, k: int) -> Rows | None:
        """Live rows that may be among the k best of these lists, each once; None where most have died."""
        found = self._entries(query_d, code_1d, scale, probed)
        if found is None:
            return None
        keys, scores, off = found
        at_least, at_most = scores - off, scores + off
        sure = narrow = LISTS_EACH * k  # entries that stand for k contents, if all of them live
        everything = False
        while not everything:
            everything = sure >= len(scores)
            floor = LOWEST if everything else np.partition(at_least, len(scores) - sure)[len(scores) - sure]
            at = np.flatnonzero(at_most >= floor)
            if len(at) > (most := max(SCORED_MAX, sure)):
                at = at[np.argpartition(at_least[at], len(at) - most)[len(at) - most :]]
            best = np.unique(keys[at])  # a content is in two lists, and in more once it went and came back
            first = np.searchsorted(self._keys, best)
            several = np.searchsorted(self._keys, best, "right") - first
            several = np.minimum(several, k)  # no more than k copies can be among k answers
            if sure > narrow and np.count_nonzero(several) < (1 - DEAD_MAX) * len(best):
                return None
            above = keys[at[at_least[at] >= floor]]  # with those that died the floor is too high
            live = several.sum() * LISTS_EACH if everything else several[np.searchsorted(best, above)].sum()
            if live >= narrow:
                row_at = np.repeat(first - np.cumsum(several) + several, several) + np.arange(several.sum())
                rows: Rows = self._rows[row_at].astype(np.int64)
                return rows
            sure *= WIDER
        return None

    def _entries(
        self, query_d: Query, code_1d: Codes, scale: Scores, probed: Rows
    ) -> tuple[Keys, Scores, Scores] | None:
        """Keys and scores of all entries of these lists, and how far such a score may be from that of the vector."""
        keys_of, scales_of, products_of, sizes = [], [], [], []
        numbers = probed.tolist()
        for one, starts in zip(self._lists, self._starts, strict=True):
            for number in numbers:
                part = slice(starts[number], starts[number + 1])
                sizes.append(part.stop - part.start)
                if part.start < part.stop:
                    keys_of.append(one.keys[part])
                    scales_of.append(one.scales[part])
                    products_of.append(np.asarray(numkong.cdist(one.codes_nd[part], code_1d, "inner")))
        if not keys_of:
            return None
        scales = np.concatenate(scales_of)
        of_centroid = np.repeat(np.tile(score(self._centroids[probed], query_d), len(self._lists)), sizes)
        scores = np.concatenate(products_of)[:, 0].astype(np.float32) * (scales * scale) + of_centroid
        # An entry is rounded, and so is the query, which counts by how much a vector near it has beyond the centroid.
        beyond = np.sqrt(np.maximum(0, 2 - 2 * of_centroid))
        off = DEVIATIONS * ROUNDING * np.hypot(scales, scale * beyond)
        return np.concatenate(keys_of), scores, off.astype(np.float32)


def _products(codes_nd: Codes, code_1d: Codes) -> Scores:
    """(n,) inner products of codes with one."""
    return np.asarray(numkong.cdist(codes_nd, code_1d, "inner"))[:, 0].astype(np.float32)
