"""Questions to an index: texts, pictures and rows in, the nearest pictures out.

    from pipeline.search import Index, Where

    with Index.open(Path("pictures-index")) as index:        # once; answers many questions, from several threads
        found = index.search("a red bird", k=9, where=Where(taxon="Aves"))
        found.rows, found.scores, found.relevance             # numpy arrays, best first
        found.hits                                            # keys and metadata, read when they are asked for
        index.search('"red car" - "person"', offset=9)        # the second page

An index that is held open answers from its generation while newer ones are published and older ones are deleted. A text
imports no torch, and a vector no engine. Only what was published is read. `docs/search.md` explains it all.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engines.spec import Artifact, find_artifact
from pipeline.config import UsageError
from pipeline.search.answer import Found
from pipeline.search.diverse import POOL, marginal_relevance, near_duplicates
from pipeline.search.embedders import PictureEmbedder, TextEmbedder, read_picture
from pipeline.search.query import WORD_FOR_WORD, Query, QueryError, Term, check_vector, combine, parse_query
from pipeline.search.relevance import Background
from pipeline.search.where import EVERYTHING, Where
from pipeline.store import Generation, NoIndex, StoreDamaged
from pipeline.store.lists import Lookup
from pipeline.store.scan import Query as Vector
from pipeline.store.scan import Rows, Scan, Scores
from pipeline.writing import why_no_index

if TYPE_CHECKING:
    from pipeline.search.filters import Filters

DIGEST_CHECK_BYTES = 1 << 28  # of vectors: their digests take 0.1 s from the page cache; above, sizes alone are checked
# How many nearest pictures lists are asked for, whatever the page: an answer begins with the best 12 and goes on with
# what else is among the best 60. Asked for 200 at once, nine take 1.8 ms in place of .63 (200,000 rows); more than 200
# lie in ever more lists.
ANN_DEPTHS = (12, 60, 200)


class Index:
    """The generation that was shown when it was opened. Safe to share among threads, but for `Found`'s descriptions."""

    def __init__(self, generation: Generation, scan: Scan, lookup: Lookup | None, model: str | None) -> None:
        self._generation, self._scan, self._lookup, self._model = generation, scan, lookup, model
        self._closed = False
        self._engine_lock = threading.Lock()  # an engine has one set of buffers
        entry = generation.ann or {}
        self._ann_pays = entry.get("ann_ms", 0.0) < entry.get("exact_ms", 0.0)  # as measured when it was published

    @classmethod
    def open(cls, path: Path | str, *, model: str | None = None, exact: bool = False) -> Index:
        """What readers see now. Small indexes are checked byte by byte, large ones by the sizes of their files.

        `model` is the artifact to ask with (default: the one the index was made with), needed for texts and pictures
        alone. `exact` leaves the lists out altogether.

        Raises:
            NoIndex: no generation is published at `path`: there is nothing, or a first run goes on, or ended too soon.
            StoreDamaged: a file of it is not what was written. Both are StoreErrors of `pipeline.store`, and say what
            was expected and what to run. Never zeros in place of vectors.
        """
        path = Path(path)
        while True:
            generation = open_checked(path)
            scan = Scan(list(generation.blocks()))
            try:
                lookup = None
                if generation.ann and not exact:
                    lookup = Lookup.open(path, generation.ann, scan, scan.bytes <= DIGEST_CHECK_BYTES)
                return cls(generation, scan, lookup, model)
            except (StoreDamaged, FileNotFoundError):
                generation.close()
                scan.close()
                if (path / "current").resolve().name == str(generation.number):
                    raise  # and not deleted while it was being opened

    def __enter__(self) -> Index:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._closed = True
        self._scan.close()
        self._generation.close()

    @property
    def generation(self) -> Generation:
        """
        Raises:
            ValueError: it is closed.
        """
        if self._closed:
            raise ValueError("this Index is closed; ask inside its `with`, or open it again with Index.open(folder)")
        return self._generation

    def parse(self, text: str, templates: Sequence[str] = WORD_FOR_WORD, *, files: bool = False) -> Query:
        """A query as a person writes it, such as `"red car" - 0.5 * "person"`; without quotes, one text word for word.

        `files` allows `file:"photo.jpg"`, which opens files of this host: never for what strangers write.

        Raises:
            QueryError: it begins with a quote and cannot be read, or names a file where that is not allowed.
        """
        query = parse_query(text, templates)
        if not files and any(term.file is not None for term in query.terms):
            raise QueryError(
                "files cannot be named in this query; give the picture itself, or key: and a picture's key"
            )
        return query

    def search(
        self,
        query: str | bytes | Path | Vector | Query,
        k: int = 9,
        *,
        offset: int = 0,
        where: Where = EVERYTHING,
        threshold: float | None = None,
        mmr: float | None = None,
        group: bool = False,
        allowed: npt.NDArray[np.bool_] | None = None,
        exact: bool = False,
    ) -> Found:
        """Answers `offset` to `offset + k` by cosine, ties by row.

        `query`: what `parse` reads, a picture (its bytes, or the path of its file), a unit vector of (d,) float16, or a
        `Query`. `where`: which rows may answer; `allowed`: the same as a boolean per row of the index. Filtered rows
        are searched exactly. `threshold`: the lowest cosine. `mmr`: 1 is the plain order, towards 0 answers differ more
        from each other. `group`: near-duplicates come as one answer. With `mmr` or `group` an answer ends with what is
        made of its best 1,000 rows. `exact`: look at every vector; otherwise the lists nearest to the query, where
        that was faster when the index was published; scores are the same.

        Raises:
            ValueError: a mask of another shape, or a k, offset, threshold or mmr that is none; or it is closed.
            QueryError (a ValueError): a query or filter that this index cannot answer; UnknownName, one of them: a
                filter by a name that no row has. BadImage: a picture that does not decode. ArtifactMissing, UsageError,
                EngineUnavailable: nothing here can embed a text or a picture.
        """
        if not (hasattr(k, "__index__") and hasattr(offset, "__index__") and k >= 1 and offset >= 0):
            raise ValueError(f"k is {k} and offset {offset}; expected whole numbers, at least 1 and at least 0")
        if threshold is not None and not -1 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; expected a cosine, -1 to 1")
        if mmr is not None and not 0 <= mmr <= 1:
            raise ValueError(f"mmr is {mmr}; expected 0 (variety alone) to 1 (the plain order)")
        total = self.generation.rows
        query_d = self.embed(query)
        allowed = self.passing(where, allowed)
        if allowed is not None:
            total = int(np.count_nonzero(allowed))
        ordered = mmr is not None or group
        rows, scores, looked_at_all = self._nearest(query_d, POOL if ordered else offset + k, allowed, exact or ordered)
        if threshold is not None:
            rows, scores = rows[scores >= threshold], scores[scores >= threshold]
        groups = [[position] for position in range(len(rows))]
        if ordered:
            vectors = self._scan.gather(rows)
            groups = near_duplicates(vectors) if group else groups
            if mmr is not None:
                heads = np.array([positions[0] for positions in groups], np.int64)
                order = marginal_relevance(vectors[heads], scores[heads], mmr, offset + k)
                groups = [groups[number] for number in order]
        page = groups[offset : offset + k]
        best = np.array([positions[0] for positions in page], np.int64)
        return Found(
            rows[best], scores[best], looked_at_all, self, total, query_d, self._background,
            [rows[positions] for positions in page] if group else None,
        )  # fmt: skip

    def passing(self, where: Where, allowed: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.bool_] | None:
        """(rows,) which rows of the index pass, of those that are allowed; None: all, because nothing is asked."""
        if where == EVERYTHING:
            return allowed
        passing = self._filters.mask(where)
        return passing if allowed is None or passing is None else passing & allowed

    def facets(
        self,
        where: Where = EVERYTHING,
        fields: Sequence[str] | None = None,
        *,
        allowed: npt.NDArray[np.bool_] | None = None,
    ) -> dict[str, list[tuple[str, int]]]:
        """Per field the values among the rows that pass `where`, with counts, the most frequent first, at most 200. A
        field is a metadata column (default: `facet_columns`), or `taxon` or `licence` for the column that has them. To
        offer other choices of a field, leave it out of `where`. `allowed` as in `search`.

        Raises:
            QueryError: a column that is not there, holds numbers or has too many different values; or as `search`.
        """
        return self._filters.facets(self.passing(where, allowed), self.facet_columns if fields is None else fields)

    @property
    def facet_columns(self) -> list[str]:
        """Metadata columns that are worth a list to choose from."""
        return self._filters.columns.facets

    @property
    def facet_fields(self) -> list[str]:
        """Of `label`, `taxon` and `licence` those with something to choose from: names of filters, for `facets` too."""
        return self._filters.facet_fields

    @property
    def filter_fields(self) -> list[str]:
        """Fields of `Where` that this index can answer."""
        return self._filters.fields

    def vectors(self, rows: Rows) -> npt.NDArray[np.float16]:
        """(len(rows), d) the vectors of these rows, to ask for more like them."""
        return self._scan.gather(rows)

    def embed(self, query: str | bytes | Path | Vector | Query) -> Vector:
        """(d,) the unit vector of a question.

        Raises:
            As `search`.
        """
        match query:
            case Query():
                vectors = [self._term(term, query.templates) for term in query.terms]
                return combine(vectors, [term.weight for term in query.terms])
            case str():
                return self.embed(self.parse(query))
            case bytes():
                return self._term(Term(picture=query))
            case Path():
                return self._term(Term(picture=query.read_bytes()))
            case np.ndarray():
                return self._term(Term(vector=query))
            case _:
                raise QueryError(
                    f"{query!r:.60} is no question; expected text, a picture's bytes or Path, a unit vector or a Query"
                )

    def _term(self, term: Term, templates: Sequence[str] = WORD_FOR_WORD) -> Vector:
        picture = term.picture
        if term.vector is not None:
            check_vector(term.vector, self.generation.dim)
            return term.vector
        if term.text is not None:
            with self._engine_lock:
                sentences = self._texts.embed([template.replace("{}", term.text) for template in templates])
            return combine(list(sentences), [1 / len(sentences)] * len(sentences))
        if term.file is not None:
            picture = read_picture(term.file)
        if picture is not None:
            with self._engine_lock:
                picture_1d = self._pictures.embed(picture)
            picture_d: Vector = picture_1d[0]
            return picture_d
        row = term.row
        if term.key is not None:
            row = self._filters.columns.row_of_key(term.key)
        if row is None or not 0 <= row < self.generation.rows:
            raise QueryError(f"row {row} is not in the index; it has {self.generation.rows} rows, the first is 0")
        row_d: Vector = self._scan.gather(np.array([row]))[0]
        return row_d

    def _nearest(
        self, query_d: Vector, count: int, allowed: npt.NDArray[np.bool_] | None, exact: bool
    ) -> tuple[Rows, Scores, bool]:
        """The best rows, their cosines, and whether every vector was looked at for all of them.

        What more vectors are looked at for comes after what was found without: so a longer answer begins with the
        shorter one, and pages do not overlap.
        """
        found: tuple[Rows, Scores] | None = None
        if self._lookup is not None and self._ann_pays and allowed is None and not exact:
            for depth in ANN_DEPTHS:
                nearest = self._lookup.nearest(query_d, depth)
                if nearest is None:
                    break
                found = _continued(found, nearest) if found else nearest
                if len(found[0]) >= count:
                    break
        if found is None:
            return *self._scan.nearest(query_d, count, allowed), True
        if len(found[0]) < count:
            found = _continued(found, self._scan.nearest(query_d, count))
        return found[0][:count], found[1][:count], False

    @cached_property
    def _filters(self) -> Filters:
        from pipeline.search.filters import Filters  # 0.2 s for pyarrow, for those alone who filter

        return Filters(self.generation)

    @cached_property
    def _background(self) -> Background:
        return Background(self._scan)

    @cached_property
    def artifact(self) -> Artifact:
        return artifact_of(self.generation, self._model)

    @cached_property
    def _texts(self) -> TextEmbedder:
        return TextEmbedder(self.artifact)

    @cached_property
    def _pictures(self) -> PictureEmbedder:
        return PictureEmbedder(self.artifact)


def _continued(found: tuple[Rows, Scores], more: tuple[Rows, Scores]) -> tuple[Rows, Scores]:
    """What was found, and then the rest of `more`."""
    new = ~np.isin(more[0], found[0])
    return np.concatenate([found[0], more[0][new]]), np.concatenate([found[1], more[1][new]])


def open_checked(index: Path) -> Generation:
    """The current generation; small ones are checked byte by byte, large ones by the sizes of their files.

    Raises:
        NoIndex, StoreDamaged: with what was expected and what to run. Never zeros in place of vectors.
    """
    try:
        generation = Generation.open(index)
    except NoIndex:
        raise NoIndex(why_no_index(index)) from None
    if sum(block.emb_nd.nbytes for block in generation.blocks()) <= DIGEST_CHECK_BYTES:
        generation.close()
        generation = Generation.open(index, "digest")
    return generation


def artifact_of(generation: Generation, model: str | None) -> Artifact:
    """The artifact whose vectors this index holds.

    Raises:
        ArtifactMissing, UsageError: it is not here, or `model` names another one.
    """
    artifact = find_artifact(model or str(generation.spec["model"]), space=generation.space)
    if artifact.spec.space != generation.space:
        raise UsageError(
            f"the index holds vectors of {generation.spec['model']} in space {generation.space}, the artifact of "
            f"{artifact.spec.model} makes space {artifact.spec.space}: their vectors cannot be compared"
        )
    return artifact
