"""A few confined child processes that decode, kept for years: a crash or a hang costs the picture that caused it.

pool = Decoders(workers=2, told=...)
jpeg = await pool.rendition(picture, content_hash, 256, "jpeg")
pixels_chw = await pool.pixels(upload, artifact.spec.preprocess)
"""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import numpy.typing as npt

from engines.spec import Preprocess
from pipeline.child import Child
from pipeline.serve.errors import Refusal, busy
from pipeline.store import Picture

MODULE = "pipeline.serve.decoder_process"
START_S = 30.0  # imports on a busy machine
PICTURE_S = 15.0  # of decoding; a hang costs that
JOBS_MAX = 2000  # then a child is replaced, so that no leak of a decoder lives for years


@dataclass(slots=True)
class _Worker:
    child: Child | None = None
    jobs: int = 0


class Decoders:
    def __init__(self, workers: int, told: Callable[[str], None]) -> None:
        """`told` hears why a child was ended: "crash", "timeout" or "age"."""
        self._told = told
        self._threads = ThreadPoolExecutor(workers, "decoders")
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers):
            self._free.put(_Worker())
        self._workers = workers

    async def rendition(self, picture: Picture, content_hash: bytes, edge_px: int, kind: str) -> bytes:
        """The picture as a "jpeg" or "webp" of at most `edge_px`, if it still is what was indexed.

        Raises:
            Refusal: 404 gone or changed, 413, 415, 422 not decodable, 503 its source or a child is not there.
        """
        scope = picture.source
        job = {
            "kind": scope.kind, "root": scope.root, "split": scope.options.get("split"), "upload": False,
            "locator": quote_from_bytes(picture.locator), "size_bytes": picture.size_bytes,
            "content_hash": content_hash.hex(), "edge_px": edge_px, "format": kind,
        }  # fmt: skip
        return await self._run(job)

    async def pixels(self, upload: bytes, pre: Preprocess) -> npt.NDArray[np.float32]:
        """(3, s, s), as the model wants them.

        Raises:
            Refusal: 413, 415, 422 with the decoder's words; 503 no child.
        """
        if not upload:
            raise Refusal(422, "the picture is empty (0 bytes); send the bytes of a JPEG, PNG, WebP, ... file")
        encoded = await self._run({"upload": True, "preprocess": asdict(pre)}, upload)
        return np.frombuffer(encoded, np.float32).reshape(3, pre.size, pre.size)

    def warm(self) -> None:
        """Start every child now, in the background."""
        for _ in range(self._workers):
            self._threads.submit(self._start_one)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for _ in range(self._workers):
            try:
                worker = self._free.get(timeout=1)
            except queue.Empty:  # busy; it ends with this process
                return
            if worker.child is not None:
                worker.child.end()

    async def _run(self, job: dict[str, Any], upload: bytes | None = None) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, job, upload)

    def _start_one(self) -> None:
        worker = self._free.get()
        try:
            worker.child = worker.child or Child.start(MODULE, START_S)
        finally:
            self._free.put(worker)

    def _ask(self, job: dict[str, Any], upload: bytes | None) -> bytes:
        worker = self._free.get()
        try:
            return self._answer(worker, job, upload)
        finally:
            self._free.put(worker)

    def _answer(self, worker: _Worker, job: dict[str, Any], upload: bytes | None) -> bytes:
        try:
            child = worker.child = worker.child or Child.start(MODULE, START_S)
        except OSError as error:
            raise busy(f"no process to decode pictures could be started ({error})") from error
        try:
            child.conn.send_bytes(json.dumps(job).encode())
            if upload is not None:
                child.conn.send_bytes(upload)
            if not child.conn.poll(PICTURE_S):
                self._end(worker, "timeout")
                raise Refusal(422, f"the picture could not be decoded within {PICTURE_S:g} s")
            answer = child.conn.recv_bytes()
        except (EOFError, OSError):
            words = self._end(worker, "crash")
            raise Refusal(422, f"the picture took its decoder down ({words})") from None
        worker.jobs += 1
        if worker.jobs >= JOBS_MAX:
            self._end(worker, "age")
        kind, _, rest = answer.partition(b" ")
        if kind == b"ok":
            return rest
        status, _, words = rest.decode(errors="replace").partition(" ")
        raise Refusal(int(status), words)

    def _end(self, worker: _Worker, why: str) -> str:
        child, worker.child, worker.jobs = worker.child, None, 0
        self._told(why)
        return child.end() if child is not None else ""
