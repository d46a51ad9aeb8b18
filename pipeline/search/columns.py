"""The columns of index.h5 as filters need them: read from top to bottom, kept small, never all keys at once.

index.h5 keeps texts one by one, so a column of a million rows takes 0.9 s to read. One of at most 65,536 different
values is read once and kept as two bytes a row, dates as four; other columns and keys are read again for every new
question.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.search.query import QueryError
from pipeline.store import Generation

Mask: TypeAlias = npt.NDArray[np.bool_]
Days: TypeAlias = npt.NDArray[np.int32]

CODES_MAX = 1 << 16
FACET_SAMPLE_ROWS = 512
_DAY = r"^(\d{4})[-/:]?(\d{2})[-/:]?(\d{2})(\D.*)?$"  # 2019-06-30, 2019:06:30 12:00:00, 20190630T1200


@dataclass(frozen=True)
class Coded:
    """A column of texts: which of `values` each row has. "" stands for none."""

    values: list[str]
    codes: npt.NDArray[np.uint16]

    @cached_property
    def folded(self) -> dict[str, list[int]]:
        """Codes by their value without case and without repeated spaces."""
        codes: dict[str, list[int]] = {}
        for code, value in enumerate(self.values):
            codes.setdefault(fold(value), []).append(code)
        return codes

    def equal(self, name: str) -> Mask:
        allowed = np.zeros(len(self.values), np.bool_)
        allowed[self.folded.get(fold(name), [])] = True
        passing: Mask = allowed[self.codes]
        return passing

    def counts(self, allowed_n: Mask | None) -> Counter[str]:
        """How many rows have each value that is there."""
        counts = np.bincount(self.codes if allowed_n is None else self.codes[allowed_n], minlength=len(self.values))
        return Counter({self.values[code]: int(counts[code]) for code in np.flatnonzero(counts) if self.values[code]})


def fold(name: str) -> str:
    return " ".join(name.casefold().split())


class Columns:
    """Of one generation; safe to share among threads, of which one reads at a time."""

    def __init__(self, generation: Generation) -> None:
        self._generation, self._lock = generation, threading.RLock()
        self._columns = generation.metadata_columns
        self._coded: dict[str, Coded | None] = {}
        self._days: dict[str, Days] = {}

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    def kind(self, name: str) -> str:
        """text, integer or real.

        Raises:
            QueryError: there is no such column.
        """
        return self._column(name)[0]

    def coded(self, name: str) -> Coded | None:
        """A column of texts; None where it has more than 65,536 different values.

        Raises:
            QueryError: there is no such column, or it holds numbers.
        """
        kind, path = self._column(name)
        if kind != "text":
            raise QueryError(
                f"the column {name!r} holds numbers ({kind}), and this needs one of texts: {self._texts()}"
            )
        with self._lock:
            if name not in self._coded:
                self._coded[name] = _encode(self._generation.column(path))
            return self._coded[name]

    def equal(self, name: str, value: str) -> Mask:
        """(rows,) where this column has this value, without case; numbers are compared as numbers."""
        kind, path = self._column(name)
        if kind != "text":
            try:
                number = float(value)
            except ValueError:
                raise QueryError(f"the column {name!r} holds numbers ({kind}); {value!r} is none") from None
            return self._each(path, lambda piece: piece == number)
        coded = self.coded(name)
        if coded is not None:
            return coded.equal(value)
        wanted = " ".join(value.lower().split())
        return self._each(path, lambda piece: pc.equal(pc.utf8_lower(_texts(piece)), wanted))

    def like(self, pattern: str) -> Mask:
        """(rows,) whose key fits the pattern: `*` stands for anything, slashes too, `?` for one character."""
        like = pattern.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_").replace("*", "%").replace("?", "_")
        return self._each("key", lambda piece: pc.match_like(_texts(piece), like))

    def between(self, name: str, low: float, high: float) -> Mask:
        """(rows,) whose number lies there, the ends included; a row without one does not."""
        kind, path = self._column(name)
        if kind == "text":
            raise QueryError(f"the column {name!r} holds texts, and this needs numbers")
        return self._each(path, lambda piece: (piece >= low) & (piece <= high))

    def days(self, name: str) -> Days:
        """(rows,) dates as the number 20190630, 0 where there is none."""
        kind, path = self._column(name)
        if kind != "text":
            raise QueryError(f"the column {name!r} holds numbers ({kind}); expected dates as texts such as 2019-06-30")
        with self._lock:
            if name not in self._days:
                self._days[name] = np.concatenate([np.empty(0, np.int32), *map(_days, self._generation.column(path))])
            return self._days[name]

    def row_of_key(self, key: str) -> int:
        """The first row of this key; looked for from the top.

        Raises:
            QueryError: there is none.
        """
        wanted, first = key.encode(), 0
        for piece in self._generation.column("key"):
            if len(found := np.flatnonzero(piece == wanted)):
                return first + int(found[0])
            first += len(piece)
        raise QueryError(f"no picture has the key {key!r}; keys are written as answers show them, and case counts")

    @cached_property
    def facets(self) -> list[str]:
        """Columns that are worth a list to choose from: texts with several values that rows share, by a sample."""
        rows = np.unique(np.linspace(0, max(self._generation.rows - 1, 0), FACET_SAMPLE_ROWS).astype(np.int64))
        sample = self._generation.metadata(rows[: self._generation.rows])
        found = []
        for name, (kind, _) in self._columns.items():
            values = [values[name] for values in sample if name in values]
            if kind == "text" and 2 <= len(set(values)) <= len(values) / 2:
                found.append(name)
        return found

    def _each(self, path: str, passes: Callable[[npt.NDArray[Any]], Any]) -> Mask:
        with self._lock:
            pieces = [np.asarray(passes(piece)).astype(np.bool_) for piece in self._generation.column(path)]
        return np.concatenate([np.empty(0, np.bool_), *pieces])

    def _column(self, name: str) -> tuple[str, str]:
        if name not in self._columns:
            raise QueryError(f"the index has no metadata column {name!r}; it has: {', '.join(self._columns) or 'none'}")
        return self._columns[name]

    def _texts(self) -> str:
        return ", ".join(name for name, (kind, _) in self._columns.items() if kind == "text") or "none"


def _texts(piece: npt.NDArray[Any]) -> Any:
    return pa.array(piece, pa.binary()).cast(pa.string(), safe=False)


def _encode(pieces: Iterator[npt.NDArray[Any]]) -> Coded | None:
    code_of: dict[bytes, int] = {}
    codes = [np.empty(0, np.uint16)]
    for piece in pieces:
        encoded = pa.array(piece, pa.binary()).dictionary_encode()
        known = [code_of.setdefault(value, len(code_of)) for value in encoded.dictionary.to_pylist()]
        if len(code_of) > CODES_MAX:
            return None
        codes.append(np.array(known, np.uint16)[encoded.indices.to_numpy()])
    return Coded([value.decode() for value in code_of], np.concatenate(codes))


def _days(piece: npt.NDArray[Any]) -> Days:
    texts = _texts(piece)
    digits = pc.replace_substring_regex(texts, _DAY, r"\1\2\3")
    dated = pc.if_else(pc.match_substring_regex(texts, _DAY), digits, "0")
    days: Days = np.asarray(pc.cast(dated, pa.int32()))
    return days
