"""Writes files of lists: new rows, and what lives of older files, list after list.

An entry costs some 20 bytes of memory while its file is written: the list it goes to, its place in the order.
Everything else passes through memory some thousand entries at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.store.centroids import ListNumbers
from pipeline.store.files import commit_file, digest_file, temporary
from pipeline.store.hdf5 import new_h5
from pipeline.store.lists import Codes, Keys, ListFile, Lists, OwnFile, encode
from pipeline.store.scan import Rows, Scan, Scores
from pipeline.store.shards import PIECE_ROWS, Vectors

FOLDER = "ann"


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """A file of lists, and which of its entries are of what this generation has and no file before it."""

    file: ListFile
    lists: Lists
    is_live: npt.NDArray[np.bool_]
    live: int


@dataclass(frozen=True, slots=True)
class Source:
    """Entries that go into a new file."""

    list_of: ListNumbers  # of each
    keys: Callable[[Rows], Keys]  # of these entries
    codes: Callable[[Rows], tuple[Codes, Scores]]


def written_before(file: Written) -> Source:
    """What lives of a file, in its order."""
    lists, live = file.lists, np.flatnonzero(file.is_live)
    return Source(
        lists.list_of[live],
        lambda at: lists.keys[live[at]],
        lambda at: (lists.codes_nd[live[at]], lists.scales[live[at]]),
    )


def new_rows(scan: Scan, keys: Keys, rows: Rows, list_of: ListNumbers, centroids_ld: Vectors) -> Source:
    """Rows that are in no file yet; `list_of` (n, lists of each)."""
    each, lists = list_of.shape[1], list_of.ravel()

    def codes(at: Rows) -> tuple[Codes, Scores]:
        centroids_nd = centroids_ld[lists[at]].astype(np.float32)
        return encode(scan.gather(rows[at // each]).astype(np.float32) - centroids_nd)

    return Source(lists, lambda at: keys[at // each], codes)


def write_lists(out: Path, path: Path, shape_ld: tuple[int, ...], sources: Sequence[Source]) -> Written:
    """One file of all sources, for so many lists of vectors of this length."""
    lists, dim = shape_ld
    list_of = np.concatenate([source.list_of for source in sources])
    counts = np.bincount(list_of, minlength=lists)
    order = np.argsort(list_of, kind="stable")
    del list_of
    with new_h5(temporary(path)) as (file, check):
        file.create_dataset("starts", data=np.cumsum([0, *counts]), dtype="<i8")
        all_keys = file.create_dataset("keys", (len(order),), "<u8")
        for part, shares in _shares(order, sources):
            keys = np.empty(part.stop - part.start, np.uint64)
            for source, mine, at in shares:
                keys[mine] = source.keys(at)
            all_keys[part] = keys
            check()
        all_codes = file.create_dataset("codes", (len(order), dim), "i1")
        all_scales = file.create_dataset("scales", (len(order),), "<f4")
        for part, shares in _shares(order, sources):
            rows = part.stop - part.start
            codes_nd, scales = np.empty((rows, dim), np.int8), np.empty(rows, np.float32)
            for source, mine, at in shares:
                codes_nd[mine], scales[mine] = source.codes(at)
            all_codes[part], all_scales[part] = codes_nd, scales
            check()
    own = ListFile(len(order), commit(path))
    return Written(own, Lists.open(out / own.file.name, shape_ld), np.ones(len(order), np.bool_), len(order))


def _shares(order: Rows, sources: Sequence[Source]) -> Iterator[tuple[slice, list[tuple[Source, Rows, Rows]]]]:
    """Some thousand entries at a time: of each source which of them, and where these are in it."""
    stops = np.cumsum([len(source.list_of) for source in sources])
    for first in range(0, len(order), PIECE_ROWS):
        part = slice(first, min(first + PIECE_ROWS, len(order)))
        source_of = np.searchsorted(stops, order[part], "right")
        shares = []
        for number, source in enumerate(sources):
            mine = np.flatnonzero(source_of == number)
            shares.append((source, mine, order[part][mine] - (stops[number] - len(source.list_of))))
        yield part, shares


def commit(path: Path) -> OwnFile:
    """Give `temporary(path)` its name; what generation.json remembers of it."""
    draft = temporary(path)
    own = OwnFile(f"{FOLDER}/{path.name}", draft.stat().st_size, digest_file(draft))
    commit_file(path)
    return own
