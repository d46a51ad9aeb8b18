"""What one generation answers: nearest rows, their descriptions, the row of an id. Plain calls, made in threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.search import Index, Query, QueryError, UnknownName, Where
from pipeline.search.where import EVERYTHING
from pipeline.serve.errors import Refusal
from pipeline.store import Picture
from pipeline.store.scan import Rows

IDS_KEPT = 100_000  # rows of ids that were answered: a thumbnail is asked for right after
DESCRIBED_KEPT = 20_000  # about 1 KB each


class Found(NamedTuple):
    picture: Picture
    content_hash: bytes


class Described(NamedTuple):
    words: dict[str, Any]  # as clients see it
    found: Found


class Questions:
    def __init__(self, index: Index) -> None:
        self._index, self._generation = index, index.generation
        self._rows: OrderedDict[int, int] = OrderedDict()  # id -> row, of ids seen lately
        self._described: OrderedDict[int, Described] = OrderedDict()  # by row
        self._lock = threading.Lock()
        self._source_ids = {id(scope): number for number, scope in index.generation.sources.items()}

    def nearest(
        self,
        query: npt.NDArray[np.float16] | Query,
        k: int,
        offset: int = 0,
        threshold: float | None = None,
        *,
        mmr: float | None = None,
        group: bool = False,
        where: Where = EVERYTHING,
        facets: Sequence[str] = (),
        without: int | None = None,
    ) -> dict[str, Any]:
        """One page of an answer, as JSON; `without` is a row that is neither answered nor counted, because it is the
        question. A filter by a name that no row has gives no hits, and a `note` with the nearest names. With `group` a
        hit has the ids of its near-duplicates as `copies`.

        Raises:
            Refusal: 400, what this index cannot answer.
        """
        exact = where != EVERYTHING or mmr is not None or group
        spare = without is not None and not exact  # lists take no mask: they are asked for one more, which is dropped
        others_n = None
        if without is not None and (exact or facets):
            others_n = np.ones(self._generation.rows, np.bool_)
            others_n[without] = False
        try:
            found = self._index.search(
                query, offset + k + spare, threshold=threshold, mmr=mmr, group=group, where=where,
                allowed=others_n if exact else None,
            )  # fmt: skip
            counts = {"facets": self._index.facets(where, facets, allowed=others_n)} if facets else {}
        except UnknownName as error:  # an answer: nothing passes, and this is why
            return {
                "generation": self._generation.number, "total": 0, "offset": offset, "hits": [], "note": str(error),
                **({"facets": {name: [] for name in facets}} if facets else {}),
            }  # fmt: skip
        except QueryError as error:
            raise Refusal(400, str(error)) from None
        page = np.flatnonzero(found.rows != (-1 if without is None else without))[offset : offset + k]
        numbers = zip(
            found.rows[page].tolist(), found.scores[page].tolist(), found.relevance[page].tolist(), strict=True
        )
        known = self._known(found.rows[page].tolist())
        copies = self._copies([found.groups[at] for at in page.tolist()]) if found.groups is not None else {}
        return {
            "generation": self._generation.number, "total": found.total - spare, "offset": offset,
            "hits": [
                {**known[row].words, "score": round(score, 5), "relevance": round(relevance, 4), **copies.get(row, {})}
                for row, score, relevance in numbers
            ],
            **counts,
        }  # fmt: skip

    def _copies(self, groups: Sequence[Rows]) -> dict[int, dict[str, list[int]]]:
        """By the row of a group's head: the ids of its other rows."""
        others = np.concatenate([np.empty(0, np.int64), *(rows[1:] for rows in groups)])
        ids = iter(self._generation.ids(others).tolist())
        return {int(rows[0]): {"copies": [next(ids) for _ in rows[1:]]} for rows in groups}

    @property
    def facet_fields(self) -> list[str]:
        """Filters that there is something to choose from for."""
        return self._index.facet_fields

    @property
    def filter_fields(self) -> list[str]:
        """Filters that this index has columns for."""
        return self._index.filter_fields

    def _known(self, rows: list[int]) -> dict[int, Described]:
        """Read once and kept: dozens of small reads take several times as long as the search itself."""
        with self._lock:
            known = {row: self._described[row] for row in rows if row in self._described}
        if len(known) == len(set(rows)):
            return known
        read, missing = self._generation, np.array(sorted(set(rows) - known.keys()), np.int64)
        columns = (
            missing.tolist(), read.ids(missing).tolist(), read.keys(missing), read.marks(missing),
            read.metadata(missing), read.pictures(missing), read.content_hashes(missing),
        )  # fmt: skip
        for row, number, key, mark, metadata, picture, content_hash in zip(*columns, strict=True):
            source = self._source_ids[id(picture.source)]
            words = {"id": number, "key": key, "mark": mark, "source": source, "metadata": metadata}
            known[row] = Described(words, Found(picture, content_hash))
        with self._lock:
            self._described.update((row, known[row]) for row in missing.tolist())
            while len(self._described) > DESCRIBED_KEPT:
                self._described.popitem(last=False)
        self._remember([known[row].words["id"] for row in missing.tolist()], missing.tolist())
        return known

    def row_of(self, number: int) -> int:
        """
        Raises:
            Refusal: 404, no such picture in this generation.
        """
        with self._lock:
            row = self._rows.get(number)
        if row is None:
            row = int(self._generation.rows_of(np.array([number], np.int64))[0]) if 0 <= number < 1 << 63 else -1
            self._remember([number], [row])
        if row < 0:
            raise Refusal(
                404, f"picture {number} is not in the index (generation {self._generation.number}); search again"
            )
        return row

    def vector(self, row: int) -> npt.NDArray[np.float16]:
        vector_d: npt.NDArray[np.float16] = self._generation.vectors(np.array([row], np.int64))[0]
        return vector_d

    def picture(self, number: int) -> Found:
        """Where the bytes of a picture are. Only from here: nothing a client sends is ever part of a path."""
        row = self.row_of(number)
        return self._known([row])[row].found

    def _remember(self, ids: list[int], rows: list[int]) -> None:
        with self._lock:
            self._rows.update(zip(ids, rows, strict=True))
            while len(self._rows) > IDS_KEPT:
                self._rows.popitem(last=False)
