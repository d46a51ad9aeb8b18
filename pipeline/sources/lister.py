"""Lists the inside of tar and parquet files in a child process: a file that takes it down costs that file alone.

    with Lister(source) as lister:
        for entry in lister.list(found, prefix): ...           # Item | Damage

Arrow aborts the process on some broken files, and a tar may be made to eat memory. The child has a limit on its memory,
and the parent on its patience; a container that it dies of is a `Damage`, and the next one gets a new child. One child
serves all containers of a listing and starts with the first that has to be opened. Items come back as JSON, hundreds at
a time, and the pipe makes the child wait for the store: 5 us an item here, while the child reads on.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from pipeline.batch import Item
from pipeline.child import Child, confined
from pipeline.sources import Damage, source_class
from pipeline.sources.places import Found

if TYPE_CHECKING:
    from pipeline.sources.containers import ContainerSource

log = logging.getLogger(__name__)

MEMORY_BYTES = 4 << 30  # of address space: Arrow and its threads map one of it
START_S = 60.0  # imports on a busy machine
SILENCE_S = 600.0  # without an entry; a remote tar of huge members has one every few seconds
BATCH_ITEMS, BATCH_S = 512, 1.0
BATCH_CHARS = 1 << 20  # of metadata; a single record may have more
MESSAGE_BYTES_MAX = 256 << 20


class Lister:
    """The parent's side."""

    def __init__(self, source: ContainerSource) -> None:
        self._source = source
        self._child: Child | None = None

    def __enter__(self) -> Lister:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def list(self, found: Found, prefix: str) -> Iterator[Item | Damage]:
        """As `ContainerSource.list_container`, whatever it does to the process.

        Raises:
            OSError: no child can be started at all.
        """
        conn = self._ready()
        try:
            name = found.name.decode("latin-1")
            conn.send_bytes(json.dumps((name, found.size_bytes, found.mtime_ns, found.etag, prefix)).encode())
            while conn.poll(SILENCE_S):
                kind, told = json.loads(conn.recv_bytes(MESSAGE_BYTES_MAX))
                if kind == "items":
                    for key, locator, size_bytes, metadata in told:
                        yield Item(key, locator.encode("latin-1"), size_bytes, 0, found.etag, metadata)
                elif kind == "damage":
                    yield Damage(*told)
                elif kind == "log":
                    log.log(*told)
                else:
                    return
            self._end()
            words = f"nothing came of it for {SILENCE_S:g} s"
        except (EOFError, OSError):
            words = f"the process that listed it died ({self._end()})"
        yield Damage(prefix, words)

    def _ready(self) -> Connection:
        if self._child is not None and self._child.process.poll() is not None:
            self._end()  # it died between two containers: neither is to blame
        if self._child is None:
            self._child = Child.start(__name__, START_S)
            source, level = self._source, logging.getLogger().level
            told = (source.kind, source.root, source.folder, source.pattern, level)
            self._child.conn.send_bytes(json.dumps(told).encode())
        return self._child.conn

    def _end(self) -> str:
        child, self._child = self._child, None
        return child.end() if child is not None else ""


class _Answers(logging.Handler):
    """The child's side of the pipe. What is logged goes to the parent too, whose log is the one that people read."""

    def __init__(self, conn: Connection) -> None:
        super().__init__()
        self._conn, self._send_lock = conn, threading.Lock()  # file systems have threads that log
        self._items: list[tuple[str, str, int, Any]] = []
        self._chars, self._last_s = 0, monotonic()

    def send(self, kind: str, told: object = None) -> None:
        with self._send_lock:
            self._conn.send_bytes(json.dumps((kind, told)).encode())

    def emit(self, record: logging.LogRecord) -> None:
        self.send("log", (record.levelno, "%s", record.getMessage()))

    def item(self, item: Item) -> None:
        self._items.append((item.key, item.locator.decode("latin-1"), item.size_bytes, item.metadata))
        if item.metadata:
            self._chars += sum(len(value) for value in item.metadata.values() if isinstance(value, str))
        full = len(self._items) == BATCH_ITEMS or self._chars > BATCH_CHARS
        if full or monotonic() - self._last_s > BATCH_S:
            self.flush_items()

    def flush_items(self) -> None:
        if self._items:
            self.send("items", self._items)
        self._items, self._chars, self._last_s = [], 0, monotonic()


def _child(conn: Connection) -> None:
    kind, *place, level = json.loads(conn.recv_bytes())
    source = cast("ContainerSource", source_class(kind)(*place))
    answers = _Answers(conn)
    logging.basicConfig(level=level, handlers=[answers])
    with suppress(EOFError, OSError):  # the parent has gone, or does not want more
        while True:
            name, size_bytes, mtime_ns, etag, prefix = json.loads(conn.recv_bytes())
            found = Found(name.encode("latin-1"), size_bytes, mtime_ns, etag)
            for entry in source.list_container(found, prefix):
                if isinstance(entry, Item):
                    answers.item(entry)
                else:
                    answers.flush_items()
                    answers.send("damage", (entry.key_prefix, entry.words))
            answers.flush_items()
            answers.send("end")


if __name__ == "__main__":
    _child(confined(MEMORY_BYTES))
    sys.exit()
