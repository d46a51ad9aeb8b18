"""The routes, and what they share. Read top to bottom: everything the service does has one line in `routes`."""

from __future__ import annotations

import asyncio
import contextlib
import html
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs

from blake3 import blake3
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.convertors import IntegerConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from pipeline.serve.answers import Answers
from pipeline.serve.decoders import Decoders
from pipeline.serve.embeddings import Embeddings
from pipeline.serve.errors import Refusal, told
from pipeline.serve.guard import Guard
from pipeline.serve.lifeline import Lifeline
from pipeline.serve.metrics import Metrics
from pipeline.serve.openapi import document
from pipeline.serve.parameters import SIZE, read_parameters
from pipeline.serve.renditions import VIEW_EDGE_PX, Renditions, Wanted, thumb_edge_px
from pipeline.serve.settings import ServeConfig
from pipeline.serve.shown import Following
from pipeline.serve.threads import Threads
from pipeline.serve.tokens import is_token, session_cookie

log = logging.getLogger("nightjar")
PAGE = Path(__file__).with_name("page")
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
PICTURE_CACHE = "private, max-age=300"  # an id may show other bytes after the next night
LOGIN_BYTES_MAX = 4096
LOGIN = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Nightjar: log in</title>
<link rel="stylesheet" href="style.css"><body class="login"><main><h1>Nightjar</h1>
<form method="post" action="login"><label>Token <input name="token" type="password" autocomplete="current-password"
required autofocus></label><p role="alert">{words}</p><button>Log in</button></form></main></body></html>"""


class Number(IntegerConvertor):
    """Of a picture, 64 bits. Starlette's takes any digits, and int() fails at more than 4,300 of them."""

    regex = "[0-9]{1,19}"


register_url_convertor("number", Number())


class Service:
    """Everything that lives as long as the process does."""

    def __init__(self, cfg: ServeConfig, metrics: Metrics) -> None:
        self.cfg, self.metrics = cfg, metrics
        self.following = Following(cfg.out, cfg.model, metrics)
        self.threads = Threads()
        self.decoders = Decoders(cfg.workers, lambda why: metrics.decoders_ended.labels(why).inc())
        self.renditions = Renditions(self.decoders, cfg.cache_bytes, metrics)
        self.answers = Answers(self.following, self.decoders, self.threads, cfg.upload_bytes)
        self.embeddings = Embeddings(self.following, self.decoders, cfg.upload_bytes)
        self._description = JSONResponse(document()).body

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/api/search", self.answers.search, methods=["GET", "POST"]),
            Route("/api/similar/{id:number}", self.answers.similar),
            Route("/api/about", self.answers.about),
            Route("/v1/embeddings", self.embeddings.create, methods=["POST"]),
            Route("/thumb/{id:number}", self.thumb),
            Route("/picture/{id:number}", self.picture),
            Route("/healthz", self.answers.health),
            Route("/metrics", self.tell_metrics),
            Route("/openapi.json", self.describe),
            Route("/login", self.login, methods=["GET", "POST"]),
            *_page_routes(),
        ]

    @contextlib.asynccontextmanager
    async def life(self, _: Starlette) -> AsyncIterator[None]:
        self.decoders.warm()
        following = asyncio.create_task(self.following.follow())
        try:
            yield
        finally:
            following.cancel()
            self.threads.close()
            self.following.close()
            await asyncio.to_thread(self.decoders.close)

    async def thumb(self, request: Request) -> Response:
        size_px = read_parameters(request.query_params, (SIZE,)).get(SIZE)
        return await self._rendition(request, thumb_edge_px(size_px))

    async def picture(self, request: Request) -> Response:
        return await self._rendition(request, VIEW_EDGE_PX)

    async def _rendition(self, request: Request, edge_px: int) -> Response:
        found = await self.threads.run(self.following.now.questions.picture, request.path_params["id"])
        kind = "webp" if "image/webp" in request.headers.get("accept", "") else "jpeg"
        etag = Wanted(found.content_hash, edge_px, kind).etag
        headers = {"etag": etag, "cache-control": PICTURE_CACHE, "vary": "accept"}
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        encoded = await self.renditions.get(found, edge_px, kind)
        return Response(encoded, media_type=f"image/{kind}", headers=headers)

    async def tell_metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def describe(self, _: Request) -> Response:
        return Response(self._description, media_type="application/json")

    async def login(self, request: Request) -> Response:
        """A form for people: the token is exchanged for a cookie that cannot be turned back into it."""
        token, words = self.cfg.token, ""
        if token is None:
            return RedirectResponse("./", 303)
        if request.method == "POST":
            body = await request.body()
            given = parse_qs(body[:LOGIN_BYTES_MAX].decode("utf-8", "replace")).get("token", [""])[0]
            if is_token(given.strip(), token):
                cookie = session_cookie(token, https=request.url.scheme == "https")
                return RedirectResponse("./", 303, {"set-cookie": cookie})
            words = "This is not the token."
        return HTMLResponse(LOGIN.format(words=html.escape(words)), 401 if words else 200)


def build_app(service: Service) -> ASGIApp:
    app = Starlette(
        routes=service.routes(),
        lifespan=service.life,
        exception_handlers={Refusal: _refused, HTTPException: _no_route, Exception: _broken},
    )
    return Guard(Lifeline(app, service.cfg, service.metrics), service.cfg, service.metrics)


def _page_routes() -> list[BaseRoute]:
    """The files of the page, read once: what is not in this list cannot be asked for."""
    files = sorted(path for path in PAGE.iterdir() if path.suffix in MEDIA_TYPES) if PAGE.is_dir() else []
    return [Route("/" if path.name == "index.html" else f"/{path.name}", _file(path)) for path in files]


def _file(path: Path):  # type: ignore[no-untyped-def]
    content = path.read_bytes()
    headers = {"etag": f'"{blake3(content).hexdigest(length=16)}"', "cache-control": "no-cache"}

    async def answer(request: Request) -> Response:
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers={**headers, "content-type": MEDIA_TYPES[path.suffix]})

    return answer


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.answer(request.scope["path"])


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing at this address", 405: f"{request.method} is not for this address"}
    known = f"{words.get(error.status_code, error.detail)}; /openapi.json says what there is"
    return told(request.scope["path"], error.status_code, known, error.headers)


async def _broken(request: Request, error: Exception) -> Response:
    return told(request.scope["path"], 500, "the service failed at this request; its log says why")
