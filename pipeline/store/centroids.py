"""Centroids for inverted lists, and which lists a vector stands in.

Training is k-means by cosine: Lloyd's rounds over a sample, centroids of unit norm (Dhillon and Modha 2001). A vector
stands in two lists, as SOAR has it (Sun et al. 2023, https://arxiv.org/abs/2404.00774): the second one is near too, and
what it lacks of the vector is not in the direction of what the first one lacks. A question that does not see the first
list may see the second: half as many entries are looked at for the same recall.

All of it is matrix products in float32, which BLAS does on every core: a million rows of d = 512 and their 4,000
centroids take 6 TFLOP to train and 8 to sort in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from pipeline.store.shards import Vectors

PER_ROOT, LISTS_MAX = 4, 16_384  # lists are four times the square root of the rows, as Faiss advises, up to a cost
SAMPLE_PER_LIST, SAMPLE_MAX = 40, 1 << 18  # rows
ROUNDS = 8
LISTS_EACH, ORTHOGONALITY = 2, 1.0  # that a vector stands in; lambda of SOAR
SCORE_BYTES = 64 << 20  # of the products at one time
SUM_ROWS = 16_384  # added up at once: 32 MB at d = 512

ListNumbers = npt.NDArray[np.uint16]


def sizes(rows: int) -> tuple[int, int]:
    """How many lists so many rows have, and how many of the rows tell where."""
    lists = min(rows, LISTS_MAX, int(PER_ROOT * rows**0.5))
    return lists, min(rows, lists * SAMPLE_PER_LIST, SAMPLE_MAX)


def train(sample_nd: Vectors, lists: int, rng: np.random.Generator, out_of_time: Callable[[], bool]) -> Vectors:
    """(l, d) centroids of a sample. Time that is over ends the rounds: less well placed ones are centroids, too."""
    size = len(sample_nd)
    centroids_ld = sample_nd[rng.choice(size, lists, replace=False)]
    for _ in range(ROUNDS):
        if out_of_time():
            break
        list_of = nearest_centroid(sample_nd, centroids_ld)
        sums_ld = np.zeros(centroids_ld.shape, np.float32)
        for first in range(0, size, SUM_ROWS):
            part = list_of[first : first + SUM_ROWS]
            order = np.argsort(part, kind="stable")
            there, starts = np.unique(part[order], return_index=True)
            wide_nd = sample_nd[first : first + SUM_ROWS][order].astype(np.float32)
            sums_ld[there] += np.add.reduceat(wide_nd, starts, axis=0)
        empty = np.flatnonzero(np.bincount(list_of, minlength=lists) == 0)
        sums_ld[empty] = sample_nd[rng.choice(size, len(empty), replace=False)]
        norms_l1 = np.linalg.norm(sums_ld, axis=1, keepdims=True)
        centroids_ld = (sums_ld / np.maximum(norms_l1, np.finfo(np.float32).tiny)).astype(np.float16)
    return centroids_ld


def nearest_centroid(emb_nd: Vectors, centroids_ld: Vectors) -> npt.NDArray[np.int64]:
    """(n,) the centroid with the largest inner product."""
    centroids_dl = centroids_ld.astype(np.float32).T
    parts = [np.argmax(part_nd @ centroids_dl, axis=1) for part_nd in _parts(emb_nd, len(centroids_ld))]
    return np.concatenate(parts)


def two_lists(emb_nd: Vectors, centroids_ld: Vectors) -> ListNumbers:
    """(n, 2) the nearest centroid, and the one with the smallest loss of SOAR; (n, 1) where there is one centroid."""
    if len(centroids_ld) == 1:
        return np.zeros((len(emb_nd), 1), np.uint16)
    wide_ld = centroids_ld.astype(np.float32)
    found = []
    for part_nd in _parts(emb_nd, len(centroids_ld)):
        products_nl = part_nd @ wide_ld.T
        first = np.argmax(products_nl, axis=1)
        lacks_nd = part_nd - wide_ld[first]
        lacks_nd /= np.maximum(np.linalg.norm(lacks_nd, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        # |x - c|^2 + lambda (r . (x - c))^2 for unit vectors, r the direction of what the first centroid lacks.
        along_nl = np.einsum("nd,nd->n", lacks_nd, part_nd)[:, None] - lacks_nd @ wide_ld.T
        loss_nl = np.square(along_nl, out=along_nl)
        loss_nl *= ORTHOGONALITY
        loss_nl -= 2 * products_nl
        loss_nl[np.arange(len(first)), first] = np.inf
        found.append(np.stack([first, np.argmin(loss_nl, axis=1)], axis=1).astype(np.uint16))
    return np.concatenate(found)


def _parts(emb_nd: Vectors, lists: int) -> Iterator[npt.NDArray[np.float32]]:
    """Rows in float32, so many that their products with the centroids fit."""
    step = max(1, SCORE_BYTES // (4 * lists))
    for first in range(0, len(emb_nd), step):
        yield emb_nd[first : first + step].astype(np.float32)
