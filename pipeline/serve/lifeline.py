"""How long and how much: every request has a deadline, a place in a bounded queue, and a body of bounded size.

A client that goes away takes its request with it: what was queued for it is dropped and its place is free at once.
The answer to too much is 503 with Retry-After, before any work; nothing waits outside a queue that is counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serve.errors import Refusal, busy
from pipeline.serve.metrics import Metrics
from pipeline.serve.settings import ServeConfig

log = logging.getLogger("nightjar")
QUEUES = {"api": "questions", "v1": "questions", "thumb": "pictures", "picture": "pictures", "login": "questions"}
ROUTES = {*QUEUES, "healthz", "metrics", "openapi.json", ""}
UPLOADS_IN_HAND = 12  # of the largest size allowed; many more small ones
DEADLINE_HEADER = "x-timeout-ms"


class ClientGone(Exception):
    pass


class Lifeline:
    def __init__(self, app: ASGIApp, cfg: ServeConfig, metrics: Metrics) -> None:
        self._app, self._cfg, self._metrics = app, cfg, metrics
        self._in_hand: Counter[str] = Counter()
        self._upload_bytes_left = UPLOADS_IN_HAND * cfg.upload_bytes
        for queue in ("questions", "pictures"):
            metrics.watch(f"{queue}_in_hand", f"Requests in hand: {queue}", partial(self._in_hand.__getitem__, queue))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s, head = time.monotonic(), scope["path"].split("/")[1]
        route, code = head if head in ROUTES else "other", 0

        async def send_counted(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            with self._place(QUEUES.get(head)):
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._allowed_s(scope)):
                    await self._run(scope, receive, send_counted)
        except (Refusal, TimeoutError) as error:
            refusal = error if isinstance(error, Refusal) else busy("no answer before the deadline of this request")
            self._metrics.refused.labels("deadline" if error is not refusal else str(refusal.status)).inc()
            if not code:  # else the connection is cut: half an answer must not look like a whole one
                await refusal.answer(scope["path"])(scope, receive, send_counted)
        except ClientGone:
            self._metrics.cancelled.labels(route).inc()
            return
        self._metrics.requests.labels(route, str(code)).inc()
        self._metrics.seconds.labels(route).observe(time.monotonic() - start_s)

    def _allowed_s(self, scope: Scope) -> float:
        wish = Headers(scope=scope).get(DEADLINE_HEADER)
        if wish is None:
            return self._cfg.deadline_s
        if not (wish.isascii() and wish.isdecimal() and len(wish) < 10):
            raise Refusal(400, f"{DEADLINE_HEADER}: {wish[:40]!r}; give whole milliseconds, such as 2000")
        return min(self._cfg.deadline_s, int(wish) / 1000)

    @contextmanager
    def _place(self, queue: str | None) -> Iterator[None]:
        if queue is None:
            yield
            return
        if self._in_hand[queue] >= self._cfg.queue:
            raise busy(f"{self._cfg.queue} requests are in hand")
        self._in_hand[queue] += 1
        try:
            yield
        finally:
            self._in_hand[queue] -= 1

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._upload_room(scope) as size_bytes:
            body = await _read(receive, size_bytes)

            parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
            never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

            async def receive_body() -> Message:
                return parts.pop() if parts else await never  # that the client goes away is heard below

            sent = left = False
            answering = asyncio.current_task()
            assert answering is not None

            async def send_noted(message: Message) -> None:
                nonlocal sent
                sent = sent or (message["type"] == "http.response.body" and not message.get("more_body", False))
                await send(message)

            async def end_with_client() -> None:
                nonlocal left
                while (await receive())["type"] != "http.disconnect":
                    pass
                if not sent:  # the server says so after a whole answer, too
                    left = answering.cancel()

            watching = asyncio.create_task(end_with_client())
            try:
                await self._app(scope, receive_body, send_noted)
            except asyncio.CancelledError:
                if left and not answering.uncancel():
                    raise ClientGone from None
                raise  # by the deadline, or with the service
            finally:
                watching.cancel()

    @contextmanager
    def _upload_room(self, scope: Scope) -> Iterator[int]:
        """Room for the body, taken before its first byte is read.

        Raises:
            Refusal: 411 no length, 413 too large, 503 too many bytes of other uploads in hand.
        """
        headers, limit = Headers(scope=scope), self._cfg.upload_bytes
        if "transfer-encoding" in headers:
            raise Refusal(411, "the body comes without its length; send Content-Length")
        size_bytes = int(headers.get("content-length", "0"))  # the protocol has checked that it is a number
        if size_bytes > limit:
            raise Refusal(
                413, f"the body has {size_bytes:,} bytes, at most {limit:,} are taken; send a smaller picture, or fewer"
            )
        if size_bytes > self._upload_bytes_left:
            raise busy(f"{UPLOADS_IN_HAND} large uploads are in hand")
        self._upload_bytes_left -= size_bytes
        try:
            yield size_bytes
        finally:
            self._upload_bytes_left += size_bytes


async def _read(receive: Receive, size_bytes: int) -> bytes:
    if not size_bytes:
        return b""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
