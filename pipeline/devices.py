"""The only place where hardware is chosen: which devices a run uses and why, and what a lane on each is made of.

`auto` takes every GPU there is an engine for, and the CPU beside them only where its engine was measured to add
`CPU_SHARE_MIN`, because its cores decode for the GPUs. A device that was named and cannot be had is an error.
"""

from __future__ import annotations

import contextlib
import importlib.util
import traceback
from typing import Any, Literal, NamedTuple, cast

from engines import GPU_RUNTIMES, Device, Engine, EngineUnavailable, choose, open_engine
from engines.memory_gpu import DeviceArray, GpuError, OutOfGpuMemory, Stream, gpu_problem, gpus
from engines.spec import Artifact, Precision
from pipeline.batch import DeviceUnavailable
from pipeline.lanes import Board, Broken, LaneSpec, Lost, Refused

GPU_LIBRARIES = {"cvcuda": "cvcuda-cu13", "nvidia.nvimgcodec": "nvidia-nvimgcodec-cu13[nvjpeg]"}
CPU_SHARE_MIN = 0.1  # of what the GPUs do by their cards


class Devices(NamedTuple):
    names: tuple[str, ...]  # "cpu" or "gpu:<index>"; a GPU may be named several times, for as many lanes
    reason: str
    named: bool = False  # by the user, so that each of them must be had


class EngineWish(NamedTuple):
    artifact: Artifact
    runtime: str
    precision: Precision | Literal["auto"]

    def rows_per_s(self, kind: Device) -> float:
        """Of the engine that a lane would open, when it was built."""
        return choose(self.artifact, "vision", self.runtime, self.precision, kind).card.rows_per_s


def resolve_devices(wanted: str, wish: EngineWish) -> Devices:
    """`wanted` is "auto", or device names with commas between them.

    Raises:
        DeviceUnavailable, EngineUnavailable: a device that was named cannot be had; says why and what to do.
    """
    if wanted == "auto":
        return _auto(wish)
    names = tuple(name.strip() for name in wanted.split(",") if name.strip())
    known = ["cpu", *(f"gpu:{gpu.index}" for gpu in gpus())]
    if not names or names.count("cpu") > 1 or any(name != "cpu" and not name.startswith("gpu:") for name in names):
        raise DeviceUnavailable(f"--devices {wanted!r}: give auto, or a list of {', '.join(known)} (cpu once)")
    if any(name != "cpu" for name in names):
        if problem := gpu_trouble():
            raise DeviceUnavailable(f"--devices {wanted}: {problem}; or use --devices cpu")
        if away := [name for name in names if name not in known]:
            raise DeviceUnavailable(f"--devices {wanted}: there is no {', '.join(away)} here, only {', '.join(known)}")
        wish.rows_per_s("gpu")
    return Devices(names, "named", named=True)


def _auto(wish: EngineWish) -> Devices:
    try:
        if problem := gpu_trouble():
            raise DeviceUnavailable(problem)
        gpu_rows_per_s = len(gpus()) * wish.rows_per_s("gpu")
    except (DeviceUnavailable, EngineUnavailable) as error:
        if wish.runtime in GPU_RUNTIMES:  # named, so the CPU is no answer
            raise
        idle = f"{len(gpus())} GPUs stay idle: " if gpus() else ""
        return Devices(("cpu",), f"{idle}{error}")
    names = tuple(f"gpu:{gpu.index}" for gpu in gpus())
    try:
        share = wish.rows_per_s("cpu") / gpu_rows_per_s
    except EngineUnavailable:
        return Devices(names, "every GPU; there is no CPU engine to run beside them")
    if share < CPU_SHARE_MIN:
        reason = f"every GPU; the CPU's engine would add {100 * share:.1f} %, and its cores decode for them"
        return Devices(names, reason)
    return Devices((*names, "cpu"), f"every GPU, and the CPU, whose engine adds {100 * share:.0f} %")


def gpu_trouble() -> str:
    """Why no GPU can be used here, and what to do; empty where one can."""
    if problem := gpu_problem():
        return problem
    away = [package for module, package in GPU_LIBRARIES.items() if importlib.util.find_spec(module) is None]
    return f"{', '.join(away)} not installed: pip install '.[gpu-cu13]'" if away else ""


# ---- inside a lane: one process, one device ----------------------------------------------------------------------


def open_lane_engine(spec: LaneSpec) -> Engine:
    return open_engine(
        Artifact.open(spec.artifact_path), "vision", spec.runtime, spec.precision,
        threads=spec.engine_threads, batch=spec.batch, device=spec.kind,
    )  # fmt: skip


def open_stages(spec: LaneSpec, board: Board, engine: Engine) -> Any:
    """What turns encoded pictures into rows of the engine's input, warm and compared with known pixels.

    Raises:
        DeviceUnavailable: the device gives wrong pixels.
    """
    if spec.kind == "cpu":
        from pipeline.stages_cpu import CpuStages

        return CpuStages(spec.preprocess, spec.decode_threads, board)
    from pipeline.stages_gpu import GpuStages, canary

    stages = GpuStages(spec.preprocess, spec.decode_threads, board)
    buffers = [cast(DeviceArray, engine.input(slot)) for slot in range(engine.slots)]
    canary(stages, Artifact.open(spec.artifact_path), buffers)
    return stages


def last_words(spec: LaneSpec, error: BaseException) -> Refused | Lost | Broken:
    """For the coordinator, while `error` is handled. A bug of ours must not pass for a GPU's fault, so it is asked."""
    if isinstance(error, EngineUnavailable | DeviceUnavailable):
        return Refused(str(error))
    if isinstance(error, OutOfGpuMemory):
        artifact = Artifact.open(spec.artifact_path)
        card = choose(artifact, "vision", spec.runtime, spec.precision, spec.kind).card
        return Lost(str(error), full_at=spec.batch or card.batch)
    if spec.kind == "gpu":
        try:
            Stream().synchronize()  # after a fault, every call fails
        except GpuError as sick:
            return Lost(f"{type(error).__name__}: {error}; {sick}")
    with contextlib.suppress(OSError):  # the disk that failed may be the log's
        traceback.print_exc()  # into the lane's log
    words = f"{type(error).__name__}: {error}"
    return Broken(f"{spec.name} failed, what is done is committed: {words}; the whole story is in {spec.log_path}")
