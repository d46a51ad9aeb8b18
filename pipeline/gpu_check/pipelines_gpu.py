"""Whole pipelines on a GPU host: the three that Bing published, our own command end to end, and replicas of the model.

Run by `python -m pipeline.gpu_check`. Never run on a GPU yet.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipeline.bench import index_command, last_json
from pipeline.gpu_check.baseline_opencv import OpenCv
from pipeline.gpu_check.prepare_gpu import B32, L14, artifact, pool, root, runtimes
from pipeline.gpu_check.rig_gpu import Finding, Job, module, tell
from pipeline.line_gpu import CORES, Line, batches, engine_rate, lane_spec, open_engine, per_second, stream

LARGE_LIMIT_S = 30.0  # a root that would take longer is not indexed: the small one is, instead


def pipelines(job: Job) -> Finding:
    """The three that Bing published (88, 356 and 452 queries/s), and OpenCV with all cores, which nobody published."""
    pictures, available = pool(job, "500"), runtimes(job, B32)
    best, rates = available[0], {}
    if "cuda" in available:
        rates["OpenCV + ORT CUDA"] = round(_opencv_rate(job, "cuda", pictures, threads=1))
    tell(rates=rates)
    if best != "cuda":
        rates[f"OpenCV + {best}"] = round(_opencv_rate(job, best, pictures, threads=1))
    rates[f"OpenCV in {CORES} threads + {best}"] = round(_opencv_rate(job, best, pictures, CORES))
    tell(rates=rates)
    line = Line(job, B32, best)
    with stream(line.fill, line.engine, pictures) as step:
        rates[f"full GPU + {best}"] = full = round(per_second(step, lambda: None))
    baseline = rates.get("OpenCV + ORT CUDA")
    figures = {"full GPU over OpenCV + ORT CUDA": round(full / baseline, 2)} if baseline else {}
    answer = f"img/s (divide by 32 for batches/s): {rates}; {CORES} decode threads in the last two, one before"
    evidence = {"rates": rates, "batch": line.rows, "best engine": best, "decode_threads": CORES}
    return Finding(True, answer, {"figures": figures, **evidence})


def _opencv_rate(job: Job, runtime: str, pictures: list[bytes], threads: int) -> float:
    """One thread: decode, then run, as a loop is first written. More: pictures in parallel, one batch ahead."""
    spec = lane_spec(job, B32, runtime)
    opencv, engine = OpenCv(spec.preprocess), open_engine(spec)
    copy: Any = module("engines.memory_gpu").Stream()
    workers = ThreadPoolExecutor(threads)

    def fill(encoded: list[bytes], slot: int) -> None:
        rows = opencv.batch(encoded) if threads == 1 else np.stack(list(workers.map(one, encoded)))
        buffer: Any = engine.input(slot)
        buffer.fill(rows, copy)

    def one(encoded: bytes) -> Any:
        return opencv.preprocess(opencv.decode(encoded))

    turn = batches(pictures, engine.card.batch)

    def serial() -> int:
        fill(next(turn), 0)
        engine.launch(0, engine.card.batch)
        return len(engine.result(0))

    if threads == 1:
        return per_second(serial, lambda: None)
    with stream(fill, engine, pictures) as step:
        return per_second(step, lambda: None)


def index_b32(job: Job) -> Finding:
    return end_to_end(job, B32, "B/32")


def index_b32_twice(job: Job) -> Finding:
    """Two lanes on one GPU: each with a reader, a decoder and an interpreter lock of its own."""
    return end_to_end(job, B32, "B/32 twice", "gpu:0,gpu:0")


def index_l14(job: Job) -> Finding:
    return end_to_end(job, L14, "L/14")


def end_to_end(job: Job, arch: str, short: str, devices: str = "gpu:0") -> Finding:
    """`pipeline.index` on two roots; the difference is the rate, so that start-up, the same for both, is left out."""
    runtime = runtimes(job, arch)[0]
    first = _index(job, arch, runtime, "middle", devices)
    large_s = first["seconds"] * root(job, "large")[1] / first["embedded"]
    second = _index(job, arch, runtime, "large" if large_s < LARGE_LIMIT_S else "small", devices)
    small, big = sorted((first, second), key=lambda one: int(one["embedded"]))
    pictures, seconds = (big[key] - small[key] for key in ("embedded", "seconds"))
    rate = round(pictures / seconds) if seconds > 0 else 0
    whole = " and ".join(f"{one['embedded']} in {one['seconds']} s" for one in (small, big))
    lanes = " and ".join(big["lanes"])  # one of two may have come too late to do anything
    answer = f"{rate} img/s between {whole}, bound by {big['bound']}, by {lanes}"
    evidence = {"figures": {f"{short} end to end": rate}, "devices": devices, "runs": [small, big]}
    return Finding(rate > 0, answer, evidence)


def _index(job: Job, arch: str, runtime: str, name: str, devices: str) -> dict[str, Any]:
    folder, count = root(job, name)
    shutil.rmtree(out := job.work / f"index-{arch}", ignore_errors=True)
    os.environ["NIGHTJAR_ARTIFACTS"] = str(job.work / "artifacts" / arch)
    command = index_command(folder, out, artifact(job, arch).spec.model)
    told = last_json([*command, "--devices", devices, "--runtime", runtime])
    if told["embedded"] != count:
        raise RuntimeError(f"embedded {told['embedded']} of {count}: {told}")
    return told


def replicas(job: Job) -> Finding:
    """1, 2 and 4 processes with a B/32 engine each, on one GPU, model alone: does a second one find room?"""
    context, runtime, rates = multiprocessing.get_context("spawn"), runtimes(job, B32)[0], {}
    for count in (1, 2, 4):
        barrier, told = context.Barrier(count), context.Queue()
        workers = [context.Process(target=_replica, args=(job, runtime, barrier, told)) for _ in range(count)]
        for worker in workers:
            worker.daemon = True  # dies with this process, which has a time limit
            worker.start()
        rates[count] = round(sum(told.get(timeout=60) for _ in workers))
        tell(figures={f"B/32 replicas {count}": rates[count]})
        for worker in workers:
            worker.join()
    figures = {f"B/32 replicas {count}": rate for count, rate in rates.items()}
    return Finding(True, f"img/s of 1, 2, 4 processes together: {rates}", {"figures": figures})


def _replica(job: Job, runtime: str, barrier: Any, told: Any) -> None:
    engine = open_engine(lane_spec(job, B32, runtime))
    barrier.wait(45)  # opening takes seconds, and not the same for each
    told.put(engine_rate(engine))
