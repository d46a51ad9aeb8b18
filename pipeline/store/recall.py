"""How many entries a search has to look at: recall and time of lists against exact search, on every publish.

Questions are vectors of the index. The fewest entries with which their answers are nearly whole are what readers look
at (`probed`); where that takes longer than an exact search, readers ask no lists.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np

from pipeline.store.lists import Lookup
from pipeline.store.scan import Query, Rows, Scan, Scores

Answer = TypeVar("Answer")

# A percent above what is promised: 48 queries are a sample, and what is stored is found more easily than what is asked
# from outside (.9875 and .975 were seen in one index of a million rows).
RECALL_K, RECALL_MIN, QUERIES = 10, 0.99, 48
TIMED = 3  # queries that tell what is faster, exact search or lists
PROBED, PROBED_STEP = 1024, 1.5  # entries the narrowest search that is tried looks at, and how the next ones widen


def measure(
    lookup: Lookup, scan: Scan, queries_qd: Query, first: int, out_of_time: Callable[[], bool]
) -> tuple[dict[str, Any], bool]:
    """The narrowest search, from `first` entries on, that finds enough of the k best by distance (ties count as found),
    what it takes, and whether the question is settled: time may be over before. Lists slower than exact search are not
    asked by readers, so they are not widened."""
    # One more, for the query itself is stored; two kernels round differently.
    wanted = scan.kth_scores(queries_qd, RECALL_K + 1) - 1e-5
    exact_ms = float(np.median([_timed(partial(scan.nearest, query, RECALL_K))[1] for query in queries_qd[:TIMED]]))
    tails: list[tuple[tuple[Rows, Scores], float]] = []  # found once, whatever is probed: a large tail is a scan
    for probed in itertools.count():
        lookup.probed = int(first * PROBED_STEP**probed)
        found: list[float] = []
        ann_ms: list[float] = []
        for number, (query, worst) in enumerate(zip(queries_qd, wanted, strict=True)):
            if number == len(tails):
                tails.append(_timed(partial(lookup.tail, query, RECALL_K + 1)))
            tail, tail_ms = tails[number]
            if number < TIMED:  # what comes from the disk once says nothing of the day that follows
                lookup.nearest(query, RECALL_K + 1, tail)
            answer, ms = _timed(partial(lookup.nearest, query, RECALL_K + 1, tail))
            ann_ms.append(ms + tail_ms)
            scores = scan.nearest(query, RECALL_K + 1)[1] if answer is None else answer[1]
            found.append(min(int(np.count_nonzero(scores >= worst)) - 1, RECALL_K) / RECALL_K)
            slow = len(found) >= TIMED and not _pays(float(np.median(ann_ms)), exact_ms)
            if slow:
                break
        recall = float(np.mean(found))
        settled = slow or recall >= RECALL_MIN or lookup.probed >= lookup.entries
        if settled or out_of_time():
            break
    return {
        "probed": lookup.probed,
        "recall": round(recall, 4),
        "recall_k": RECALL_K,
        "queries": len(found),
        "ann_ms": round(float(np.median(ann_ms)), 3),
        "exact_ms": round(exact_ms, 3),
    }, settled


def _pays(ann_ms: float, exact_ms: float) -> bool:
    return ann_ms < exact_ms


def _timed(ask: Callable[[], Answer]) -> tuple[Answer, float]:
    """What it answers, and in how many milliseconds."""
    start_s = time.perf_counter()
    answer = ask()
    return answer, 1000 * (time.perf_counter() - start_s)
