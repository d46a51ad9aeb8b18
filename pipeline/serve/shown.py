"""The generation that is answered from, and the switch to the next one while requests go on.

`current` is looked at twice a second. A newer generation is opened, checked and asked one question beside the old one,
then takes its place in one assignment; requests that began with the old one end with it, and its files are closed when
the last of them lets go. What cannot be opened is told, and the old generation goes on answering.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from engines import EngineUnavailable
from engines.spec import ArtifactMissing
from pipeline.config import UsageError
from pipeline.search import Index
from pipeline.serve.batcher import ROWS_MAX, Batcher
from pipeline.serve.decoders import Decoders
from pipeline.serve.embedder import Embedder
from pipeline.serve.metrics import Metrics
from pipeline.serve.questions import Questions
from pipeline.store import StoreError

log = logging.getLogger("nightjar")
LOOK_S = 0.5
CLOSE_S = 120.0  # after the last request that began with a model that was replaced
AGAIN_S = 30.0  # before what could not be opened is tried again
UPLOADS_AT_ONCE = 8  # of one request, so that a long one leaves decoders to others
PROBE = "a picture"
Vector: TypeAlias = npt.NDArray[np.float16]


class Model:
    """One artifact's engines, and the queues in front of them."""

    def __init__(self, embedder: Embedder, metrics: Metrics) -> None:
        self.artifact, self.embedder = embedder.artifact, embedder
        self.texts: Batcher[str] = Batcher("texts", embedder.texts, metrics.told("text"))
        self.pixels = Batcher("pixels", embedder.pixels, metrics.told("vision"))

        self._room = asyncio.Semaphore(ROWS_MAX)  # decoded pictures, of all requests: 0.6 MB each

    async def pictures(self, decoders: Decoders, uploads: Sequence[bytes]) -> list[Vector]:
        """One (d,) vector for each.

        Raises:
            Refusal: one of them does not decode; see `Decoders.pixels`.
        """
        rows: list[Vector] = []
        for first in range(0, len(uploads), UPLOADS_AT_ONCE):
            part = uploads[first : first + UPLOADS_AT_ONCE]
            rows += await asyncio.gather(*(self._picture(decoders, upload) for upload in part))
        return rows

    async def _picture(self, decoders: Decoders, upload: bytes) -> Vector:
        async with self._room:
            pixels_chw = await decoders.pixels(upload, self.artifact.spec.preprocess)
            row_d: Vector = (await self.pixels([pixels_chw]))[0]
            return row_d

    def close(self) -> None:
        self.texts.close()
        self.pixels.close()


class Shown:
    """One generation and its model; a request takes it once and keeps it to its end."""

    def __init__(self, index: Index, model: Model, published: datetime) -> None:
        self.generation, self.model, self.published = index.generation, model, published
        self.number, self.rows = index.generation.number, index.generation.rows
        self.questions = Questions(index)


class Following:
    """`now` is what to answer from. Lives in one event loop; opening happens in a thread of its own."""

    def __init__(self, index: Path, model: str | None, metrics: Metrics) -> None:
        """
        Raises:
            NoIndex, StoreError, ArtifactMissing, EngineUnavailable, UsageError: there is nothing to answer from.
        """
        self._index, self._model_name, self._metrics = index, model, metrics
        self._opening = ThreadPoolExecutor(1, "opening")
        self._target = self._look()
        self.now = self._open(None)
        self.trouble = ""  # why a newer generation is not answered from
        self._tell()

    async def follow(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        again_s = 0.0  # of the loop's clock; before it, what could not be opened is left alone
        while True:
            await asyncio.sleep(LOOK_S)
            target = self._look()
            if target == self._target and (not self.trouble or loop.time() < again_s):
                continue
            self._target = target
            try:
                shown = await loop.run_in_executor(self._opening, self._open, self.now)
            except (StoreError, ArtifactMissing, EngineUnavailable, UsageError, OSError) as error:
                self.trouble, again_s = str(error), loop.time() + AGAIN_S
                log.error("generation %d goes on being shown: the newer one cannot be had: %s", self.now.number, error)
            else:
                old, self.now, self.trouble = self.now, shown, ""
                if old.model is not shown.model:
                    loop.call_later(CLOSE_S, old.model.close)
                self._metrics.switches.inc()
                log.info("generation %d of %d pictures is shown", shown.number, shown.rows)
            self._tell()

    def close(self) -> None:
        self._opening.shutdown(wait=False, cancel_futures=True)
        self.now.model.close()

    def _look(self) -> str:
        try:
            return os.readlink(self._index / "current")
        except OSError:
            return ""  # opening says what is wrong

    def _open(self, old: Shown | None) -> Shown:
        # Never closed by hand: requests of other threads may still read. Its files close with the last reference to it.
        index = Index.open(self._index, model=self._model_name)
        if old is not None and old.generation.space == index.generation.space:
            model = old.model
        else:
            model = Model(Embedder(index.artifact), self._metrics)
        made = self._index / "generations" / str(index.generation.number) / "generation.json"
        shown = Shown(index, model, datetime.fromtimestamp(made.stat().st_mtime, UTC))
        if old is None or old.model is not model:
            # First runs are slow, and an engine that cannot answer is found before anybody asks it.
            shown.questions.nearest(model.embedder.texts([PROBE] * 9)[0], 1)
        return shown

    def _tell(self) -> None:
        self._metrics.generation.set(self.now.number)
        self._metrics.rows.set(self.now.rows)
        self._metrics.behind.set(bool(self.trouble))
