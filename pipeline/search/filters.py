"""Which rows may answer: by label, taxon, licence, date, place, key, or any column of the metadata.

    filters = Filters(generation)
    allowed_n = filters.mask(Where(taxon="Aves", date=("2019", "2020-06"), key="train_mini/*"))     # a boolean per row
    filters.facets(allowed_n, ["label", "license"])                      # what there is to choose from, with counts

Names are compared without case. A name that no row has is an error with the nearest ones, not an empty answer.
"""

from __future__ import annotations

import difflib
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.search.columns import Columns, Mask, fold
from pipeline.search.query import QueryError, UnknownName
from pipeline.search.where import EVERYTHING, Where, day_numbers
from pipeline.store import Generation

NAMED = ("label", "taxon", "licence", "date", "box")  # fields of `Where` that need columns
LICENCES = ("license", "licence")  # as columns are called
# The first one with something to choose from stands for all when choices are listed.
TAXA = ("supercategory", "class", "order", "family", "genus", "species", "common_name", "kingdom", "phylum")
MASKS_KEPT = 8  # a bit per row each: the pages of an answer ask for the same again
FACET_VALUES = 200
NAMES_SHOWN = 5


class Filters:
    """Of one generation; safe to share among threads."""

    def __init__(self, generation: Generation) -> None:
        self.columns, self._rows = Columns(generation), generation.rows
        self._masks: OrderedDict[Where, npt.NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()

    def mask(self, where: Where) -> Mask | None:
        """(rows,) which rows pass; None: all of them, because nothing is asked.

        Raises:
            QueryError: a column that is not there. UnknownName: a name that no row has, with the nearest ones.
        """
        if where == EVERYTHING:
            return None
        with self._lock:
            if where not in self._masks:
                self._masks[where] = np.packbits(np.logical_and.reduce(list(self._parts(where))))
                while len(self._masks) > MASKS_KEPT:
                    self._masks.popitem(last=False)
            self._masks.move_to_end(where)
            packed = self._masks[where]
        return np.unpackbits(packed, count=self._rows).view(np.bool_)

    def facets(
        self, allowed_n: Mask | None, fields: Sequence[str], values_max: int = FACET_VALUES
    ) -> dict[str, list[tuple[str, int]]]:
        """Per field: the values among the rows that pass (None: all) and their counts, the most frequent first. A
        field is a column, or `taxon` or `licence` for the column that has them.

        Raises:
            QueryError: a column that is not there, holds numbers, or has too many different values to count.
        """
        self._check(name for name in fields if name not in self.columns.names)
        found = {}
        for name in fields:
            coded = self.columns.coded(self._choices(name))
            if coded is None:
                raise QueryError(
                    f"the column {name!r} has too many values to list; there are: {', '.join(self.columns.facets)}"
                )
            counts = sorted(coded.counts(allowed_n).items(), key=lambda pair: (-pair[1], pair[0]))
            found[name] = counts[:values_max]
        return found

    @property
    def facet_fields(self) -> list[str]:
        """`label`, `taxon` and `licence`, where there is something to choose from."""
        return [name for name in ("label", "taxon", "licence") if self._choices(name) in self.columns.facets]

    @property
    def fields(self) -> list[str]:
        """Fields of `Where` that this index has columns for."""
        needs = {name: [self._columns_of(name)[0]] for name in ("label", "taxon", "licence", "date")}
        needs["box"] = ["latitude", "longitude"]
        return [name for name, columns in needs.items() if set(columns) <= set(self.columns.names)] + ["key"]

    def _check(self, fields: Iterable[str]) -> None:
        """
        Raises:
            QueryError: the index has no column for one of these fields.
        """
        if lacking := [name for name in fields if name in NAMED and name not in self.fields]:
            raise QueryError(
                f"the index has no column for the filter {lacking[0]!r}; it can be filtered by: "
                f"{', '.join(self.fields)}; its columns are: {', '.join(self.columns.names) or 'none'}"
            )

    def _columns_of(self, field: str) -> Sequence[str]:
        """The columns that a field looks at, of those that are there; the first one where none is."""
        columns = {"taxon": TAXA, "licence": LICENCES}.get(field, [field])
        return [column for column in columns if column in self.columns.names] or [columns[0]]

    def _choices(self, field: str) -> str:
        """The column whose values stand for a field in a list of choices."""
        columns = self._columns_of(field)
        return next((column for column in columns if column in self.columns.facets), columns[0])

    def _parts(self, where: Where) -> Iterator[Mask]:
        self._check(name for name in NAMED if getattr(where, name) is not None)
        if where.label is not None:
            yield self._named("label", where.label)
        if where.taxon is not None:
            yield self._named("taxon", where.taxon)
        if where.licence is not None:
            yield self._named("licence", where.licence)
        for name, value in where.values:
            if self.columns.kind(name) == "text":
                yield self._named(name, value)
            else:
                yield self.columns.equal(name, value)
        if where.date is not None:
            first, last = day_numbers(where.date)
            days = self.columns.days("date")
            yield (days >= first) & (days <= last)
        if where.box is not None:
            yield self._inside(*where.box)
        if where.key is not None:
            yield self.columns.like(where.key)

    def _named(self, field: str, name: str) -> Mask:
        """Rows that have this name in any column of the field."""
        columns = self._columns_of(field)
        allowed: Mask = np.logical_or.reduce([self.columns.equal(column, name) for column in columns])
        if allowed.any() or not len(allowed):
            return allowed
        raise UnknownName(f"no picture has the {field} {name!r}; {self._nearest(name, columns)}")

    def _nearest(self, name: str, columns: Sequence[str]) -> str:
        """Names that are nearly it, all of them or as many words in a row as it has."""
        counts: Counter[str] = Counter()
        for column in columns:
            if (coded := self.columns.coded(column)) is not None:
                counts += coded.counts(None)
        asked, by_part = _words(name), dict[str, list[str]]()
        for value, _ in counts.most_common():
            words = _words(value)
            count = min(max(1, len(asked)), len(words))
            parts = {" ".join(words[first : first + count]) for first in range(len(words) - count + 1)}
            for part in parts | {" ".join(words)}:
                by_part.setdefault(part, []).append(value)
        near = difflib.get_close_matches(" ".join(asked), by_part, NAMES_SHOWN)
        if near:
            names = dict.fromkeys(value for part in near for value in by_part[part])
            return f"near it: {', '.join(list(names)[:NAMES_SHOWN])}"
        return f"there are e.g. {', '.join(value for value, _ in counts.most_common(NAMES_SHOWN))}"

    def _inside(self, south: float, west: float, north: float, east: float) -> Mask:
        between = self.columns.between
        if west <= east:
            return between("latitude", south, north) & between("longitude", west, east)
        return between("latitude", south, north) & (between("longitude", west, 180) | between("longitude", -180, east))


def _words(name: str) -> list[str]:
    """Without case and signs: Fruit__Apple__Pink-Lady -> fruit apple pink lady."""
    return re.findall(r"[^\W_]+", fold(name))
