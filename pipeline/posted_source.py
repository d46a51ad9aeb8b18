"""What a lane reads stands on its board: a reader may crash (Arrow does) or hang (a mount does) as a decoder may."""

from __future__ import annotations

import itertools
import threading

from pipeline import lanes
from pipeline.lanes import Board
from pipeline.sources import Source


class PostedSource:
    """A lane's source, for its `READ_THREADS` reading threads."""

    def __init__(self, source: Source, board: Board) -> None:
        self.row_ids: dict[bytes, int] = {}  # locator -> row of the chunk that is being read
        self._source, self._board = source, board
        self._thread, self._workers = threading.local(), itertools.count(board.first_reader)

    def read(self, locator: bytes, size_bytes: int) -> bytes:
        if not hasattr(self._thread, "worker"):
            self._thread.worker = next(self._workers)
        self._board.start(self._thread.worker, self.row_ids[locator], lanes.READ_DEADLINE_S)
        try:
            return self._source.read(locator, size_bytes)
        finally:
            self._board.finish(self._thread.worker)
