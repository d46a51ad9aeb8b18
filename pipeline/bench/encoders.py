"""`bench encoders`: pictures and texts prepared and encoded a second, by model, device and runtime.
`bench text`: sequences/s of the text towers, by batch.

In turns with transformers in torch (`docs/benchmarks/towers.py`), and beside what UForm has published.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from engines import Engine, EngineUnavailable, device_of, open_engine
from engines.hardware import physical_cores
from engines.spec import Artifact, EngineCard, Tower, find_artifact
from pipeline.batch import Batch
from pipeline.bench.pictures import jpegs_below
from pipeline.bench.processes import Limit, OutOfTime, run_measured
from pipeline.bench.published import ENCODERS_ON, ENCODERS_PER_S, TEXT_SEQUENCES_PER_S, TEXT_TOWERS_ON
from pipeline.stages_cpu import CpuStages

TOWERS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "towers.py"
SECONDS = 2.0  # of each rate
PICTURES = 32
TEXT_BATCHES, ENCODER_BATCH = (1, 8, 32, 128), 32
ENCODED: dict[Tower, str] = {"vision": "images encoded", "text": "texts encoded"}


class Who(NamedTuple):
    runtime: str
    precision: str
    device: str
    batch: int


def text(model: str, limit: Limit) -> Iterator[dict[str, Any]]:
    """One look at each, the engines and transformers one after the other with every batch."""
    artifact, rows = find_artifact(model), list[dict[str, Any]]()
    whole = {"model": artifact.spec.model, "context": artifact.spec.context_length, "sequences": rows}
    bert, bert_per_s = next(iter(TEXT_SEQUENCES_PER_S.items()))
    whole["published sequences"] = [
        {"tower": name, "on": TEXT_TOWERS_ON, ENCODED["text"]: rate, f"times {bert}": rate / bert_per_s}
        for name, rate in TEXT_SEQUENCES_PER_S.items()
    ]
    try:
        for batch in TEXT_BATCHES:
            for engine in _engines(artifact, "text", batch):
                limit.check()
                rows.append({**_who(engine)._asdict(), ENCODED["text"]: encoded_per_s(engine)})
                yield whole
            for who, rates in _transformers(model, "-", limit, batch):
                rows.append({**who._asdict(), ENCODED["text"]: rates[ENCODED["text"]]})
                yield whole
    except OutOfTime as error:
        whole["note"] = str(error)
    yield whole


def encoders(models: list[str], pictures: Path, rounds: int, limit: Limit) -> Iterator[dict[str, Any]]:
    """One model after the other, each with the whole limit: medians of rounds in which all take turns."""
    rates: list[dict[str, Any]] = []
    whole: dict[str, Any] = {"rates": rates, "published rates": [{"on": ENCODERS_ON, **ENCODERS_PER_S}]}
    for model in models:
        before = len(rates)
        try:
            for of_model in _of_model(find_artifact(model), pictures, rounds, Limit(limit.seconds)):
                rates[before:] = of_model
                yield whole
        except OutOfTime as error:
            whole["note"] = f"{model}: {error}"
    yield whole


def _of_model(artifact: Artifact, pictures: Path, rounds: int, limit: Limit) -> Iterator[list[dict[str, Any]]]:
    engines = [(name, engine) for tower, name in ENCODED.items() for engine in _engines(artifact, tower)]
    found: dict[Who, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for who, rates in _one_round(artifact, engines, pictures, limit):
            for name, rate in rates.items():
                found.setdefault(who, {}).setdefault(name, []).append(rate)
            yield [
                {
                    "model": artifact.spec.model,
                    **one._asdict(),
                    **{name: statistics.median(seen) for name, seen in by_name.items()},
                }
                for one, by_name in found.items()
            ]


def _one_round(
    artifact: Artifact, engines: list[tuple[str, Engine]], pictures: Path, limit: Limit
) -> Iterator[tuple[Who, dict[str, float]]]:
    limit.check()
    prepared = {"images preprocessed": images_per_s(artifact, pictures), "texts preprocessed": texts_per_s(artifact)}
    yield Who("pipeline.stages_cpu, tokenizers", "", "cpu", PICTURES), prepared
    for name, engine in engines:
        limit.check()
        yield _who(engine), {name: encoded_per_s(engine)}
    yield from _transformers(artifact.spec.model, str(pictures), limit, ENCODER_BATCH)


def _engines(artifact: Artifact, tower: Tower, batch: int | None = None) -> Iterator[Engine]:
    """Those that this host may run."""
    for card in [card for _, card in artifact.cards() if card.tower == tower]:
        try:
            yield open_engine(artifact, tower, card.runtime, card.precision, batch=batch)
        except EngineUnavailable:
            continue  # of another host


def _who(engine: Engine) -> Who:
    card = engine.card
    return Who(card.runtime, card.precision, device_of(card.runtime), card.batch)


def _transformers(model: str, pictures: str, limit: Limit, batch: int) -> Iterator[tuple[Who, dict[str, float]]]:
    """
    Raises:
        OutOfTime: the limit was reached.
    """
    for row in run_measured([sys.executable, TOWERS, model, pictures, SECONDS, batch], limit).result:
        who = Who("transformers", "fp32", row["device"], batch)
        yield who, {name: rate for name, rate in row.items() if name.endswith(("preprocessed", "encoded"))}


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
