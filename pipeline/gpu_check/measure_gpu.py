"""What a GPU host reaches, through the very stage and engines a lane uses. Run by `python -m pipeline.gpu_check`.

Each function is one measurement in a process of its own, of some 10 to 60 s. Its figures go by name into the report,
which holds them against `report_gpu.BARS`. One run on a shared host: ratios within one run say more than the numbers.
Never run on a GPU yet.
"""

from __future__ import annotations

import resource
import time
from collections import deque
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import engines
from engines.memory_gpu import device_array
from pipeline.batch import Batch
from pipeline.gpu_check.baseline_opencv import OpenCv
from pipeline.gpu_check.prepare_gpu import B32, L14, artifact, pool, runtimes
from pipeline.gpu_check.rig_gpu import CPU, HYBRID, CannotRun, Decoder, Finding, Job, mixed, module, tell
from pipeline.line_gpu import (
    CORES,
    Line,
    batches,
    engine_rate,
    gpu_used_mib,
    lane_spec,
    median_ms,
    open_engine,
    per_second,
    stream,
)
from pipeline.setting import HARDWARE_SHARE
from pipeline.stages_cpu import CpuStages

CANARY_ROWS, CANARY_BUFFERS = 256, 3  # as a lane of B/32 has them
STAGE_ROWS = 32  # the published image stage is timed per batch of 32
MEMORY_BATCHES, MEMORY_LIMIT_S, FLAT_MIB = 1000, 40.0, 256


def canary(job: Job) -> Finding:
    """What a lane asks when it starts, with buffers of no engine: a wrong one is another matter."""
    return _canary(job, HARDWARE_SHARE)


def canary_without_engine(job: Job) -> Finding:
    return _canary(job, 0.0)


def _canary(job: Job, hardware_share: float) -> Finding:
    found, stages_gpu = artifact(job, B32), module("pipeline.stages_gpu")
    pre = found.spec.preprocess
    shape = (CANARY_ROWS, 3, pre.size, pre.size)
    buffers = [device_array(shape, np.float16) for _ in range(CANARY_BUFFERS)]
    stages = stages_gpu.GpuStages(pre, CORES, hardware_share=hardware_share)
    worst = stages_gpu.canary(stages, found, buffers)._asdict()
    share = stages.codec.hardware_share
    words = f"{share:.0%} for the hardware decoder: of {CANARY_BUFFERS * CANARY_ROWS} pictures the worst {worst}"
    return Finding(True, words, {"hardware_share": share, **worst})


def image_stage(job: Job) -> Finding:
    """Bing published for 32 of about 400^2, 800^2, 1600^2: OpenCV 34.7, 176.7, 430.2 ms; GPU 9.1, 34.6, 69.0."""
    line = Line(job, B32, runtimes(job, B32)[-1], batch=STAGE_ROWS)  # any engine: only its buffers are used
    opencv = OpenCv(line.preprocess)
    figures: dict[str, float] = {}
    sizes = {}
    for name in ("400", "800", "1600"):
        encoded = pool(job, name)[:STAGE_ROWS]
        gpu, cpu = _gpu_ms(line, encoded), _opencv_ms(opencv, encoded)
        sizes[name] = {"gpu": gpu, "opencv": cpu, "kB": round(sum(map(len, encoded)) / STAGE_ROWS / 1000)}
        figures[f"image stage {name}"] = gpu["total"]
        figures[f"image stage {name} over OpenCV"] = round(cpu["total"] / gpu["total"], 2)
        tell(figures=figures, ms=sizes)
    answer = f"{figures}; GPU with {CORES} decode threads, OpenCV with one"
    return Finding(True, answer, {"figures": figures, "ms": sizes, "decode_threads": {"gpu": CORES, "opencv": 1}})


def _gpu_ms(line: Line, encoded: list[bytes]) -> dict[str, float]:
    """`decode` and `total` are measured, each until the GPU is done; `preprocess` is the difference."""

    def decode() -> None:
        held = line.stages.codec.decode(encoded)
        line.stages.stream.synchronize()
        del held

    def both() -> None:
        line.fill(encoded, 0)
        line.wait(0)

    decode_ms, total_ms = median_ms(decode), median_ms(both)
    return {"decode": decode_ms, "preprocess": round(total_ms - decode_ms, 3), "total": total_ms}


def _opencv_ms(opencv: OpenCv, encoded: list[bytes]) -> dict[str, float]:
    """One thread. Five repeats: a batch of 1600^2 takes half a second."""
    images: list[Any] = []

    def decode() -> None:
        images[:] = [opencv.decode(one) for one in encoded]

    def preprocess() -> None:
        for image in images:
            opencv.preprocess(image)

    decode_ms, preprocess_ms = median_ms(decode, 5), median_ms(preprocess, 5)
    return {"decode": decode_ms, "preprocess": preprocess_ms, "total": round(decode_ms + preprocess_ms, 3)}


def decode_mixes(job: Job) -> Finding:
    """JPEG decode for each mix of decoders. Full batches from the start: the first fixes the engine's share of them."""
    pictures, rates = pool(job, "500"), {}
    mixes = {f"engine {share}": mixed(share) for share in (0.3, 0.5, 0.65, 0.8, 1.0)}
    for name, backends in (mixes | {"hybrid": [(HYBRID, 1.0), (CPU, 1.0)], "cpu": [(CPU, 1.0)]}).items():
        decoder = Decoder(backends)
        if failed := sum(image is None for image in decoder.decode(pictures)):
            raise RuntimeError(f"{name}: {failed} of {len(pictures)} pictures were not decoded")
        step = partial(_decode_step, decoder, pictures)
        rates[name] = round(per_second(step, decoder.stream.synchronize, 1.5))
        tell(rates=rates)
    best = max(rates, key=lambda name: rates[name])
    return Finding(True, f"best {best}: {rates[best]} img/s; all: {rates}", {"rates": rates})


def _decode_step(decoder: Decoder, pictures: list[bytes]) -> int:
    decoder.decode(pictures)
    return len(pictures)


def rates_b32(job: Job) -> Finding:
    """What UForm tables for its encoders, here for the GPU: pictures preprocessed and encoded, per second."""
    best, *others = runtimes(job, B32)
    figures = {}
    for runtime in (best, *others):  # first: they need no decoder
        figures[f"B/32 {runtime} alone"] = round(_alone(job, B32, runtime))
        figures["B/32 model alone"] = figures[f"B/32 {best} alone"]
        tell(figures=figures)
    line = Line(job, B32, best)
    pictures = list(islice(batches(pool(job, "500"), line.rows), 4))
    turn, slots = cycle(pictures), cycle(range(line.engine.slots))

    def decode() -> int:
        held.append(line.stages.codec.decode(next(turn)))
        return line.rows

    def stage() -> int:
        slot = next(slots)
        line.wait(slot)  # for what was put there some batches ago
        line.fill(next(turn), slot)
        return line.rows

    held: deque[Any] = deque(maxlen=2)
    figures["B/32 decode alone"] = round(per_second(decode, line.stages.stream.synchronize))
    tell(figures=figures)
    held.clear()
    figures["B/32 decode and preprocess alone"] = round(per_second(stage, line.stages.stream.synchronize))
    return Finding(True, f"{figures}; {CORES} decode threads", _rates(figures, batch=line.rows, engine=best))


def rates_cpu(job: Job) -> Finding:
    """The same stages on the CPU, beside nothing else: exact decode and preprocess, the reference engine, and texts."""
    spec = lane_spec(job, B32, "ort-cpu")
    engine = engines.open_engine(artifact(job, B32), "vision", "ort-cpu", threads=CORES)
    stages, encoded = CpuStages(spec.preprocess, CORES), pool(job, "500")
    pixels_nchw = np.empty((len(encoded), 3, spec.preprocess.size, spec.preprocess.size), np.float32)

    def stage() -> int:
        if failed := stages(Batch(np.arange(len(encoded)), list(encoded)), pixels_nchw).failed:
            raise RuntimeError(f"{len(failed)} of {len(encoded)} sound pictures failed: {failed}")
        return len(encoded)

    figures = {"decode and preprocess on the CPU": round(per_second(stage, lambda: None))}
    stages.close()
    tell(figures=figures)
    figures["B/32 ort-cpu alone"] = round(engine_rate(engine))
    figures |= _text_rates(job)
    return Finding(True, f"{figures}; {CORES} threads for each", _rates(figures, engine_threads=CORES))


def _rates(figures: dict[str, int], **beside: object) -> dict[str, Any]:
    return {"figures": figures, "decode_threads": CORES, **beside}


def rates_l14(job: Job) -> Finding:
    best, *others = runtimes(job, L14)
    figures = {}
    for runtime in (best, *others):
        figures[f"L/14 {runtime} alone"] = round(_alone(job, L14, runtime))
        figures["L/14 model alone"] = figures[f"L/14 {best} alone"]
        tell(figures=figures)
    return Finding(True, f"{figures}", {"figures": figures})


def _alone(job: Job, arch: str, runtime: str) -> float:
    return engine_rate(open_engine(lane_spec(job, arch, runtime)))


def _text_rates(job: Job) -> dict[str, int]:
    """Queries are answered on the CPU, one or a few at a time."""
    found = artifact(job, B32)
    tokenizer, engine = Tokenizer.from_file(str(found.tokenizer_json)), engines.open_engine(found, "text")
    texts = [f"a photo of a bird, number {number}, on a branch" for number in range(engine.card.batch)]
    ids = np.array([one.ids for one in tokenizer.encode_batch(texts)], np.int32)

    def tokenize() -> int:
        return len(tokenizer.encode_batch(texts))

    def encode() -> int:
        engine.input(0)[:] = ids
        engine.launch(0, len(ids))
        return len(engine.result(0))

    steps = {"texts preprocessed": tokenize, f"texts encoded, {engine.card.runtime}": encode}
    return {name: round(per_second(step, lambda: None, 1.0)) for name, step in steps.items()}


def latency(job: Job) -> Finding:
    """Bytes of one picture to its vector on the host, batch 1 (engines of up to 16 rows run as CUDA graphs)."""
    told: dict[str, list[float]] = {}
    refused: dict[str, str] = {}
    for runtime in runtimes(job, B32):
        try:
            line = Line(job, B32, runtime, batch=1)
        except CannotRun as reason:
            refused[runtime] = str(reason)
            continue
        times = []
        for encoded in islice(cycle(pool(job, "500")), 330):
            began = time.perf_counter()
            line.fill([encoded], 0)
            line.vectors(0, 1)
            times.append(1000 * (time.perf_counter() - began))
        told[runtime] = [round(float(np.percentile(times[30:], p)), 2) for p in (50, 90, 99)]
        tell(percentiles=told)
    if not told:
        raise CannotRun(f"no engine runs single pictures: {refused}")
    figures = {"one picture p50": min(p50 for p50, _, _ in told.values())}
    evidence = {"figures": figures, "percentiles": told, "refused": refused}
    return Finding(True, f"p50, p90, p99 in ms: {told}", evidence)


def memory(job: Job) -> Finding:
    """GPU memory of a B/32 lane at its default batch, and whether GPU and host stay flat over 1,000 batches."""
    runtime, before = runtimes(job, B32)[0], gpu_used_mib()
    line, began, used = Line(job, B32, runtime), time.monotonic(), []
    with stream(line.fill, line.engine, pool(job, "500")) as step:
        for number in range(1, MEMORY_BATCHES + 1):
            step()
            if number % 50 == 0:
                rss_mib = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
                used.append((number, gpu_used_mib() - before, rss_mib))
                if time.monotonic() - began > MEMORY_LIMIT_S:
                    break
    peak, last = max(row[1] for row in used), used[-1][0]
    growth = {"gpu": used[-1][1] - used[1][1], "host": used[-1][2] - used[1][2]} if len(used) > 2 else {}
    flat = bool(growth) and max(growth.values()) <= FLAT_MIB
    answer = f"GPU {peak} MiB at batch {line.rows}; MiB gained from batch 100 to {last}: {growth}"
    return Finding(flat and last == MEMORY_BATCHES, answer, {"figures": {"B/32 GPU memory": peak}, "used": used})
