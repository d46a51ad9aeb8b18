"""What a generation has to be found: the keys of its rows, and which of them are in a list already.

    generations/<n>/ann.npy    (2, rows) uint64: keys of all live rows, ascending, and their rows in index.h5

Rows are up to 100 million, so nothing here is held for each of them but two bytes, and 20 for the moment in which keys
are sorted: the map is read as a file, and everything else goes through memory some thousand rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from pipeline.store.files import sync
from pipeline.store.lists import Keys, content_keys
from pipeline.store.scan import Rows

PIECE = 1 << 17  # keys looked at together
ROW_BITS = np.uint64(32)  # more than any index has: two numbers of rows fit into one of uint64


def key_order(index: Path) -> tuple[Keys, Rows]:
    """(n,) keys of the rows of this index.h5, and (n,) the rows by ascending keys, equal ones in their own order."""
    with h5py.File(index, "r", locking=False) as file:
        hashes = file["content_hash"]
        keys_n = np.empty(len(hashes), np.uint64)
        for part in pieces(len(keys_n)):
            keys_n[part] = content_keys(hashes[part])
    return keys_n, np.argsort(keys_n, kind="stable")


def write_map(index: Path, path: Path) -> None:
    """The map of this index.h5, durably."""
    keys_n, order = key_order(index)
    with path.open("wb") as stream:
        # Not np.save, nor tofile: of a full disk numpy does not notice where it comes with the last 4 KB.
        header = {"descr": "<u8", "fortran_order": False, "shape": (2, len(order))}
        np.lib.format.write_array_header_1_0(stream, header)
        for part in pieces(len(order)):
            stream.write(keys_n[order[part]].data)
        stream.write(order.data)
    sync(path)


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What there is to be found, each content once: of the rows that have a key, the first speaks for all of them."""

    keys: Keys  # (n,) of the map: ascending, repeated where several rows have one
    rows: npt.NDArray[np.uint64]  # (n,) of the map
    is_first: npt.NDArray[np.bool_]  # (n,) of its key
    covered: npt.NDArray[np.bool_]  # (n,) whether it is in a list; of the first of its key, others lag behind

    @classmethod
    def of(cls, map_2n: Keys) -> Contents:
        keys, rows = map_2n
        is_first = np.ones(len(keys), np.bool_)
        np.not_equal(keys[1:], keys[:-1], out=is_first[1:])
        return cls(keys, rows, is_first, np.zeros(len(keys), np.bool_))

    def uncovered(self) -> Contents:
        """The same, and nothing of it is in a list."""
        return replace(self, covered=np.zeros(len(self.keys), np.bool_))

    def __len__(self) -> int:
        return int(np.count_nonzero(self.is_first))

    def rows_of(self, numbers: Rows) -> Rows:
        """The first row of the n-th content, for these n."""
        found = np.empty(len(numbers), np.int64)
        before = 0
        for part in pieces(len(self.keys)):
            at = part.start + np.flatnonzero(self.is_first[part])
            mine = np.flatnonzero((numbers >= before) & (numbers < before + len(at)))
            found[mine] = self.rows[at[numbers[mine] - before]]
            before += len(at)
        return found

    def cover(self, held: Keys) -> npt.NDArray[np.bool_]:
        """Which of these entries of a file are of contents that no file before it has. Now they are covered."""
        before = self.covered.copy()  # a file has each content several times
        live = np.empty(len(held), np.bool_)
        for part in pieces(len(held)):
            at = np.minimum(np.searchsorted(self.keys, held[part]), len(self.keys) - 1)
            live[part] = (self.keys[at] == held[part]) & ~before[at]
            self.covered[at[live[part]]] = True
        return live

    def todo(self) -> Rows:
        """Positions of what is in no list, in the order of their rows: so what is left of it is one stretch."""
        at = np.flatnonzero(self.is_first & ~self.covered)
        by_row = self.rows[at]
        by_row <<= ROW_BITS
        by_row |= at.view(np.uint64)
        del at
        by_row.sort()
        by_row &= (np.uint64(1) << ROW_BITS) - np.uint64(1)
        return by_row.view(np.int64)

    @property
    def new(self) -> int:
        """Contents that are in no list."""
        return int(np.count_nonzero(self.is_first & ~self.covered))

    @property
    def tail(self) -> int:
        """Rows that are in no list."""
        self._follow()
        return len(self.covered) - int(np.count_nonzero(self.covered))

    def tail_rows(self) -> Rows:
        """Ascending."""
        self._follow()
        return np.sort(self.rows[~self.covered].view(np.int64))

    def _follow(self) -> None:
        """What repeats a key is covered where the first of it is."""
        first = 0
        for part in pieces(len(self.keys)):
            first_of = np.where(self.is_first[part], np.arange(part.start, part.stop), first)
            np.maximum.accumulate(first_of, out=first_of)
            self.covered[part] = self.covered[first_of]
            first = int(first_of[-1])


def pieces(count: int) -> Iterator[slice]:
    for first in range(0, count, PIECE):
        yield slice(first, min(first + PIECE, count))
