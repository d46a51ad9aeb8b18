"""Rows of index.h5 that hold a vector themselves: bit by bit that of the same content in the data files.

A picture that lies under several keys is embedded once, and its first row is that of a data file; the others are copied
into index.h5 when it is published. What a data file holds is embedded again by `sample` and `full`; with this, so is
what readers see of every copy. Costs the reading of the contents of all rows, 16 bytes each, and of the copied vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.store import Generation
from pipeline.store.check import Health, few
from pipeline.store.check_shown import AGAIN
from pipeline.store.files import DIGEST_BYTES
from pipeline.store.scan import Rows

PIECE_ROWS = 65_536


def check_copies(out: Path, health: Health) -> None:
    """Of the generation that readers see, where nothing else is wrong with it."""
    number = health.generation
    if number is None or number in health.broken.generations:
        return
    name = f"generations/{number}/index.h5"
    count, wrong = 0, list[str]()
    with Generation.at(out, number) as generation:
        first_copy = next((block.first_row for block in generation.blocks() if block.name == name), generation.rows)
        originals = _originals(generation, first_copy)
        for first in range(0, len(originals), PIECE_ROWS):
            of = originals[first : first + PIECE_ROWS]
            rows = first_copy + first + np.arange(len(of))
            same = (generation.vectors(rows).view("<u2") == generation.vectors(of).view("<u2")).all(axis=1)
            off = rows[~same | (of < 0)].tolist()
            count, wrong = count + len(off), [*wrong, *(f"row {row} has another" for row in off)][:3]
    if count:
        health.broken.generations.add(number)
        health.broken.republish = True
        health.add("index out of step", name, "in every row the vector of its content", few(count, wrong), AGAIN)


def _originals(generation: Generation, first_copy: int) -> Rows:
    """(rows - first_copy,) per copy, the row before them that has the same content; -1 where none has."""
    if first_copy == generation.rows:
        return np.empty(0, np.int64)
    copies = np.concatenate([hashes[max(0, first_copy - first) :] for first, hashes in _contents(generation)])
    wanted, which = np.unique(copies, return_inverse=True)
    row_of = np.full(len(wanted), -1, np.int64)
    for first, hashes in _contents(generation):
        at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        here = np.flatnonzero((wanted[at] == hashes) & (first + np.arange(len(hashes)) < first_copy))
        row_of[at[here]] = first + here
    originals: Rows = row_of[which]
    return originals


def _contents(generation: Generation) -> Iterator[tuple[int, npt.NDArray[np.bytes_]]]:
    """First row and content hashes of each piece of the table; as values that can be compared."""
    first = 0
    for piece in generation.column("content_hash"):
        yield first, np.ascontiguousarray(piece).view(f"S{DIGEST_BYTES}").ravel()
        first += len(piece)
