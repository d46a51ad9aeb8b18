"""How far an answer stands out from the rest of the index, for the very question that was asked: 0 to 1.

A cosine means little by itself: texts reach .25 where pictures reach .8. So the question is also put to 4,096 rows of
the index, drawn once with a fixed seed. Their scores have a middle (the median) and a width (down to the 16th
percentile: below the middle there is hardly a right answer that could widen it; of a bell curve it is the standard
deviation). An answer that stands z = (score - middle) / width above the middle has the relevance

    1 / (1 + exp(-2 (z - 2)))            z = 0: .02   1: .12   1.5: .27   2: .50   2.5: .73   3: .88   4: .98

Scores count as their Fisher transform, artanh(cosine), here: it leaves the low cosines of texts as they are and
stretches those near 1, where pictures crowd. Without it a picture that is in the index did not stand out when it was
asked for itself: with a middle of .53 and a width of .32 (55 photos, B/32 shape) 1 is only 1.5 widths away.

So .5 is where one in 44 of a bell curve would lie. It rises with the score, is the same in every run over one
generation, and does not depend on filters or pages. With the demo model and 33 questions such as "a red circle" the
best nine have .92 on average, right pictures .80, wrong ones .08. It says that an answer stands out, not that the
question makes sense: of nonsense, too, some rows of a million are far out; and what a sixth of the index answers does
not stand out by much ("a ring": .4), nor does a picture of which half the index are copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipeline.store.scan import Query as Vector
from pipeline.store.scan import Rows, Scan, Scores, score

SAMPLE_ROWS = 4096
LOWER = 0.1587  # of a bell curve lies below middle - width
WIDTH_MIN = 1e-4  # cosines of float16 vectors are not known better,
COSINE_MAX = 1 - WIDTH_MIN  # nor whether they are 1
EVEN_Z, STEEPNESS = 2.0, 2.0  # where relevance is one half, and how fast it rises there


class Background:
    """4,096 rows of an index, or all of a small one, read for the first question: 4 MB at d = 512."""

    def __init__(self, scan: Scan) -> None:
        self._scan = scan

    @cached_property
    def _sample_nd(self) -> npt.NDArray[np.float16]:
        rows: Rows = np.arange(self._scan.rows)
        if self._scan.rows > SAMPLE_ROWS:
            rows = np.sort(np.random.default_rng(0).choice(self._scan.rows, SAMPLE_ROWS, replace=False))
        return self._scan.gather(rows)

    def spread(self, query_d: Vector) -> Spread:
        """What this question scores with pictures at large."""
        if not self._scan.rows:
            return Spread(0.0, 1.0)
        ascending = np.sort(stretched(score(self._sample_nd, query_d)))
        middle, low = _quantile(ascending, 0.5), _quantile(ascending, LOWER)
        return Spread(middle, max(middle - low, WIDTH_MIN))


def _quantile(ascending: npt.NDArray[np.float64], share: float) -> float:
    """As numpy's, linear between neighbours: two of 4,096 numbers take 25 us with their sort, numpy's 148."""
    at = share * (len(ascending) - 1)
    below, above = ascending[int(at)], ascending[math.ceil(at)]
    return float(below + (at - int(at)) * (above - below))


def stretched(scores: Scores) -> npt.NDArray[np.float64]:
    return np.arctanh(np.clip(scores.astype(np.float64), -COSINE_MAX, COSINE_MAX))


@dataclass(frozen=True)
class Spread:
    """Of stretched cosines."""

    middle: float
    width: float

    def relevance(self, scores: Scores) -> Scores:
        """(n,) 0 to 1 for (n,) cosines."""
        z = (stretched(scores) - self.middle) / self.width
        relevance: Scores = (0.5 + 0.5 * np.tanh(STEEPNESS / 2 * (z - EVEN_Z))).astype(np.float32)  # never overflows
        return relevance
