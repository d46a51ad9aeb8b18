"""Connections that send nothing, or a byte a minute, are closed; and there are never more than descriptors for."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.serve.guard import HEADERS

HEAD_S = 10.0  # for the head of a request, from its first byte or the connection's beginning
CONNECTIONS_MAX = 1000
DESCRIPTORS_KEPT = 600  # for the index: at most 256 data files of each of two generations
FULL = b'{"error": "too many connections; try again after a moment"}'
FULL_HEADERS = {**HEADERS, "content-type": "application/json", "retry-after": "1", "connection": "close"}


def connections_max() -> int:
    """Raises the limit of descriptors as far as it may go, and leaves enough of them to the index."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(50, min(CONNECTIONS_MAX, hard - DESCRIPTORS_KEPT))


def full() -> bytes:
    """The answer to one connection too many; no request is read for it."""
    lines = [f"{name}: {value}\r\n" for name, value in {**FULL_HEADERS, "content-length": len(FULL)}.items()]
    return b"HTTP/1.1 503 Service Unavailable\r\n" + "".join(lines).encode() + b"\r\n" + FULL


class Connection(H11Protocol):
    """Uvicorn's, which bounds neither; the deadline of a body is the request's own (lifeline)."""

    limit = connections_max()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limit:
            transport.write(full())
            transport.close()
            return
        self._head_timer = self.loop.call_later(HEAD_S, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waits_for_head = self.cycle is None or self.cycle.response_complete
        if not waits_for_head:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
