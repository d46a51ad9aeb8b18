"""Small JPEGs of pictures, broken ones too, made in a child process: bytes that no decoder could read are hostile.

    with Thumbnails() as thumbnails:
        jpegs = [thumbnails.make(request) for request in requests]      # bytes, or why there is none

The child reads and decodes, with limits on its memory and on the time of each picture; when it dies or hangs, that
picture has no thumbnail and the next one gets a new child. Only bytes come back from it, never objects.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

from PIL import ImageFile

from pipeline.batch import BadImage
from pipeline.child import Child, confined
from pipeline.rendering import MEMORY_BYTES, check_size, render
from pipeline.sources import Source, SourceError, open_source

EDGE_PX = 176  # shown at half of that on dense screens
PICTURE_S, ALL_S = 5.0, 30.0  # a hang costs one picture, and many hangs cost no night
START_S = 20.0  # imports on a busy machine
JPEG_QUALITY = 70


class Request(NamedTuple):
    """A picture as a source knows it; see `pipeline.store.Picture`."""

    kind: str
    root: str
    options: Mapping[str, Any]
    locator: bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Thumbnail:
    jpeg: bytes  # b"" where there is none
    words: str  # then, why

    def __bool__(self) -> bool:
        return bool(self.jpeg)


@dataclass
class Thumbnails:
    """The parent's side. A picture that was asked for before is not made again."""

    _made: dict[str, Thumbnail] = field(default_factory=dict)
    _left_s: float = ALL_S
    _child: Child | None = None

    def __enter__(self) -> Thumbnails:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop()

    def make(self, request: Request) -> Thumbnail:
        line = json.dumps([*request[:2], dict(request.options), quote_from_bytes(request.locator), request.size_bytes])
        made = self._made.get(line)
        if made is None:
            start = time.monotonic()
            made = self._made[line] = self._ask(line)
            self._left_s -= time.monotonic() - start
        return made

    def excuse(self) -> str:
        """Why there is not one, where some were asked for."""
        made = list(self._made.values())
        return made[0].words if made and not any(made) else ""

    def _ask(self, line: str) -> Thumbnail:
        if self._left_s <= 0:
            return Thumbnail(b"", "not tried: the time for thumbnails was spent on others")
        try:
            conn = self._start()
            conn.send_bytes(line.encode())
            if conn.poll(min(PICTURE_S, self._left_s)):
                status, _, answer = conn.recv_bytes().partition(b" ")
                return Thumbnail(answer, "") if status == b"jpeg" else Thumbnail(b"", answer.decode(errors="replace"))
            words = f"no picture after {PICTURE_S:g} s"
        except (EOFError, OSError):
            return Thumbnail(b"", f"its decoder process died ({self._stop()})")
        self._stop()
        return Thumbnail(b"", words)

    def _start(self) -> Connection:
        if self._child is None:
            try:
                self._child = Child.start(__name__, START_S)
            except OSError:
                self._left_s = 0  # the next one would not start either
                raise
        return self._child.conn

    def _stop(self) -> str:
        child, self._child = self._child, None
        return child.end() if child is not None else "it did not start"


def _serve(conn: Connection) -> None:
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # in this process alone: what decodes in part is shown in part
    sources: dict[str, Source] = {}
    with suppress(EOFError, OSError):  # the parent has gone
        while True:
            kind, root, options, locator, size_bytes = json.loads(conn.recv_bytes())
            place = json.dumps([kind, root, options])
            try:
                if place not in sources:
                    sources[place] = open_source(kind, root, split=options.get("split"))
                check_size(size_bytes)
                encoded = sources[place].read(unquote_to_bytes(locator), size_bytes)
                answer = b"jpeg " + render(encoded, EDGE_PX, "jpeg", JPEG_QUALITY)
            except (BadImage, SourceError, MemoryError) as error:
                answer = f"none {error or 'it needs too much memory'}".encode()
            conn.send_bytes(answer)


if __name__ == "__main__":
    _serve(confined(MEMORY_BYTES))
