"""How much smaller vectors may be: bytes a row, milliseconds a scan and what share of the right answers is left.

Over the vectors of an index that is there (at most `ROWS_MAX`, drawn once): float16 as stored, one byte or one bit a
dimension, and the first half, quarter and eighth of the dimensions. Models that were trained for it (Matryoshka) lose
little by such a slice, others more than their share: the table says which kind this one is. Questions are rows of the
index, each without itself. Recall is by score against exact float16 search, alone and after the best `RERANK` were
scored again from float16, for which those have to be kept, too, if only on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numkong
import numpy as np
import numpy.typing as npt

from pipeline.bench.processes import Limit
from pipeline.search.index import Index

ROWS_MAX, QUERIES, RECALL_K, RERANK = 200_000, 200, 10, 100
ROUNDING = 1e-5  # of kernels that add in another order

Vectors = npt.NDArray[Any]


class Form(NamedTuple):
    name: str
    rows_nd: Vectors
    nearness: Callable[[Vectors, Vectors], npt.NDArray[np.float64]]  # (n, d), (1, d) -> (n,), higher is nearer

    @property
    def bytes_a_row(self) -> int:
        return int(self.rows_nd.itemsize * self.rows_nd.shape[1])


def forms(emb_nd: npt.NDArray[np.float16]) -> Iterator[Form]:
    yield Form("f16", emb_nd, _inner)
    wide = emb_nd.astype(np.float32)
    yield Form("i8", np.round(wide * (127 / np.abs(wide).max())).astype(np.int8), _inner)
    yield Form("b1", np.packbits(wide > 0, axis=1), _same_bits)
    for share in (2, 4, 8):
        part = wide[:, : wide.shape[1] // share]
        unit = part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-6)
        yield Form(f"f16, first {part.shape[1]}", unit.astype(np.float16), _inner)


def _inner(rows_nd: Vectors, query_1d: Vectors) -> npt.NDArray[np.float64]:
    return np.asarray(numkong.cdist(rows_nd, query_1d, "inner"))[:, 0]


def _same_bits(rows_nd: Vectors, query_1d: Vectors) -> npt.NDArray[np.float64]:
    return -np.asarray(numkong.cdist(rows_nd, query_1d, "hamming", dtype="uint1"))[:, 0].astype(np.float64)


def size(index: Path, limit: Limit) -> Iterator[dict[str, Any]]:
    """What is measured so far: one row per form, the smallest ones last."""
    rng = np.random.default_rng(0)
    with Index.open(index, exact=True) as opened:
        rows = opened.generation.rows
        kept = np.sort(rng.choice(rows, min(rows, ROWS_MAX), replace=False))
        emb_nd = opened.vectors(kept)
    asked = rng.choice(len(emb_nd), min(QUERIES, len(emb_nd)), replace=False)
    exact_qn = emb_nd[asked].astype(np.float32) @ emb_nd.T.astype(np.float32)
    exact_qn[np.arange(len(asked)), asked] = -np.inf  # the question itself
    k = min(RECALL_K, len(emb_nd) - 1)
    worst_q = np.partition(exact_qn, -k, axis=1)[:, -k] - ROUNDING
    told: list[dict[str, Any]] = []
    for form in forms(emb_nd):
        if told and limit.left_s <= 0:
            return
        told.append(_measured(form, asked, exact_qn, worst_q, k))
        yield {"rows": len(emb_nd), "dim": emb_nd.shape[1], "questions": len(asked), "forms": told}


def _measured(
    form: Form, asked: npt.NDArray[np.int64], exact_qn: npt.NDArray[np.float32],
    worst_q: npt.NDArray[np.float32], k: int,
) -> dict[str, Any]:  # fmt: skip
    took_ms, alone, again = [], [], []
    for query, exact, worst in zip(asked, exact_qn, worst_q, strict=True):
        start_s = time.perf_counter()
        nearness = form.nearness(form.rows_nd, form.rows_nd[query : query + 1])
        took_ms.append(1000 * (time.perf_counter() - start_s))
        nearness[query] = -np.inf
        best = np.argsort(-nearness, kind="stable")[: max(RERANK, k)]
        alone.append(np.count_nonzero(exact[best[:k]] >= worst) / k)
        again.append(np.count_nonzero(np.sort(exact[best])[-k:] >= worst) / k)
    return {
        "form": form.name, "bytes a row": form.bytes_a_row, "ms a scan": round(float(np.median(took_ms)), 3),
        f"recall@{RECALL_K}": round(float(np.mean(alone)), 4),
        f"after re-rank of {RERANK}": round(float(np.mean(again)), 4),
    }  # fmt: skip
