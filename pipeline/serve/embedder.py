"""Texts and pictures -> vectors of one artifact, in runs of a few fixed sizes. No torch.

Every row comes out as on the command line: the same engines, one row independent of its neighbours. On a CPU a B/32
row costs about the same alone and in a run of 32, so two sizes do: eight rows, and one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from engines import Engine, choose, load_engine, open_engine
from engines.hardware import physical_cores
from engines.spec import Artifact, Tower
from pipeline.serve.batcher import Vectors

RUN_ROWS = (8, 1)  # each is a session: B/32 maps its weights for each


class Embedder:
    """Texts in one thread at a time, pixels in another: an engine's buffers are not shared within a tower."""

    def __init__(self, artifact: Artifact) -> None:
        """
        Raises:
            EngineUnavailable: with the command that builds what is missing.
        """
        self.artifact = artifact
        self._tokenizer = Tokenizer.from_file(str(artifact.tokenizer_json))
        self._text, self._vision = _opened(artifact, "text"), _opened(artifact, "vision", "ort-cpu")

    def texts(self, texts: Sequence[str]) -> Vectors:
        """(n, d) unit-norm; longer texts are cut to the model's context, the end token kept."""
        ids = np.array([encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))])
        return np.concatenate(list(_runs(self._text, ids)))

    def pixels(self, pixels_chw: Sequence[npt.NDArray[np.float32]]) -> Vectors:
        """(n, d) unit-norm, of pictures as `CpuStages` prepares them."""
        return np.concatenate(list(_runs(self._vision, pixels_chw)))


def _opened(artifact: Artifact, tower: Tower, runtime: str = "auto") -> list[Engine]:
    """A session for each size of run. Opening the first one says what was chosen."""
    first, *others = RUN_ROWS
    engines = [open_engine(artifact, tower, runtime, batch=first)]
    path, card, _ = choose(artifact, tower, runtime)
    return engines + [load_engine(path, card, physical_cores(), rows) for rows in others]


def _runs(
    engines: Sequence[Engine], rows: Sequence[npt.NDArray[np.float32]] | npt.NDArray[np.int64]
) -> Iterator[Vectors]:
    first = 0
    for engine, size in zip(engines, RUN_ROWS, strict=True):
        while len(rows) - first >= size:
            buffer = engine.input(0)
            for place in range(size):
                buffer[place] = rows[first + place]
            engine.launch(0, size)
            yield engine.result(0)
            first += size
