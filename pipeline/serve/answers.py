"""/api: searches by words and pictures, pictures like one of the index, and what the index is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pipeline.search import Query, QueryError, Term
from pipeline.search.query import parse_query
from pipeline.serve.batcher import Vectors
from pipeline.serve.decoders import Decoders
from pipeline.serve.errors import Refusal
from pipeline.serve.forms import read_file, read_form
from pipeline.serve.parameters import (
    FACETS,
    GROUP,
    MMR,
    OFFSET,
    SEARCH,
    SIMILAR,
    THRESHOLD,
    Asked,
    K,
    Q,
    read_parameters,
    where_of,
)  # fmt: skip
from pipeline.serve.shown import PROBE, Following, Shown
from pipeline.serve.threads import Threads

TERMS_MAX = 16


class Answers:
    def __init__(self, following: Following, decoders: Decoders, threads: Threads, upload_bytes: int) -> None:
        self._following, self._decoders, self._threads, self._upload_bytes = following, decoders, threads, upload_bytes

    async def search(self, request: Request) -> Response:
        """GET: words. POST: a picture, with words if both shall count."""
        start_s, shown = time.perf_counter(), self._following.now
        asked = read_parameters(request.query_params, SEARCH)
        text, picture = asked.get(Q), None
        if request.method == "POST":
            async with read_form(request, self._upload_bytes) as form:
                picture = await read_file(form, "picture")
            if picture is None:
                raise Refusal(400, "the form has no field 'picture': curl -F picture=@photo.jpg")
        if text is None and picture is None:
            raise Refusal(400, "q is missing: /api/search?q=a+red+bird, or POST a picture")
        terms = [] if text is None else await _embedded(shown, text)
        if picture is not None:
            terms.append(Term(vector=(await shown.model.pictures(self._decoders, [picture]))[0]))
        return await self._page(shown, Query(tuple(terms)), asked, text or "", start_s)

    async def similar(self, request: Request) -> Response:
        start_s, shown = time.perf_counter(), self._following.now
        asked = read_parameters(request.query_params, SIMILAR)
        number = request.path_params["id"]
        row = await self._threads.run(shown.questions.row_of, number)
        query_d = await self._threads.run(shown.questions.vector, row)
        return await self._page(shown, query_d, asked, f"like picture {number}", start_s, without=row)

    async def about(self, _: Request) -> Response:
        shown = self._following.now
        spec = shown.model.artifact.spec
        sources = [
            {"id": number, "kind": scope.kind, "name": scope.root.rstrip("/").rpartition("/")[2]}
            for number, scope in shown.generation.sources.items()
        ]  # without the folders above: a page need not know how this host is laid out
        questions = shown.questions
        facets, filters = await self._threads.run(lambda: (questions.facet_fields, questions.filter_fields))
        return JSONResponse(
            {
                "name": "nightjar", "generation": shown.number,
                "published": shown.published.isoformat(timespec="seconds"),
                "rows": shown.rows, "dim": spec.dim, "model": spec.model.rstrip("/").rpartition("/")[2],
                "sources": sources, "facets": facets, "filters": filters, "upload_bytes": self._upload_bytes,
            }
        )  # fmt: skip

    async def health(self, _: Request) -> Response:
        """A text is embedded and its nearest picture found, by the road that every question takes."""
        shown = self._following.now
        query_d = (await shown.model.texts([PROBE]))[0]
        await self._threads.run(shown.questions.nearest, query_d, 1)
        return JSONResponse({"status": "ok"})

    async def _page(
        self, shown: Shown, query: Vectors | Query, asked: Asked, words: str, start_s: float, without: int | None = None
    ) -> Response:
        try:
            where = where_of(asked)
        except QueryError as error:
            raise Refusal(400, str(error)) from None
        page = await self._threads.run(
            partial(
                shown.questions.nearest, query, asked.get(K), asked.get(OFFSET), asked.get(THRESHOLD),
                mmr=asked.get(MMR), group=asked.get(GROUP), where=where, facets=asked.get(FACETS) or (),
                without=without,
            )
        )  # fmt: skip
        took_ms = round(1000 * (time.perf_counter() - start_s), 2)
        return JSONResponse({"query": words, "took_ms": took_ms, **page})


async def _embedded(shown: Shown, text: str) -> list[Term]:
    """What the words ask for, its texts as vectors; keys are looked up by the index.

    Raises:
        Refusal: 400, it cannot be read, asks for too much, or names a file: strangers open none.
    """
    try:
        terms = parse_query(text).terms
    except QueryError as error:
        raise Refusal(400, str(error)) from None
    if len(terms) > TERMS_MAX or any(term.file is not None for term in terms):
        raise Refusal(400, f"q has {len(terms)} terms; expected at most {TERMS_MAX}, each a text or key:, none a file:")
    texts = [term.text for term in terms if term.text is not None]
    vectors: Iterator[Vectors] = iter(await shown.model.texts(texts) if texts else ())
    return [term if term.text is None else replace(term, text=None, vector=next(vectors)) for term in terms]
