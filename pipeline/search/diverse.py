"""Answers that do not repeat themselves: near-duplicates under one head, and an order that prefers what is new.

Both look at the best `POOL` rows of an answer and order them once, whatever page is asked for: pages never overlap.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.store.scan import Scores

POOL = 1_000
NEAR_DUPLICATE_COSINE = 0.99  # a re-encoded or resized copy, as the report of a night counts them


def near_duplicates(emb_nd: npt.NDArray[np.float16]) -> list[list[int]]:
    """Positions of pictures that show the same, in groups; the vectors are those of an answer, best first.

    The best of a group comes first; every other one has at least `NEAR_DUPLICATE_COSINE` with that head.
    """
    cosines_nn = _cosines(emb_nd)
    groups: dict[int, list[int]] = {}  # by their heads
    is_head = np.zeros(len(emb_nd), np.bool_)
    for position, cosines in enumerate(cosines_nn):
        near = np.flatnonzero(is_head & (cosines >= NEAR_DUPLICATE_COSINE))
        if len(near):
            groups[int(near[cosines[near].argmax()])].append(position)
        else:
            is_head[position] = True
            groups[position] = [position]
    return list(groups.values())


def marginal_relevance(emb_nd: npt.NDArray[np.float16], scores: Scores, weight: float, count: int) -> list[int]:
    """Positions of the first `count` answers, each the best by weight * score - (1 - weight) * nearest so far.

    `weight` 1 is the plain order, 0 looks at variety alone. Scores and cosines between answers are stretched to 0..1
    over the pool first: a text has .3 with its best picture, two pictures .8 with each other, and one weight shall
    mean the same for both.
    """
    if not len(scores):
        return []
    cosines_nn = _cosines(emb_nd)
    value = weight * _stretched(scores, float(scores.min()), float(scores.max()))
    likeness_nn = _stretched(cosines_nn, float(cosines_nn.min()), 1.0)
    nearest = np.zeros(len(scores), np.float32)
    chosen: list[int] = []
    for _ in range(min(count, len(scores))):
        gain = value - (1 - weight) * nearest
        gain[chosen] = -np.inf
        chosen.append(int(gain.argmax()))  # of equals the first, which is the better one
        nearest = np.maximum(nearest, likeness_nn[chosen[-1]])
    return chosen


def _cosines(emb_nd: npt.NDArray[np.float16]) -> Scores:
    wide = emb_nd.astype(np.float32)
    return wide @ wide.T


def _stretched(values: Scores, low: float, high: float) -> Scores:
    stretched: Scores = (values - low) / max(high - low, 1e-6)
    return stretched
