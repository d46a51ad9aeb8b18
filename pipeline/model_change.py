"""A new model against the one that is shown: the same pictures asked for their nearest neighbours in both indexes.

Before an index changes its model, a person wants to know how different the answers will be, and whether they are
better. The first is the overlap of the nine nearest; the second, where pictures have labels, how often those nine share
the label of the picture that was asked about. Needs no engine: vectors of both models are in the store.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.store import Generation

QUERIES, NEAREST = 200, 9
SAMPLE_ROWS = (
    20_000  # pictures that are searched: the answers cost 200 x 20,000 cosines, whatever the size of the index
)


@dataclass(frozen=True)
class ModelChange:
    shown: str  # model of the generation that readers see
    new: str
    pictures: int  # drawn from those in both; every query is searched among them
    queries: int
    overlap: float  # share of the nine nearest that both models give
    same_label_shown: float | None  # share of the nine nearest with the query's label; None without labels
    same_label_new: float | None

    def words(self) -> str:
        """One line for a person."""
        words = (
            f"{self.shown} gives way to {self.new}: for {self.queries} pictures, {100 * self.overlap:.0f} % of the "
            "nine nearest are the same"
        )
        if self.same_label_shown is None or self.same_label_new is None:
            return words
        before, after = 9 * self.same_label_shown, 9 * self.same_label_new
        return f"{words}; of nine, {after:.1f} have the label of the picture, {before:.1f} had it before"


def compare_models(shown: Generation, new: Generation) -> ModelChange:
    """The same draw for the same two generations."""
    rng = np.random.default_rng((shown.number, new.number))
    rows_new = np.sort(rng.choice(new.rows, min(SAMPLE_ROWS, new.rows), replace=False)).astype(np.int64)
    rows_shown = shown.rows_of(new.ids(rows_new))
    both = rows_shown >= 0
    rows_new, rows_shown = rows_new[both], rows_shown[both]
    queries = rng.permutation(len(rows_new))[:QUERIES]
    near_shown = _nearest(shown.vectors(rows_shown), queries)
    near_new = _nearest(new.vectors(rows_new), queries)
    k = near_new.shape[1]
    common = [len(np.intersect1d(a, b)) for a, b in zip(near_shown, near_new, strict=True)]
    labels = np.array([str(values.get("label", "")) for values in new.metadata(rows_new)])
    return ModelChange(
        shown=shown.spec["model"], new=new.spec["model"], pictures=len(rows_new), queries=len(queries),
        overlap=float(np.sum(common)) / (k * len(queries)) if k and len(queries) else 1.0,
        same_label_shown=_same_label(labels, queries, near_shown),
        same_label_new=_same_label(labels, queries, near_new),
    )  # fmt: skip


def _nearest(emb_nd: npt.NDArray[np.float16], queries: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(queries, up to nine): positions of the nearest other rows."""
    scores = emb_nd[queries].astype(np.float32) @ emb_nd.astype(np.float32).T
    scores[np.arange(len(queries)), queries] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, : min(NEAREST, max(0, len(emb_nd) - 1))]


def _same_label(
    labels: npt.NDArray[np.str_], queries: npt.NDArray[np.int64], nearest: npt.NDArray[np.int64]
) -> float | None:
    asked = labels[queries] != ""
    if not asked.any() or not nearest.shape[1]:
        return None
    return float((labels[nearest[asked]] == labels[queries[asked]][:, None]).mean())
