"""Answers that do not repeat themselves: near-duplicates under one head, and an order that prefers what is new.

Both look at the best `POOL` rows of an answer and order them once, whatever page is asked for: pages never overlap.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.store.scan import Scores

POOL = 1_000
NEAR_DUPLICATE_COSINE = 0.97  # a re-encoded, resized or slightly cropped copy; other pictures of one thing are below


def near_duplicates(emb_nd: npt.NDArray[np.float16]) -> list[list[int]]:
    """Positions of pictures that show the same, in groups; the vectors are those of an answer, best first.

    The best of a group comes first; every other one has at least `NEAR_DUPLICATE_COSINE` with that head.
    """
    wide = emb_nd.astype(np.float32)
    heads = np.empty_like(wide)
    groups: list[list[int]] = []
    for position, vector in enumerate(wide):
        cosines = heads[: len(groups)] @ vector
        if len(groups) and cosines.max() >= NEAR_DUPLICATE_COSINE:
            groups[int(cosines.argmax())].append(position)
        else:
            heads[len(groups)] = vector
            groups.append([position])
    return groups


def marginal_relevance(emb_nd: npt.NDArray[np.float16], scores: Scores, weight: float, count: int) -> list[int]:
    """Positions of the first `count` answers, each the best by weight * score - (1 - weight) * nearest so far.

    `weight` 1 is the plain order, 0 looks at variety alone. Scores and cosines between answers are stretched to 0..1
    over the pool first: a text has .3 with its best picture, two pictures .8 with each other, and one weight shall
    mean the same for both.
    """
    if not len(scores):
        return []
    wide = emb_nd.astype(np.float32)
    value = weight * _stretched(scores, float(scores.min()), float(scores.max()))
    lowest = float((wide @ wide.T).min())
    nearest = np.zeros(len(wide), np.float32)
    chosen: list[int] = []
    for _ in range(min(count, len(wide))):
        gain = value - (1 - weight) * nearest
        gain[chosen] = -np.inf
        chosen.append(int(gain.argmax()))  # of equals the first, which is the better one
        nearest = np.maximum(nearest, _stretched(wide @ wide[chosen[-1]], lowest, 1.0))
    return chosen


def _stretched(values: Scores, low: float, high: float) -> Scores:
    stretched: Scores = (values - low) / max(high - low, 1e-6)
    return stretched
