"""Texts and single pictures -> vectors, outside a run: what a question is made of. A text imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from engines import open_engine
from engines.spec import Artifact
from pipeline.batch import BadImage, Batch
from pipeline.search.query import QueryError


def read_picture(file: str) -> bytes:
    """The bytes of a file, or of standard input where it is called "-".

    Raises:
        QueryError: it cannot be read.
    """
    try:
        return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise QueryError(
            f"the picture {file!r} cannot be read: {error.strerror}; give a picture file, or - for standard input"
        ) from None


class TextEmbedder:
    """Opening it takes most of a query's time, so it is kept."""

    def __init__(self, artifact: Artifact) -> None:
        self._tokenizer = Tokenizer.from_file(str(artifact.tokenizer_json))  # pads and cuts to the context by itself
        self._engine = open_engine(artifact, "text", batch=1)

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float16]:
        """(n, d) unit-norm vectors; longer texts are cut to the model's context, the end token kept."""
        blocks = []
        for encoding in self._tokenizer.encode_batch(list(texts)):
            self._engine.input(0)[0] = encoding.ids
            self._engine.launch(0, 1)
            blocks.append(self._engine.result(0))
        return np.concatenate(blocks)


class PictureEmbedder:
    """Through the same stages as every indexed picture."""

    def __init__(self, artifact: Artifact) -> None:
        self._preprocess = artifact.spec.preprocess
        self._engine = open_engine(artifact, "vision", "ort-cpu", batch=1)

    def embed(self, encoded: bytes) -> npt.NDArray[np.float16]:
        """(1, d) unit-norm vector.

        Raises:
            BadImage: it does not decode.
        """
        from pipeline.stages_cpu import CpuStages  # decoders: not for text queries

        batch = CpuStages(self._preprocess, threads=1)(Batch(np.array([1]), [encoded]), self._engine.input(0))
        if batch.failed:
            raise BadImage(*batch.failed[0])
        self._engine.launch(0, 1)
        return self._engine.result(0)
