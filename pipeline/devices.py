"""The only place where hardware is chosen: which lanes a run has and why, and what a lane on each device is made of.

`auto` takes every GPU there is an engine for, and the CPU beside them only where that was measured to be faster
(`python -m pipeline.tune`), or, never measured, where its engine's card promises `CPU_SHARE_MIN`: its cores decode for
the GPUs. A device that was named and cannot be had is an error. How many lanes a device gets, and how each is made, is
as tuned on this host, else by default; a device that was named several times has that many lanes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from engines import GPU_RUNTIMES, Choice, Device, Engine, EngineUnavailable, choose, open_engine
from engines.hardware import physical_cores
from engines.memory_gpu import DeviceArray, GpuError, OutOfGpuMemory, Stream, gpu_problem, gpus
from engines.spec import Artifact, Precision
from pipeline.batch import DeviceUnavailable
from pipeline.cores import divide, nodes, shares, usable_cores
from pipeline.hardware_share_gpu import allowed
from pipeline.lanes import Board, LaneSpec
from pipeline.messages import Broken, Lost, Refused, sayable
from pipeline.setting import Setting, default_setting, lane_bytes, memory_limit_bytes, tuned_for
from pipeline.sources import Source

GPU_LIBRARIES = {"cvcuda": "cvcuda-cu13", "nvidia.nvimgcodec": "nvidia-nvimgcodec-cu13[nvjpeg]"}
CPU_SHARE_MIN = 0.1  # of what the GPUs do by their cards


class LanePlan(NamedTuple):
    device: str  # "cpu" or "gpu:<index>"
    setting: Setting
    cores: int  # of the host's, its part
    cpus: tuple[int, ...] = ()  # the lane is bound to these; empty: to none


class Devices(NamedTuple):
    lanes: tuple[LanePlan, ...]
    reason: str
    setting: str  # how the lanes are made, and why so
    named: bool = False  # by the user, so that each of them must be had

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(lane.device for lane in self.lanes)


class EngineWish(NamedTuple):
    artifact: Artifact
    runtime: str
    precision: Precision | Literal["auto"]

    def choice(self, kind: Device) -> Choice:
        """The engine that a lane would open."""
        return choose(self.artifact, "vision", self.runtime, self.precision, kind)

    def rows_per_s(self, kind: Device) -> float:
        """Of that engine, when it was built."""
        return self.choice(kind).card.rows_per_s


def resolve_devices(wanted: str, wish: EngineWish) -> Devices:
    """`wanted` is "auto", or device names with commas between them.

    Raises:
        DeviceUnavailable, EngineUnavailable: a device that was named cannot be had; says why and what to do.
    """
    if wanted == "auto":
        names, reason = _auto(wish)
        return plan(names, wish, reason)
    names = tuple(name.strip() for name in wanted.split(",") if name.strip())
    known = ["cpu", *(f"gpu:{gpu.index}" for gpu in gpus())]
    if not names or any(name != "cpu" and not name.startswith("gpu:") for name in names):
        raise DeviceUnavailable(f"--devices {wanted!r}: give auto, or a list of {', '.join(known)}")
    if any(name != "cpu" for name in names):
        if problem := gpu_trouble():
            raise DeviceUnavailable(f"--devices {wanted}: {problem}; or use --devices cpu")
        if away := [name for name in names if name not in known]:
            raise DeviceUnavailable(f"--devices {wanted}: there is no {', '.join(away)} here, only {', '.join(known)}")
        wish.rows_per_s("gpu")
    return plan(names, wish, "named", named=True)


def _auto(wish: EngineWish) -> tuple[tuple[str, ...], str]:
    try:
        if problem := gpu_trouble():
            raise DeviceUnavailable(problem)
        gpu_rows_per_s = len(gpus()) * wish.rows_per_s("gpu")
    except (DeviceUnavailable, EngineUnavailable) as error:
        if wish.runtime in GPU_RUNTIMES:  # named, so the CPU is no answer
            raise
        idle = f"{len(gpus())} GPUs stay idle: " if gpus() else ""
        return ("cpu",), f"{idle}{error}"
    names = tuple(f"gpu:{gpu.index}" for gpu in gpus())
    try:
        share = wish.rows_per_s("cpu") / gpu_rows_per_s
    except EngineUnavailable:
        return names, "every GPU; there is no CPU engine to run beside them"
    tuned, _ = tuned_for(wish.choice("gpu"), names)
    if tuned is not None and tuned.beside_cpu_rows_per_s is not None:
        words = f"with a CPU lane beside them {tuned.beside_cpu_rows_per_s:.1f} images/s were measured, without"
        words += f" {tuned.rows_per_s:.1f}"
        if tuned.beside_cpu_rows_per_s <= tuned.rows_per_s:
            return names, f"every GPU; {words}"
        return (*names, "cpu"), f"every GPU and the CPU; {words}"
    if share < CPU_SHARE_MIN:
        return names, f"every GPU; the CPU's engine would add {100 * share:.1f} %, and its cores decode for them"
    return (*names, "cpu"), f"every GPU, and the CPU, whose engine adds {100 * share:.0f} %"


# ---- lanes -------------------------------------------------------------------------------------------------------


def plan(
    names: tuple[str, ...], wish: EngineWish, reason: str, named: bool = False, trial: Setting | None = None
) -> Devices:
    """A lane for each name, or as many as were tuned, or `trial` instead of what was tuned.

    Raises:
        DeviceUnavailable: CPU lanes that were asked for do not fit into memory together, or NIGHTJAR_HARDWARE_SHARE
            is no share.
    """
    gpu_names = tuple(name for name in names if name != "cpu")
    main: Device = "gpu" if gpu_names else "cpu"
    tunable = gpu_names or names  # beside GPUs, the CPU's lane takes what they leave
    words = "by default: "
    if trial is None and len(set(tunable)) < len(tunable):
        words = "by default, for a device was named more than once: "
    elif trial is None:
        tuned, why = tuned_for(wish.choice(main), tunable)
        trial = tuned.setting if tuned else None
        words = f"{why}; " if tuned else f"by default, {why}: "
    each = trial.lanes if trial else default_lanes(names, wish)
    names = tuple(name for name in names for _ in range(each if name in tunable else 1))
    cpu_lanes = names.count("cpu")
    if named and cpu_lanes > 1 and not _fits(wish, cpu_lanes):
        need = cpu_lanes * lane_bytes(wish.choice("cpu").card, None)
        raise DeviceUnavailable(
            f"{cpu_lanes} CPU lanes need about {need / 1e9:.1f} GB, here are {memory_limit_bytes() / 1e9:.1f} GB: "
            "name cpu less often"
        )
    lanes = tuple(
        LanePlan(name, _setting(name, each, cores, trial if name in tunable else None), cores, cpus)
        for name, (cores, cpus) in zip(names, _cores(names), strict=True)
    )
    return Devices(lanes, reason, words + lanes[0].setting.words(main), named)


def _setting(device: str, lanes: int, cores: int, tuned: Setting | None) -> Setting:
    """What was tuned for GPUs alone leaves the lanes beside them their cores."""
    if device == "cpu":
        return tuned or default_setting("cpu", lanes, cores)
    setting = tuned or default_setting("gpu", lanes, cores)
    decode_threads = min(setting.decode_threads, cores)
    return replace(setting, decode_threads=decode_threads, hardware_share=allowed(setting.hardware_share))


def _cores(names: tuple[str, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Of each lane: how many, and the CPUs it is bound to. Together they have those of the host, or one each.

    Each CPU lane has its own, of one memory where that can be had; lanes on GPUs keep off those, and no more: which
    memory is near a GPU is not looked up.
    """
    own = divide(usable_cores(), len(names))
    off = [core for name, cores in zip(names, own, strict=True) if name != "cpu" for core in cores]
    evenly = shares(physical_cores(), len(names))  # of a container's quota, which may be less than its cores
    for name, cores, (first, last) in zip(names, own, evenly, strict=True):
        bound = [] if len(names) == 1 or "cpu" not in names else cores if name == "cpu" else off
        count = max(1, last - first)
        yield min(count, len(cores) or count), tuple(cpu for core in bound for cpu in core.cpus)


def default_lanes(names: tuple[str, ...], wish: EngineWish) -> int:
    """On each device. A CPU with several memories gets one for each: weights and batches lie beside their cores."""
    count = min(nodes(usable_cores()), physical_cores())  # of a container's quota there may be less than memories
    return count if names == ("cpu",) and count > 1 and _fits(wish, count) else 1


def _fits(wish: EngineWish, lanes: int) -> bool:
    return lanes * lane_bytes(wish.choice("cpu").card, None) < memory_limit_bytes()


def lane_specs(devices: Devices, source: Source, wish: EngineWish, logs: Path) -> list[LaneSpec]:
    """`logs` is the folder where lanes leave what their libraries print."""
    spec = wish.artifact.spec
    return [
        LaneSpec(
            name=f"{lane.device}/{number}", device=lane.device, source=source, artifact_path=wish.artifact.path,
            preprocess=spec.preprocess, runtime=wish.runtime, precision=wish.precision,
            engine_threads=lane.setting.engine_threads, decode_threads=lane.setting.decode_threads, space=spec.space,
            log_path=logs / f"{lane.device.replace(':', '')}-{number}.log", batch=lane.setting.batch,
            team=lane.setting.team, lead_batches=lane.setting.lead_batches,
            hardware_share=lane.setting.hardware_share, cpus=lane.cpus,
            cores=lane.cores,
        )
        for number, lane in enumerate(devices.lanes)
    ]  # fmt: skip


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
        threads=spec.engine_threads, batch=spec.batch, device=spec.kind, team=spec.team,
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

    stages = GpuStages(spec.preprocess, spec.decode_threads, board, spec.hardware_share)
    buffers = [cast(DeviceArray, engine.input(slot)) for slot in range(engine.slots)]
    canary(stages, Artifact.open(spec.artifact_path), buffers)
    return stages


def last_words(spec: LaneSpec, error: BaseException) -> Refused | Lost | Broken:
    """For the coordinator, while `error` is handled. A bug of ours must not pass for a GPU's fault, so it is asked."""
    if isinstance(error, EngineUnavailable | DeviceUnavailable):
        return Refused(sayable(str(error)))
    if isinstance(error, OutOfGpuMemory):
        return Lost(sayable(str(error)), full_at=spec.batch or _batch_of(spec))
    if spec.kind == "gpu":
        try:
            Stream().synchronize()  # after a fault, every call fails
        except (GpuError, OutOfGpuMemory) as sick:
            return Lost(sayable(f"{type(error).__name__}: {error}; {sick}"))
    with contextlib.suppress(OSError):  # the disk that failed may be the log's
        traceback.print_exc()  # into the lane's log
    words = f"{type(error).__name__}: {error}; the whole story is in {spec.log_path}"
    return Broken(sayable(f"{spec.name} failed, what is done is committed: {words}"))


def _batch_of(spec: LaneSpec) -> int:
    artifact = Artifact.open(spec.artifact_path)
    return choose(artifact, "vision", spec.runtime, spec.precision, spec.kind).card.batch
