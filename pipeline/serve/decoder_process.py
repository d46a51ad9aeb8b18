"""The child that decodes hostile bytes for the service: thumbnails, full views, pixels for the model.

A job is one line of JSON, for uploads followed by their bytes; an answer is `ok <bytes>` or `no <status> <words>`.
It has limits on memory and is killed when it takes too long; only bytes come back from it, never objects.
"""

from __future__ import annotations

import json
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import ImageFile

from engines.spec import Preprocess
from pipeline.batch import BadImage, Batch, Reason
from pipeline.child import confined
from pipeline.reads import is_passing
from pipeline.rendering import MEMORY_BYTES, check_size, render
from pipeline.sources import Source, SourceError, open_source
from pipeline.stages_cpu import CpuStages
from pipeline.store import content_hash

QUALITY = {"jpeg": 85, "webp": 80}
STATUS: dict[Reason, int] = {"read_error": 503, "too_large": 413, "not_an_image": 415, "unsupported_format": 415}
UNREADABLE = 422


class _Gone(Exception):
    """What was indexed is not there any more."""


def _serve(conn: Connection) -> None:
    with suppress(EOFError, OSError):  # the parent has gone
        while True:
            job = json.loads(conn.recv_bytes())
            upload = conn.recv_bytes() if job["upload"] else b""
            try:
                answer = b"ok " + (_pixels(job, upload) if job["upload"] else _rendition(job))
            except BadImage as error:
                answer = f"no {STATUS.get(error.failure.reason, UNREADABLE)} {error}".encode()
            except _Gone as error:
                answer = f"no 404 {error}".encode()
            except SourceError as error:
                answer = f"no 503 its source cannot be read: {error}".encode()
            except MemoryError:
                answer = b"no 413 decoding it needs too much memory"
            conn.send_bytes(answer)


def _pixels(job: dict[str, Any], upload: bytes) -> bytes:
    """(3, s, s) float32, through the stages that every indexed picture went through."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a truncated picture fails, as it does when it is indexed
    stages = _stages(json.dumps(job["preprocess"]))
    pixels_nchw = np.zeros((1, 3, stages.pre.size, stages.pre.size), np.float32)
    batch = stages(Batch(np.array([0]), [upload]), pixels_nchw)
    if batch.failed:
        raise BadImage(*batch.failed[0])
    return pixels_nchw.tobytes()


@lru_cache(maxsize=2)
def _stages(preprocess: str) -> CpuStages:
    raw = json.loads(preprocess)
    raw["mean"], raw["std"] = tuple(raw["mean"]), tuple(raw["std"])
    return CpuStages(Preprocess(**raw), threads=1)


def _rendition(job: dict[str, Any]) -> bytes:
    """A picture of the index, upright and without metadata, at most `edge_px` wide and high."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # what decodes in part is shown in part
    check_size(job["size_bytes"])
    source = _source(job["kind"], job["root"], job["split"])
    try:
        encoded = source.read(unquote_to_bytes(job["locator"]), job["size_bytes"])
    except BadImage as error:
        if is_passing(error):
            raise
        raise _Gone(f"the picture cannot be read where it was indexed ({error.failure.words})") from None
    if content_hash(encoded).hex() != job["content_hash"]:
        raise _Gone("the picture has changed since it was indexed; the next run of pipeline.index takes it in")
    return render(encoded, job["edge_px"], job["format"], QUALITY[job["format"]])


@lru_cache(maxsize=64)
def _source(kind: str, root: str, split: str | None) -> Source:
    return open_source(kind, root, split=split)


if __name__ == "__main__":
    _serve(confined(MEMORY_BYTES))
