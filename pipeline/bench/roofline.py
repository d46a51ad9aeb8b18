"""`bench roofline`: what this machine can do at best, and the share of it that each stage reaches, in the same run.

engines       GFLOP/s against a square matrix product of that precision in libtorch
preprocess    pictures/s on all cores against those of one thread times the cores
hash          bytes/s against copying memory on one core
read          bytes/s out of the page cache against the same
shard         bytes/s written and synced against a plain file, written and synced

Every stage and its peak take turns; told is the round whose share is the median.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from engines import device_of, open_engine
from engines.hardware import gemm_peak_gflops, host_id, physical_cores
from engines.spec import find_artifact
from pipeline.bench.encoders import encoded_per_s, images_per_s
from pipeline.bench.pictures import jpegs_below
from pipeline.bench.processes import Limit
from pipeline.store import write_shard

COPY_BYTES, SHARD_ROWS = 256 << 20, 4096
SECONDS = 1.0  # of each rate and round


def roofline(model: str, pictures: Path, rounds: int, limit: Limit, work: Path) -> Iterator[dict[str, Any]]:
    """The table after each round; at least one."""
    artifact, cores = find_artifact(model), physical_cores()
    paths = jpegs_below(pictures)[:64]
    encoded = [path.read_bytes() for path in paths]
    size = sum(map(len, encoded))
    block = np.ones(COPY_BYTES, np.uint8)
    target = np.empty_like(block)
    drawn_nd = np.random.default_rng(0).standard_normal((SHARD_ROWS, artifact.spec.dim))
    emb_nd = (drawn_nd / np.linalg.norm(drawn_nd, axis=1, keepdims=True)).astype(np.float16)
    hashes = [os.urandom(16) for _ in range(SHARD_ROWS)]

    def copied() -> float:
        return COPY_BYTES / _seconds(lambda: np.copyto(target, block)) / 1e6

    def plain() -> None:
        with (work / "plain").open("wb") as file:
            file.write(emb_nd.tobytes() + b"".join(hashes))
            os.fsync(file.fileno())

    def shard() -> None:
        write_shard(work / "shard.h5", emb_nd, np.arange(1, SHARD_ROWS + 1), hashes, {})
        (work / "shard.h5").unlink()

    stages: dict[str, tuple[str, Callable[[], float], Callable[[], float]]] = {
        "preprocess": (
            "images/s",
            lambda: images_per_s(artifact, pictures, cores, SECONDS),
            lambda: cores * images_per_s(artifact, pictures, 1, SECONDS),
        ),
        "hash": ("MB/s", lambda: size / _seconds(lambda: [blake3(one).digest() for one in encoded]) / 1e6, copied),
        "read": ("MB/s", lambda: size / _seconds(lambda: [path.read_bytes() for path in paths]) / 1e6, copied),
        "shard": (
            "MB/s",
            lambda: emb_nd.nbytes / _seconds(shard) / 1e6,
            lambda: emb_nd.nbytes / _seconds(plain) / 1e6,
        ),
    }
    for _, card in artifact.cards():
        if card.host == host_id() and device_of(card.runtime) == "cpu":
            engine = open_engine(artifact, card.tower, card.runtime, card.precision)
            gflop = getattr(artifact.spec, card.tower).gflop
            stages[f"{card.tower} {card.runtime} {card.precision}"] = (
                "GFLOP/s",
                lambda engine=engine, gflop=gflop: gflop * encoded_per_s(engine, SECONDS),  # type: ignore[misc]
                lambda card=card: gemm_peak_gflops(card.precision, cores),  # type: ignore[misc]
            )
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in stages}
    for done in range(rounds):
        if done and limit.left_s <= 0:
            return
        for name, (_, reached, peak) in stages.items():
            pairs[name].append((reached(), peak()))
        rows = [_row(name, stages[name][0], found) for name, found in pairs.items()]
        yield {"model": artifact.spec.model, "rounds_each": done + 1, "stages": rows}


def _row(name: str, unit: str, found: list[tuple[float, float]]) -> dict[str, Any]:
    """Of the round in the middle, so that the share is that of the two numbers beside it."""
    reached, peak = sorted(found, key=lambda pair: pair[0] / pair[1])[len(found) // 2]
    return {"stage": name, "unit": unit, "reached": reached, "peak": peak, "share": reached / peak}


def _seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Median, after one to warm up."""
    call()
    seconds = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds)
