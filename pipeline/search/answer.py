"""An answer of an index: rows and scores at once, what describes them when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.search.relevance import Background
from pipeline.store import Generation, Scope
from pipeline.store.scan import Query as Vector
from pipeline.store.scan import Rows, Scores

if TYPE_CHECKING:
    from pipeline.search.index import Index


@dataclass(frozen=True)
class Hit:
    """One picture of an answer."""

    key: str
    score: float  # cosine
    relevance: float  # 0..1, see `pipeline.search.relevance`
    mark: str
    metadata: dict[str, str | int | float]
    row: int  # of index.h5
    source: Scope


@dataclass(frozen=True, eq=False)
class Found:
    """A page of an answer: rows of index.h5 and cosines, best first (with `mmr`: in the order of `mmr`).

    What describes them is read when it is asked for.
    """

    rows: Rows  # (n,)
    scores: Scores  # (n,)
    exact: bool  # every vector was looked at
    index: Index  # has to be open still when descriptions are asked for
    total: int  # rows of the index that pass the filters
    query_d: Vector  # what was looked for
    background: Background  # what it is compared with
    groups: list[Rows] | None = None  # per row, where grouping was asked for: itself, then its near-duplicates

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def generation(self) -> Generation:
        return self.index.generation

    @cached_property
    def relevance(self) -> Scores:
        """(n,) 0..1: how far each stands out from the rest of the index, see `pipeline.search.relevance`."""
        return self.background.spread(self.query_d).relevance(self.scores)

    @cached_property
    def keys(self) -> list[str]:
        return self.generation.keys(self.rows)

    @cached_property
    def marks(self) -> list[str]:
        return self.generation.marks(self.rows)

    @cached_property
    def metadata(self) -> list[dict[str, str | int | float]]:
        return self.generation.metadata(self.rows)

    @cached_property
    def hits(self) -> list[Hit]:
        sources = [picture.source for picture in self.generation.pictures(self.rows)]
        columns = (
            self.keys, self.scores.tolist(), self.relevance.tolist(), self.marks, self.metadata, self.rows.tolist(),
            sources,
        )  # fmt: skip
        return [Hit(*row) for row in zip(*columns, strict=True)]
