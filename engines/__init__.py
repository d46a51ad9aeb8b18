"""Graph in, compiled engine out; engine in, vectors out.

`open_engine(artifact, "vision")` gives the fastest engine built for this host and logs why; naming a runtime that
cannot be had is an error with the reason and the command that fixes it. Runtimes are imported only when they are
opened: answering a text query needs ONNX Runtime and no torch.
"""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from engines.hardware import host_id, physical_cores
from engines.spec import Artifact, EngineCard, Precision, Tower

log = logging.getLogger(__name__)

# Else ONNX Runtime 1.31 keeps an id and a record of every session below ~/.cache/Microsoft, and sends them away.
# It looks once, when it is loaded, and nothing here loads it before this package.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

Device: TypeAlias = Literal["cpu", "gpu"]
# Name -> "module:class", called with (card_path, card, threads, batch).
CPU_RUNTIMES: dict[str, str] = {
    "ort-cpu": "engines.ort:OrtCpuEngine",
    "aoti-cpu": "engines.aoti:AotiCpuEngine",
}
GPU_RUNTIMES: dict[str, str] = {
    "tensorrt": "engines.ort_gpu:TensorRtEngine",
    "cuda": "engines.ort_gpu:CudaEngine",
    "aoti-cuda": "engines.aoti_gpu:AotiCudaEngine",
    "tensorrt-rtx": "engines.trt_gpu:TensorRtRtxEngine",
}
RUNTIMES = {**CPU_RUNTIMES, **GPU_RUNTIMES}


class EngineUnavailable(Exception):
    """An engine that was asked for cannot be had; the message says why and what to run."""


class Engine(Protocol):
    """Fixed batch shape, `slots` rotating input buffers. `b` is `card.batch`."""

    card: EngineCard
    slots: int

    def input(self, slot: int) -> Any:
        """The buffer the stage before writes into: (b, 3, s, s) for vision, (b, context) for text, `card.input_dtype`.

        It lies where the engine computes: a numpy array on the CPU, an `engines.memory_gpu.DeviceArray` on a GPU.
        """
        ...

    def launch(self, slot: int, n: int) -> None:
        """Start the forward pass of rows [0, n) of `slot`; asynchronous where the device is."""
        ...

    def result(self, slot: int) -> npt.NDArray[np.float16]:
        """Wait for `slot` and give its (n, d) unit-norm vectors, on the host, in memory the caller owns."""
        ...


class Choice(NamedTuple):
    """The card of the engine to open, and in words what it was chosen from."""

    path: Path
    card: EngineCard
    reason: str


def open_engine(
    artifact: Artifact,
    tower: Tower,
    runtime: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
    threads: int | None = None,
    batch: int | None = None,
    device: Device | None = None,
    team: int = 1,
) -> Engine:
    """The fastest engine of `artifact` that this host may run and that fits what was named.

    `threads` defaults to the physical cores this process may use, `batch` to what suits the engine and the threads,
    `device` to where the named runtime runs, and the CPU. On a GPU it is the first that this process sees. `team`
    threads work on one run together; aoti-cpu alone takes more than one.

    Raises:
        EngineUnavailable: no such engine, with the reason for each that came close and the command that builds one.
    """
    path, card, reason = choose(artifact, tower, runtime, precision, device)
    log.info("%s engine: %s", tower, reason)
    if not card.verified:
        log.warning("%s was built without a GPU and never compared with the reference: unverified", path.parent.name)
    elif not card.passed:
        log.warning("%s missed its accuracy bar when it was built: %s", path.parent.name, card.parity)
    return load_engine(path, card, threads or physical_cores(), batch, team)


def choose(
    artifact: Artifact,
    tower: Tower,
    runtime: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
    device: Device | None = None,
) -> Choice:
    """Which engine `open_engine` opens, and why."""
    if runtime not in {"auto", *RUNTIMES}:
        raise EngineUnavailable(f"unknown runtime {runtime!r}; known: auto, {', '.join(RUNTIMES)}")
    device = device or device_of(runtime)
    if runtime != "auto" and device != device_of(runtime):
        raise EngineUnavailable(f"runtime {runtime} runs on a {device_of(runtime)}, this lane is a {device}")
    asked = [
        (path, card)
        for path, card in artifact.cards()
        if card.tower == tower
        and device_of(card.runtime) == device
        and runtime in ("auto", card.runtime)
        and precision in ("auto", card.precision)
    ]
    refused: list[str] = []
    fit: list[tuple[Path, EngineCard]] = []
    for path, card in sorted(asked, key=lambda found: found[1].rows_per_s, reverse=True):
        why = _wrong_host(card) or _outdated(artifact, path, card) or (_doubt(card) if runtime == "auto" else "")
        if not why and precision == "auto" and card.precision == "int8":
            why = "int8 is only taken where it is named (--precision int8)"
        why = why or ("" if fit else _damaged(path, card))  # reads it whole: of the one that is taken alone
        if why:
            refused.append(f"{path.parent.name}: {why}")
        else:
            fit.append((path, card))
    if not fit:
        reasons = "; ".join(refused) or "none was built"
        named = {"RUNTIME": runtime, "PRECISION": precision}
        words = "".join(f" {name}={value}" for name, value in named.items() if value != "auto")
        line = f"make engines MODEL={artifact.spec.model}{words}"
        wish = f"runtime {runtime}, precision {precision}"
        raise EngineUnavailable(f"no {tower} engine for {wish}: {reasons}. Run: {line}")
    path, card = fit[0]
    against = ", ".join(f"{c.runtime} {c.precision} {c.rows_per_s:.1f}" for _, c in fit[1:])
    reason = f"{card.runtime} {card.precision}, {card.rows_per_s:.1f} rows/s when built"
    reason += f" (against {against})" if against else " (the only one)"
    return Choice(path, card, "; ".join([reason, *(f"passed over {why}" for why in refused)]))


def _doubt(card: EngineCard) -> str:
    """Why `auto` passes an engine over that may run here; empty where it does not."""
    if not card.verified:
        return "built without a GPU, never compared with the reference; name the runtime to use it all the same"
    return "" if card.passed else f"missed its accuracy bar ({card.parity}); name the runtime to use it all the same"


def device_of(runtime: str) -> Device:
    return "gpu" if runtime in GPU_RUNTIMES else "cpu"


def load_engine(path: Path, card: EngineCard, threads: int, batch: int | None = None, team: int = 1) -> Engine:
    """The engine of one card, unchecked."""
    module, _, name = RUNTIMES[card.runtime].partition(":")
    how = {"team": team} if team > 1 else {}
    return cast(Engine, getattr(import_module(module), name)(path, card, threads, batch, **how))


def refusal(artifact: Artifact, path: Path, card: EngineCard) -> str:
    """Why this host must not run the engine of `card`; empty where it may."""
    return _wrong_host(card) or stale(artifact, path, card)


def _wrong_host(card: EngineCard) -> str:
    if device_of(card.runtime) == "cpu":
        return "" if card.host == host_id() else f"built for {card.host}, this host is {host_id()}"
    from engines.memory_gpu import gpu_problem, gpus

    if problem := gpu_problem():
        return problem
    # What was built without a GPU is for every GPU of its compute capability.
    have = {gpu.identity if card.verified else gpu.sm for gpu in gpus()}
    return "" if card.host in have else f"built for {card.host}, here is {', '.join(sorted(have))}"


def stale(artifact: Artifact, path: Path, card: EngineCard) -> str:
    """Why the engine of `card` no longer belongs to `artifact` and to what is installed; empty where it does."""
    return _outdated(artifact, path, card) or _damaged(path, card)


def _outdated(artifact: Artifact, path: Path, card: EngineCard) -> str:
    if card.weights_digest != artifact.spec.weights_digest:
        return f"built from weights {card.weights_digest[:8]}, the artifact has {artifact.spec.weights_digest[:8]}"
    for package, built_with in card.versions.items():
        if (installed := _version(package)) != built_with:
            return f"built with {package} {built_with}, installed is {installed}"
    return "" if (path.parent / card.file).is_file() else f"{card.file} is missing"


def _damaged(path: Path, card: EngineCard) -> str:
    if (digest := file_digest(path.parent / card.file)) == card.file_digest:
        return ""
    return f"{card.file} has digest {digest[:8]}, its card says {card.file_digest[:8]}: damaged or replaced"


def file_digest(path: Path) -> str:
    """BLAKE3 of a file's bytes: 0.1 s for 350 MB in the page cache, and once per process.

    With one thread: a pool of them panics where there is no memory for its stacks.
    """
    stat = path.stat()
    return _file_digest(path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    return blake3().update_mmap(path).hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
