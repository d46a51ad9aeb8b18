"""How fast engines are, in turns: on a shared machine only ratios within one run mean something."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from engines import build_gpu, device_of
from engines.gate import ExactEngine
from engines.hardware import gemm_peak_gflops
from engines.spec import Artifact

ROUNDS = 5
RATE_S = 0.1  # of each rate and peak


class Rates(NamedTuple):
    rows_per_s: float
    gflop_per_s: float
    peak_share: float  # of the GEMM peak measured in the same round; 0 where nothing here measures it


def measure_rates(artifact: Artifact, engines: Sequence[ExactEngine]) -> list[Rates]:
    """Medians of rounds in which every engine and the GEMM peak take turns."""
    rows_per_s: list[list[float]] = [[] for _ in engines]
    shares: list[list[float]] = [[] for _ in engines]
    gflops = [float(getattr(artifact.spec, engine.card.tower).gflop) for engine in engines]
    for _ in range(ROUNDS):
        for number, engine in enumerate(engines):
            card, on_gpu = engine.card, device_of(engine.card.runtime) == "gpu"
            peak = build_gpu.peak_gflops(card) if on_gpu else gemm_peak_gflops(card.precision, card.threads, RATE_S)
            rate = _rows_per_s(engine, engine.slots if on_gpu else 1)
            rows_per_s[number].append(rate)
            shares[number].append(rate * gflops[number] / peak if peak else 0.0)
    medians = [
        (statistics.median(rates), statistics.median(share)) for rates, share in zip(rows_per_s, shares, strict=True)
    ]
    return [Rates(rate, rate * gflop, share) for (rate, share), gflop in zip(medians, gflops, strict=True)]


def _rows_per_s(engine: ExactEngine, in_flight: int, seconds_min: float = RATE_S) -> float:
    """With so many batches on their way at a time: a GPU must never wait for the host to ask for the next one."""
    turn, start = 0, time.perf_counter()
    while turn == 0 or time.perf_counter() - start < seconds_min:
        slot = turn % in_flight
        if turn >= in_flight:
            engine.result(slot)
        engine.launch(slot, engine.card.batch)
        turn += 1
    for slot in range(min(turn, in_flight)):
        engine.result(slot)
    return turn * engine.card.batch / (time.perf_counter() - start)
