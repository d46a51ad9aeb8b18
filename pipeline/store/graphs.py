"""Approximate search: the USearch graphs that a generation names, and exact scores on top of what they find.

    INDEX/ann/<generation>-<n>.usearch    immutable: float16 vectors and their graph, made by `pipeline.store.ann`
    INDEX/ann/<generation>-<n>.keys       its keys, ascending, little-endian 64 bits
    generations/<n>/ann.npy               (2, rows): keys of all live rows, ascending, and their rows in index.h5

The key of a vector is the first 8 bytes of its content hash: it stays the same through folding, renames and copies, so
a graph outlives the data files it was made from. A key that a generation does not know is dead there, one that several
rows have answers with all of them. Rows that are in no graph (`tail`) are scored exactly, so nothing is ever missing
for want of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.store.files import StoreDamaged, digest_file
from pipeline.store.scan import CORES, Query, Rows, Scan, Scores, check_query, score, top

if TYPE_CHECKING:
    from pipeline.store.usearch_lib import Index

KEY_BYTES = 8
EXPANSIONS = (32, 64, 96, 128, 192, 256, 384, 512)  # widths of search; the first with the wanted recall is taken
TAIL_COPY_BYTES = 16 << 20  # up to here the vectors of the tail are kept together in memory, for a fast scan
SCORED_PER_ANSWER = 3  # live contents scored exactly for each that is asked for: float16 distances are nearly exact
DEAD_BEAM_MAX = 0.5  # of what a search finds; past it the neighbourhood has died, and a wider search looks further
REPAIR = "python -m pipeline.verify --repair makes it again; --exact answers without it"


@dataclass(frozen=True, slots=True)
class OwnFile:
    """A file of the graphs, as generation.json remembers it."""

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
class GraphFile:
    rows: int
    graph: OwnFile
    keys: OwnFile

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> GraphFile:
        return cls(content["rows"], OwnFile(**content["graph"]), OwnFile(**content["keys"]))


def content_keys(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """(n,) keys of (n, 16) content hashes."""
    return np.ascontiguousarray(hashes[:, :KEY_BYTES]).view("<u8")[:, 0]


def view_graph(path: Path, keys: bool = False) -> Index:
    """A graph as a read-only mapping; it stays valid after the file is unlinked.

    With `keys` it can list its keys, for which every row is looked at: 46 instead of 17 ms for 200,000.
    """
    from pipeline.store.usearch_lib import Index  # 40 ms, for those alone who have graphs

    graph = Index.restore(path, view=True, enable_key_lookups=keys)
    if graph is None:
        raise StoreDamaged(path, "a USearch graph", "something else", REPAIR)
    return graph


class Graphs:
    """Graphs, the keys of a generation, and the exact scan that settles the order. Safe to share among threads."""

    def __init__(
        self, views: Sequence[Index], map_2n: npt.NDArray[np.uint64], tail: Rows, scan: Scan, expansion: int
    ) -> None:
        self._views, self._keys, self._rows, self._scan = list(views), map_2n[0], map_2n[1], scan
        self._tail = tail
        self._tail_vectors, self._tail_mask = np.empty((0, scan.dim), np.float16), None
        if 2 * scan.dim * len(tail) <= TAIL_COPY_BYTES:
            self._tail_vectors = scan.gather(tail)
        else:  # building was cut short
            self._tail_mask = np.zeros(scan.rows, np.bool_)
            self._tail_mask[tail] = True
        for view in self._views:
            view.expansion_search = 1  # so that the count of a search alone says how wide it is
        self.expansion = expansion
        self._pool = ThreadPoolExecutor(min(CORES, max(1, len(self._views))), "graphs")

    @classmethod
    def open(cls, index: Path, entry: dict[str, Any], scan: Scan, digest: bool = False) -> Graphs:
        """What `generation.ann` names. Sizes are checked, and with `digest` every byte.

        Raises:
            StoreDamaged: a file is missing or another.
        """
        files = [GraphFile.from_json(file) for file in entry["graphs"]]
        own = OwnFile(**entry["map"])
        for file in [own, *(file.graph for file in files)]:
            file.check(index / file.name, digest)
        map_2n = np.load(index / own.name, mmap_mode="r")
        tail = [np.arange(first, first + count) for first, count in entry["tail"]]
        views = [view_graph(index / file.graph.name) for file in files]
        return cls(views, map_2n, np.concatenate([np.empty(0, np.int64), *tail]), scan, entry["expansion"])

    def close(self) -> None:
        self._pool.shutdown()

    def nearest(self, query_d: Query, k: int) -> tuple[Rows, Scores] | None:
        """The k best live rows as far as the graphs find them, with exact scores; best first, ties by row.

        None: the graphs hold, or reach, too few live rows around the query, so only an exact search can tell.
        """
        check_query(query_d, self._scan.dim)
        count = max(self.expansion, 2 * k)
        rows = self._live_rows(query_d, k, count)
        if rows is None:
            rows = self._live_rows(query_d, k, 4 * count)
        if rows is None:
            return None
        if self._tail_mask is not None:
            tail = self._scan.nearest(query_d, k, self._tail_mask)
        else:
            tail = top(self._tail, score(self._tail_vectors, query_d), k)
        return top(
            np.concatenate([rows, tail[0]]),
            np.concatenate([score(self._scan.gather(rows), query_d), tail[1]]),
            k,
        )

    def _live_rows(self, query_d: Query, k: int, count: int) -> Rows | None:
        """Rows of the nearest that the graphs find, each once."""
        if len(self._views) == 1:
            found = [_search(self._views[0], query_d, count)]
        else:
            found = list(self._pool.map(lambda view: _search(view, query_d, count), self._views))
        if any(len(keys) < min(count, len(view)) for (keys, _), view in zip(found, self._views, strict=True)):
            return None  # among vectors that are nearly the same some have no link that leads to them
        nearest = np.argsort(np.concatenate([distances for _, distances in found]), kind="stable")[:count]
        keys = np.concatenate([keys for keys, _ in found])[nearest]
        first = np.searchsorted(self._keys, keys)
        several = np.searchsorted(self._keys, keys, "right") - first
        live = np.flatnonzero(several)
        if len(live) < (1 - DEAD_BEAM_MAX) * len(keys) or (len(live) < k and len(live) < len(self._keys)):
            return None
        live = live[: SCORED_PER_ANSWER * k]
        first, several = first[live], np.minimum(several[live], k)  # no more than k copies can be among k answers
        at = np.repeat(first - np.cumsum(several) + several, several) + np.arange(several.sum())
        return np.unique(self._rows[at].astype(np.int64))  # a content that went and came back may be in two graphs


def _search(view: Index, query_d: Query, count: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32]]:
    matches = view.search(query_d, min(count, len(view)), threads=1)
    found = ~np.isnan(matches.distances)  # rows that were not filled have key 0
    return matches.keys[found], matches.distances[found]
