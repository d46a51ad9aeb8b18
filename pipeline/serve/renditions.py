"""Thumbnails and full views: made by a decoder process, kept in memory by content, never a byte of the original."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.serve.decoders import Decoders
from pipeline.serve.errors import Refusal
from pipeline.serve.metrics import Metrics
from pipeline.serve.questions import Found

THUMB_EDGES_PX = (128, 256, 512, 1024)
VIEW_EDGE_PX = 2048
FAILURES_KEPT = 10_000
FAILURE_S = 60.0  # before what could not be decoded is tried again


class Wanted(NamedTuple):
    content_hash: bytes
    edge_px: int
    kind: str  # "jpeg" or "webp"

    @property
    def etag(self) -> str:
        return f'"{self.content_hash.hex()}-{self.edge_px}-{self.kind}"'


class _Failed(NamedTuple):
    status: int
    words: str
    until_s: float


@dataclass(slots=True)
class _Making:
    task: asyncio.Task[bytes]
    waiters: int = 0


class Renditions:
    """Lives in one event loop; equal requests at a time are one."""

    def __init__(self, decoders: Decoders, cache_bytes: int, metrics: Metrics) -> None:
        self._decoders, self._bytes_max, self._metrics = decoders, cache_bytes, metrics
        self._kept: OrderedDict[Wanted, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._failed: OrderedDict[bytes, _Failed] = OrderedDict()
        self._making: dict[Wanted, _Making] = {}
        metrics.watch("rendition_cache_bytes", "Bytes of thumbnails and views in memory", lambda: self._kept_bytes)

    async def get(self, found: Found, edge_px: int, kind: str) -> bytes:
        """
        Raises:
            Refusal: see `Decoders.rendition`.
        """
        wanted = Wanted(found.content_hash, edge_px, kind)
        if (kept := self._kept.get(wanted)) is not None:
            self._kept.move_to_end(wanted)
            self._metrics.renditions.labels("memory").inc()
            return kept
        failed = self._failed.get(found.content_hash)
        if failed is not None and failed.until_s > time.monotonic():
            raise Refusal(failed.status, failed.words)
        making = self._making.get(wanted)
        if making is None:
            making = self._making[wanted] = _Making(asyncio.ensure_future(self._make(wanted, found)))
        making.waiters += 1
        try:
            return await asyncio.shield(making.task)
        finally:
            making.waiters -= 1
            if not making.waiters:  # done, or the last client has gone and frees the place
                making.task.cancel()
                if self._making.get(wanted) is making:
                    del self._making[wanted]

    async def _make(self, wanted: Wanted, found: Found) -> bytes:
        try:
            encoded = await self._decoders.rendition(found.picture, *wanted)
        except Refusal as refusal:
            if refusal.status != 503:
                self._failed[wanted.content_hash] = _Failed(refusal.status, refusal.words, time.monotonic() + FAILURE_S)
                if len(self._failed) > FAILURES_KEPT:
                    self._failed.popitem(last=False)
            raise
        self._metrics.renditions.labels("decoder").inc()
        self._kept[wanted] = encoded
        self._kept_bytes += len(encoded)
        while self._kept_bytes > self._bytes_max:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])
        return encoded


def thumb_edge_px(wish_px: int) -> int:
    """Few sizes, so that they are found in memory: the next larger one."""
    return next((edge for edge in THUMB_EDGES_PX if edge >= wish_px), THUMB_EDGES_PX[-1])
