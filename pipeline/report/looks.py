"""Tonight's pictures among all others of the index: their nearest neighbours, near-duplicates, and drift.

One pass over the vectors of a generation, memory-mapped float16, with as many queries as leave it about a second. Above
SEARCH_ROWS every n-th stretch of the index is read, and `searched` says how much that was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numkong
import numpy as np
import numpy.typing as npt

from pipeline.store import Generation

SHOWN, NEAREST = 6, 4
NEAR_DUPLICATE_COSINE = 0.99
SEARCH_ROWS = 4_000_000
COSINES = 10_000_000  # 1.3 s at d = 512 on one core
QUERIES_MAX = 300
PIECE_ROWS = 16_384
MEAN_ROWS = 100_000  # evenly spread ones give the mean of all: their error is .003 of the spread
DRIFT_ROWS_MIN = 20  # of each side: the mean of fewer pictures says more about them than about where they come from


@dataclass(frozen=True, slots=True)
class Neighbours:
    row: int  # of index.h5
    nearest: list[tuple[int, float]]  # rows of index.h5 and cosines, best first, without `row` itself


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the centre of tonight's pictures lies from that of all others, in units of the others' spread."""

    distance: float
    by_chance: float  # what as many pictures drawn at random would have
    rows: int  # of tonight's that were looked at

    def words(self) -> str:
        if self.distance < 2 * self.by_chance:
            return "Tonight's pictures are of the same kind as those before: a random pick would look no different."
        if self.distance < 0.3:
            return "Tonight's pictures differ a little from those before."
        if self.distance < 0.7:
            return "Tonight's pictures clearly differ from those before: another subject, season or camera."
        return "Tonight's pictures are nothing like those before: a new subject, or something wrong with the source."


@dataclass(frozen=True, slots=True)
class Looks:
    rows: int  # of the generation
    searched: int
    asked: int  # new pictures whose neighbours were looked for
    near_duplicates: int  # of them
    samples: list[Neighbours]
    drift: Drift | None
    no_drift: str  # then, why


def look(generation: Generation, new_ids: Sequence[int], new_rows: int) -> Looks:
    """`new_ids` is a sample of the inputs embedded tonight, `new_rows` how many there were."""
    rows = generation.rows_of(np.array(new_ids, np.int64))
    rows = rows[rows >= 0]
    emb_new = generation.vectors(rows)
    asked = _evenly(len(rows), min(QUERIES_MAX, max(SHOWN, COSINES // max(1, generation.rows))))
    near = _Nearest(rows[asked], emb_new[asked])
    total_d, summed, searched = np.zeros(generation.dim), 0, 0
    for piece_rows, emb_nd in _pieces(generation):
        near.add(piece_rows, emb_nd)
        live = np.flatnonzero(piece_rows >= 0)
        searched += len(live)
        spread = live[:: math.ceil(generation.rows / MEAN_ROWS)]
        total_d += emb_nd[spread].sum(axis=0, dtype=np.float32)
        summed += len(spread)
    drift, no_drift = _drift(emb_new, new_rows, total_d / max(1, summed), generation.rows)
    return Looks(
        generation.rows, searched, len(asked), int(np.count_nonzero(near.scores[:, 0] > NEAR_DUPLICATE_COSINE)),
        [near.answer(at) for at in _evenly(len(asked), SHOWN)], drift, no_drift,
    )  # fmt: skip


def _evenly(count: int, wanted: int) -> npt.NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


def _pieces(generation: Generation) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float16]]]:
    """Rows of index.h5 (-1 where dead) and vectors, a stretch at a time."""
    step, number = math.ceil(generation.rows / SEARCH_ROWS), 0
    for block in generation.blocks():
        index_rows = block.index_rows
        for first in range(0, len(index_rows), PIECE_ROWS):
            if number % step == 0:
                yield index_rows[first : first + PIECE_ROWS], block.emb_nd[first : first + PIECE_ROWS]
            number += 1


class _Nearest:
    """The best NEAREST rows for each query so far."""

    def __init__(self, query_rows: npt.NDArray[np.int64], query_nd: npt.NDArray[np.float16]) -> None:
        self.query_rows, self.query_nd = query_rows, query_nd
        self.rows = np.full((len(query_rows), NEAREST), -1, np.int64)
        self.scores = np.full((len(query_rows), NEAREST), -np.inf, np.float32)

    def add(self, piece_rows: npt.NDArray[np.int64], emb_nd: npt.NDArray[np.float16]) -> None:
        if not len(self.query_rows):
            return
        # The other way round it takes 1.4 times as long.
        scores = np.asarray(numkong.cdist(emb_nd, self.query_nd, "inner"), np.float32).T
        scores[:, piece_rows < 0] = -np.inf
        scores[self.query_rows[:, None] == piece_rows[None]] = -np.inf  # itself
        best = np.argpartition(-scores, min(NEAREST, scores.shape[1]) - 1, axis=1)[:, :NEAREST]
        rows = np.concatenate([self.rows, piece_rows[best]], axis=1)
        found = np.concatenate([self.scores, np.take_along_axis(scores, best, axis=1)], axis=1)
        keep = np.argsort(-found, axis=1, kind="stable")[:, :NEAREST]
        self.rows, self.scores = np.take_along_axis(rows, keep, axis=1), np.take_along_axis(found, keep, axis=1)

    def answer(self, at: int) -> Neighbours:
        pairs = zip(self.rows[at].tolist(), self.scores[at].tolist(), strict=True)
        return Neighbours(int(self.query_rows[at]), [(row, score) for row, score in pairs if np.isfinite(score)])


def _drift(
    emb_new: npt.NDArray[np.float16], new_rows: int, mean_d: npt.NDArray[np.float64], rows: int
) -> tuple[Drift | None, str]:
    others = rows - new_rows
    if len(emb_new) < DRIFT_ROWS_MIN:
        return None, f"{len(emb_new)} new pictures are too few to speak of a drift; {DRIFT_ROWS_MIN} are needed."
    if others < DRIFT_ROWS_MIN:
        return None, "Tonight's pictures are all there is, so there is nothing they could differ from."
    new_d = emb_new.mean(axis=0, dtype=np.float64)
    others_d = (mean_d * rows - new_d * new_rows) / others
    spread = math.sqrt(max(1e-12, 1 - float(others_d @ others_d)))  # vectors have unit norm
    by_chance = math.sqrt(1 / len(emb_new) + 1 / others)
    return Drift(float(np.linalg.norm(new_d - others_d)) / spread, by_chance, len(emb_new)), ""
