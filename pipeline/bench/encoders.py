"""`bench encoders`: pictures and texts prepared and encoded a second, by model, device and runtime.
`bench text`: sequences/s of the text towers, by batch.

Both beside transformers in torch (`docs/benchmarks/towers.py`) and beside what UForm has published.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engines import Engine, EngineUnavailable, device_of, open_engine
from engines.hardware import physical_cores
from engines.spec import Artifact, EngineCard, find_artifact
from pipeline.batch import Batch
from pipeline.bench.pictures import jpegs_below
from pipeline.bench.processes import Limit, OutOfTime, run_measured
from pipeline.bench.published import ENCODERS_PER_S, TEXT_SEQUENCES_PER_S
from pipeline.stages_cpu import CpuStages

TOWERS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "towers.py"
SECONDS = 2.0  # of each rate
PICTURES = 32
TEXT_BATCHES, ENCODER_BATCH = (1, 8, 32, 128), 32


def text(model: str, limit: Limit) -> Iterator[dict[str, Any]]:
    artifact, rows = find_artifact(model), list[dict[str, Any]]()
    whole = {"model": artifact.spec.model, "context": artifact.spec.context_length, "sequences": rows}
    whole["published sequences"] = TEXT_SEQUENCES_PER_S
    for batch in TEXT_BATCHES:
        for runtime, precision in _engines(artifact, "text"):
            engine = open_engine(artifact, "text", runtime, precision, batch=batch)
            row = {"runtime": runtime, "precision": precision, "device": device_of(runtime), "batch": batch}
            rows.append({**row, "texts encoded": encoded_per_s(engine)})
            yield whole
    theirs = _transformers(model, "-", limit, *TEXT_BATCHES)
    rows += [{name: value for name, value in row.items() if name != "texts preprocessed"} for row in theirs]
    yield whole


def encoders(model: str, pictures: Path, limit: Limit) -> Iterator[dict[str, Any]]:
    artifact, rows = find_artifact(model), list[dict[str, Any]]()
    whole = {"model": artifact.spec.model, "rates": rows, "published rates": ENCODERS_PER_S}
    prepared = {"images preprocessed": images_per_s(artifact, pictures), "texts preprocessed": texts_per_s(artifact)}
    for tower, name in (("vision", "images encoded"), ("text", "texts encoded")):
        for runtime, precision in _engines(artifact, tower):
            engine = open_engine(artifact, tower, runtime, precision)  # type: ignore[arg-type]
            row = {"runtime": runtime, "precision": precision, "device": device_of(runtime), "batch": engine.card.batch}
            rows.append({**row, **prepared, name: encoded_per_s(engine)})
            yield whole
    rows += _transformers(model, str(pictures), limit, ENCODER_BATCH)
    yield whole


def _engines(artifact: Artifact, tower: str) -> Iterator[tuple[str, Any]]:
    """Runtime and precision of those that this host may run."""
    seen = dict.fromkeys((card.runtime, card.precision) for _, card in artifact.cards() if card.tower == tower)
    for runtime, precision in seen:
        try:
            open_engine(artifact, tower, runtime, precision)  # type: ignore[arg-type]
        except EngineUnavailable:
            continue  # of another host
        yield runtime, precision


def _transformers(model: str, pictures: str, limit: Limit, *batches: int) -> list[dict[str, Any]]:
    try:
        done = run_measured([sys.executable, TOWERS, model, pictures, SECONDS, *batches], limit)
    except OutOfTime as error:
        return [{"runtime": "transformers", "note": str(error)}]
    rows: list[dict[str, Any]] = done.result
    return rows


def encoded_per_s(engine: Engine, seconds: float = SECONDS) -> float:
    """Rows a second with two batches on their way, as in a lane."""
    card: EngineCard = engine.card
    for slot in (0, 1):
        if isinstance(given := engine.input(slot), np.ndarray) and given.dtype.kind == "f":
            given[:] = np.random.default_rng(slot).standard_normal(given.shape)
        engine.launch(slot, card.batch)
    engine.result(0)
    done, start_s = 0, time.monotonic()
    while (elapsed_s := time.monotonic() - start_s) < seconds:
        engine.launch(done % 2, card.batch)
        done += 1
        engine.result(done % 2)
    for slot in (0, 1):
        engine.result(slot)
    return done * card.batch / elapsed_s


def images_per_s(artifact: Artifact, pictures: Path, threads: int | None = None, seconds: float = SECONDS) -> float:
    """Decoded, resized and normalised with `threads` threads (default: a thread a core), bytes in memory."""
    pre = artifact.spec.preprocess
    encoded = [path.read_bytes() for path in jpegs_below(pictures)[:PICTURES]]
    stages = CpuStages(pre, threads or physical_cores())
    pixels = np.empty((len(encoded), 3, pre.size, pre.size), np.float32)
    ids = np.arange(1, len(encoded) + 1)
    found = _rate(lambda: stages(Batch(ids, list(encoded)), pixels), len(encoded), seconds)
    stages.close()
    return found


def texts_per_s(artifact: Artifact, seconds: float = SECONDS) -> float:
    tokenizer = Tokenizer.from_file(str(artifact.tokenizer_json))
    numbers = np.random.default_rng(0).integers(0, 999, (ENCODER_BATCH, 12))
    texts = [" ".join(f"word{number}" for number in row) for row in numbers]
    return _rate(lambda: tokenizer.encode_batch(texts), ENCODER_BATCH, seconds)


def _rate(call: Callable[[], object], rows: int, seconds: float) -> float:
    call()
    calls, start_s = 0, time.monotonic()
    while (elapsed_s := time.monotonic() - start_s) < seconds:
        call()
        calls += 1
    return calls * rows / elapsed_s
