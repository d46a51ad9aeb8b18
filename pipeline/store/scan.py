"""Exact search over the vectors of a generation: every row is read once, memory-mapped as float16, by a kernel made for
it (numkong), in as many threads as there are cores.

    scan = Scan(list(generation.blocks()))
    rows, scores = scan.nearest(query_d, 9)                  # rows of index.h5, best first; ties by row
    rows, scores = scan.nearest(query_d, 9, allowed_n)       # filter first: other rows are not read where that pays

What it costs is memory bandwidth, so pieces are large and nothing else is done per row: dead rows are known by
position, and a score is looked at again only where it reaches the k-th best so far.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numkong
import numpy as np
import numpy.typing as npt

from pipeline.store.generation import Block

Rows: TypeAlias = npt.NDArray[np.int64]
Scores: TypeAlias = npt.NDArray[np.float32]
Query: TypeAlias = npt.NDArray[np.float16]

PIECE_BYTES = 32 << 20  # of vectors scored at once: large enough that Python costs nothing, small enough to share out
JOINED_BYTES = 4 << 20  # of live vectors in several files: copied together, since each file costs an answer 45 us
GATHER_SHARE = 0.25  # of a piece: below, its allowed rows are copied together; above, scoring all of them is cheaper
LOWEST = float(np.finfo(np.float32).min)
CORES = len(os.sched_getaffinity(0))


class Scan:
    """Holds the blocks' mappings, 8 bytes for every dead row, and a pool of threads; safe to share among threads."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = _joined(blocks)
        self.dim: int = self.blocks[0].emb_nd.shape[1] if self.blocks else 0
        self.rows = sum(block.live for block in self.blocks)
        self._firsts = np.array([block.first_row for block in self.blocks], np.int64)
        self._starts = [np.cumsum([0, *block.runs[:, 1].tolist()])[:-1] for block in self.blocks]
        self._dead = [
            np.flatnonzero(block.index_rows < 0) if block.live < len(block.emb_nd) else np.empty(0, np.int64)
            for block in self.blocks
        ]
        self._pool = ThreadPoolExecutor(CORES, "scan")

    @property
    def bytes(self) -> int:
        """What one exact answer reads."""
        return sum(block.emb_nd.nbytes for block in self.blocks)

    def close(self) -> None:
        self._pool.shutdown()

    def nearest(self, query_d: Query, k: int, allowed_n: npt.NDArray[np.bool_] | None = None) -> tuple[Rows, Scores]:
        """The k best live rows by inner product, the cosine of unit vectors; `allowed_n` says which rows may answer.

        Raises:
            ValueError: the query or the mask has another shape than the index.
        """
        check_query(query_d, self.dim)
        if allowed_n is not None and (allowed_n.shape != (self.rows,) or allowed_n.dtype != np.bool_):
            raise ValueError(f"allowed is {allowed_n.dtype} {allowed_n.shape}, expected bool ({self.rows},)")
        floor = LOWEST  # above what dead rows have; then the k-th best of a piece: nothing worse can be an answer

        def best(piece: tuple[int, slice]) -> tuple[Rows, Scores]:
            nonlocal floor
            rows, scores = self._score(*piece, query_d, allowed_n)
            at = np.flatnonzero(scores >= floor)
            if len(at) > k:
                kth = float(np.partition(scores[at], len(at) - k)[len(at) - k])
                floor = max(floor, kth)  # of two threads the lower one may win: right, if not the best
                at = at[scores[at] >= kth]
                at = at[np.argsort(-scores[at], kind="stable")[:k]]  # of many equal ones the first rows
            return (rows[at] if rows is not None else self._rows_at(piece[0], piece[1].start + at)), scores[at]

        nothing = np.empty(0, np.int64), np.empty(0, np.float32)
        # Small files, and few: this thread has scored them before others have woken up (10 files: .5 against .8 ms).
        over = map if self.bytes <= PIECE_BYTES else self._pool.map
        found = [nothing, *over(best, self._pieces())]
        return top(np.concatenate([rows for rows, _ in found]), np.concatenate([score for _, score in found]), k)

    def kth_scores(self, queries_qd: Query, k: int) -> Scores:
        """(q,) the k-th best score over all live rows of each query; -inf where there are fewer rows."""
        packed = numkong.dots_pack(np.ascontiguousarray(queries_qd), dtype="f16")

        def best(piece: tuple[int, slice]) -> Scores:
            number, part = piece
            scores = np.asarray(numkong.dots_packed(self.blocks[number].emb_nd[part], packed))
            scores[self._dead_in(number, part)] = -np.inf
            return _highest(scores.T, k)

        fill = np.full((len(queries_qd), k), -np.inf, np.float32)
        # Scores and a copy of them take more than a short vector does: 48 queries of d = 64 three times as much.
        pieces = self._pieces(8 * len(queries_qd))
        found = np.concatenate([fill, *self._pool.map(best, pieces)], axis=1)
        kth: Scores = _highest(found, k).min(axis=1)
        return kth

    def gather(self, rows: Rows) -> npt.NDArray[np.float16]:
        """(len(rows), d) copies of the vectors of these rows of index.h5."""
        vectors = np.empty((len(rows), self.dim), np.float16)
        numbers = np.searchsorted(self._firsts, rows, "right") - 1
        for number in np.unique(numbers).tolist():
            mine = np.flatnonzero(numbers == number)
            block, starts = self.blocks[number], self._starts[number]
            offset = rows[mine] - block.first_row
            run = np.searchsorted(starts, offset, "right") - 1
            vectors[mine] = block.emb_nd[block.runs[run, 0] + offset - starts[run]]
        return vectors

    def _pieces(self, row_bytes: int = 1) -> Iterator[tuple[int, slice]]:
        step = max(1, PIECE_BYTES // max(row_bytes, 2 * self.dim))
        for number, block in enumerate(self.blocks):
            for first in range(0, len(block.emb_nd), step):
                yield number, slice(first, min(first + step, len(block.emb_nd)))

    def _score(
        self, number: int, piece: slice, query_d: Query, allowed_n: npt.NDArray[np.bool_] | None
    ) -> tuple[Rows | None, Scores]:
        """Scores of a piece, -inf where a row must not answer; with the rows they belong to, or None: all of it."""
        part = self.blocks[number].emb_nd[piece]
        if allowed_n is None:
            scores = score(part, query_d)
            scores[self._dead_in(number, piece)] = -np.inf
            return None, scores
        may = np.ones(len(part), np.bool_)
        may[self._dead_in(number, piece)] = False
        at = np.flatnonzero(may)
        rows = self._rows_at(number, piece.start + at)
        keep = allowed_n[rows]
        at, rows = at[keep], rows[keep]
        if len(at) < GATHER_SHARE * len(part):
            return rows, score(part[at], query_d)
        return rows, score(part, query_d)[at]

    def _dead_in(self, number: int, piece: slice) -> Rows:
        dead = self._dead[number]
        first, last = np.searchsorted(dead, (piece.start, piece.stop))
        inside: Rows = dead[first:last] - piece.start
        return inside

    def _rows_at(self, number: int, positions: Rows) -> Rows:
        """Rows of index.h5 at these positions of a data file, all of them live."""
        block = self.blocks[number]
        run = np.searchsorted(block.runs[:, 0], positions, "right") - 1
        rows: Rows = block.first_row + self._starts[number][run] + positions - block.runs[run, 0]
        return rows


def _joined(blocks: Sequence[Block]) -> list[Block]:
    """Small files as one block in memory, without what is dead: 825 rows in ten files took .48 ms, in one .10."""
    if len(blocks) < 2 or sum(2 * block.live * block.emb_nd.shape[1] for block in blocks) > JOINED_BYTES:
        return list(blocks)
    parts = [block.emb_nd[first : first + count] for block in blocks for first, count in block.runs.tolist()]
    live_nd = np.concatenate([blocks[0].emb_nd[:0], *parts])
    return [Block("joined", live_nd, 0, np.array([[0, len(live_nd)]]))]


def _highest(scores_qn: Scores, k: int) -> Scores:
    """(q, k) the k highest of each row, in no order; fewer where there are fewer."""
    rows = scores_qn.shape[1]
    highest: Scores = scores_qn if rows <= k else np.partition(scores_qn, rows - k, axis=1)[:, rows - k :]
    return highest.copy()  # a view would keep all of them: 192 bytes a row of the index for 48 queries


def score(emb_nd: npt.NDArray[np.float16], query_d: Query) -> Scores:
    """(n,) inner products; those of a row are the same bits whatever stands beside it."""
    if not len(emb_nd):
        return np.empty(0, np.float32)
    return np.asarray(numkong.cdist(emb_nd, query_d[None], "inner"))[:, 0].astype(np.float32)


def top(rows: Rows, scores: Scores, k: int) -> tuple[Rows, Scores]:
    """The k best, best first; ties by row, so that the answer is the same every time."""
    if len(scores) > k:  # ties stay; sorting 10,000 takes 15 times as long
        near = np.flatnonzero(~(scores < np.partition(scores, len(scores) - k)[len(scores) - k]))
        rows, scores = rows[near], scores[near]
    best = np.lexsort((rows, -scores))[:k]
    return rows[best], scores[best]


def check_query(query_d: Query, dim: int) -> None:
    """
    Raises:
        ValueError: it is no vector of this index.
    """
    if query_d.dtype != np.float16 or (dim and query_d.shape != (dim,)):
        raise ValueError(f"the query is {query_d.dtype} {query_d.shape}, the index holds float16 vectors of ({dim},)")
