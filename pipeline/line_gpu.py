"""One lane's stage and engine in this process, and how fast they go: what the measurements of check_gpu share.

Never run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import os
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any, cast

import numpy as np

from engines import Engine, EngineUnavailable
from pipeline import devices
from pipeline.batch import Batch
from pipeline.gpu_check.prepare_gpu import artifact
from pipeline.gpu_check.rig_gpu import CannotRun, Job
from pipeline.lanes import ENGINE_SLOTS_MAX, Board, LaneSpec
from pipeline.sources import Source

SECONDS = 3.0  # of each rate, after warm-up
IN_FLIGHT = 2  # batches with the engine, as in a lane
Fill = Callable[[list[bytes], int], None]  # pictures into a buffer of the engine
CORES = len(os.sched_getaffinity(0))


class Line:
    """Stage and engine of one lane, opened as a lane opens them: warm, and compared with known pixels."""

    def __init__(self, job: Job, arch: str, runtime: str, batch: int | None = None) -> None:
        spec = lane_spec(job, arch, runtime, batch)
        self.preprocess, self.engine = spec.preprocess, open_engine(spec)
        self.rows: int = self.engine.card.batch
        self.stages: Any = devices.open_stages(spec, Board(spec.decode_threads + ENGINE_SLOTS_MAX), self.engine)

    def fill(self, encoded: list[bytes], slot: int) -> None:
        done = self.stages(Batch(np.arange(len(encoded)), encoded, slot=slot), self.engine.input(slot))
        if done.failed:
            raise RuntimeError(f"{len(done.failed)} of {len(encoded)} sound pictures failed: {done.failed}")

    def wait(self, slot: int) -> None:
        self.engine.input(slot).ready.synchronize()

    def vectors(self, slot: int, rows: int) -> None:
        self.engine.launch(slot, rows)
        self.engine.result(slot)


def lane_spec(job: Job, arch: str, runtime: str, batch: int | None = None) -> LaneSpec:
    found = artifact(job, arch)
    return LaneSpec(
        name="check", device="gpu:0", source=cast(Source, None), artifact_path=found.path,
        preprocess=found.spec.preprocess, runtime=runtime, precision="auto", engine_threads=CORES, decode_threads=CORES,
        space=found.spec.space, log_path=job.work / "check.log", batch=batch,
    )  # fmt: skip


def open_engine(spec: LaneSpec) -> Any:
    """The vision engine alone.

    Raises:
        CannotRun: it cannot be had here.
    """
    try:
        return devices.open_lane_engine(spec)
    except EngineUnavailable as error:
        raise CannotRun(str(error)) from error


def per_second(step: Callable[[], int], wait: Callable[[], None], seconds: float | None = None) -> float:
    """Rows a second over `SECONDS`, if not told otherwise; `step` returns its rows.

    The queue is drained before each reading of the clock.
    """
    for _ in range(3):
        step()
    wait()
    began, rows, limit_s = time.perf_counter(), 0, seconds or SECONDS
    while time.perf_counter() - began < limit_s:
        rows += step()
    wait()
    return rows / (time.perf_counter() - began)


def median_ms(step: Callable[[], None], repeats: int = 20) -> float:
    times = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return round(1000 * statistics.median(times[3:]), 3)


def batches(pictures: Sequence[bytes], rows: int) -> Iterator[list[bytes]]:
    endless = cycle(pictures)
    while True:
        yield list(islice(endless, rows))


@contextmanager
def stream(fill: Fill, engine: Engine, pictures: Sequence[bytes]) -> Iterator[Callable[[], int]]:
    """A step that gives one batch of vectors, while a thread fills the engine's other buffers."""
    free: queue.Queue[int | None] = queue.Queue()
    full: queue.Queue[int | BaseException] = queue.Queue()
    running: deque[int] = deque()

    def feed() -> None:
        try:
            for encoded in batches(pictures, engine.card.batch):
                if (slot := free.get()) is None:
                    return
                fill(encoded, slot)
                full.put(slot)
        except BaseException as error:  # noqa: BLE001  raised again where somebody waits for this thread
            full.put(error)

    def step() -> int:
        while len(running) < min(IN_FLIGHT, engine.slots):  # one that runs as a CUDA graph has one slot
            if isinstance(got := full.get(), BaseException):
                raise got
            engine.launch(got, engine.card.batch)
            running.append(got)
        engine.result(running[0])
        free.put(running.popleft())
        return engine.card.batch

    feeder = threading.Thread(target=feed, daemon=True)
    for slot in range(engine.slots):
        free.put(slot)
    feeder.start()
    try:
        yield step
    finally:
        free.put(None)
        feeder.join()


def engine_rate(engine: Any) -> float:
    """Rows a second of the model alone, on whatever its buffers hold."""
    running: deque[int] = deque()

    def step() -> int:
        slot = (running[-1] + 1) % engine.slots if running else 0
        engine.launch(slot, engine.card.batch)
        running.append(slot)
        if len(running) == IN_FLIGHT:
            engine.result(running.popleft())
        return int(engine.card.batch)

    return per_second(step, lambda: None)


def gpu_used_mib() -> int:
    """Of the first GPU, by everybody: the driver does not tell a container what its own processes use."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise CannotRun(f"NVML is not here ({error}), so nobody says how much memory is in use") from error
    handle, numbers = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # total, free, used
    code = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle))
    if code := code or nvml.nvmlDeviceGetMemoryInfo(handle, numbers):
        raise CannotRun(f"NVML does not say how much memory is in use (code {code})")
    return int(numbers[2] >> 20)
