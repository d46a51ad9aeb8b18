"""Graph in, compiled engine out; engine in, vectors out.

`open_engine(artifact, "vision")` gives the fastest engine built for this host and logs why; naming a runtime that
cannot be had is an error with the reason and the command that fixes it. Runtimes are imported only when they are
opened: answering a text query needs ONNX Runtime and no torch.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from engines.hardware import host_id, physical_cores
from engines.spec import Artifact, EngineCard, Precision, Tower

log = logging.getLogger(__name__)

# Name -> "module:class", called with (card_path, card, threads, batch).
RUNTIMES: dict[str, str] = {
    "ort-cpu": "engines.ort:OrtCpuEngine",
    "aoti-cpu": "engines.aoti:AotiCpuEngine",
}


class EngineUnavailable(Exception):
    """An engine that was asked for cannot be had; the message says why and what to run."""


class Engine(Protocol):
    """Fixed batch shape, `slots` rotating input buffers. `b` is `card.batch`."""

    card: EngineCard
    slots: int

    def input(self, slot: int) -> npt.NDArray[Any]:
        """The buffer the stage before writes into: (b, 3, s, s) float32 for vision, (b, context) int32 for text."""
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
) -> Engine:
    """The fastest engine of `artifact` that this host may run and that fits what was named.

    `threads` defaults to the physical cores this process may use, `batch` to what suits the engine and the threads.

    Raises:
        EngineUnavailable: no such engine, with the reason for each that came close and the command that builds one.
    """
    path, card, reason = choose(artifact, tower, runtime, precision)
    log.info("%s engine: %s", tower, reason)
    if not card.passed:
        log.warning("%s missed its accuracy bar when it was built: %s", path.parent.name, card.parity)
    return load_engine(path, card, threads or physical_cores(), batch)


def choose(
    artifact: Artifact,
    tower: Tower,
    runtime: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
) -> Choice:
    """Which engine `open_engine` opens, and why."""
    if runtime not in {"auto", *RUNTIMES}:
        raise EngineUnavailable(f"unknown runtime {runtime!r}; known: auto, {', '.join(RUNTIMES)}")
    asked = [
        (path, card)
        for path, card in artifact.cards()
        if card.tower == tower and runtime in ("auto", card.runtime) and precision in ("auto", card.precision)
    ]
    refused: list[str] = []
    fit: list[tuple[Path, EngineCard]] = []
    for path, card in asked:
        why = refusal(artifact, path, card) or (
            f"missed its accuracy bar ({card.parity}); name the runtime to use it all the same"
            if runtime == "auto" and not card.passed
            else ""
        )
        if why:
            refused.append(f"{path.parent.name}: {why}")
        else:
            fit.append((path, card))
    if not fit:
        reasons = "; ".join(refused) or "none was built"
        line = f"make engines MODEL={artifact.spec.model}" + (f" RUNTIME={runtime}" if runtime != "auto" else "")
        wish = f"runtime {runtime}, precision {precision}"
        raise EngineUnavailable(f"no {tower} engine for {wish}: {reasons}. Run: {line}")
    path, card = max(fit, key=lambda found: found[1].rows_per_s)
    against = ", ".join(f"{c.runtime} {c.precision} {c.rows_per_s:.1f}" for _, c in fit if c is not card)
    reason = f"{card.runtime} {card.precision}, {card.rows_per_s:.1f} rows/s when built"
    reason += f" (against {against})" if against else " (the only one)"
    return Choice(path, card, "; ".join([reason, *(f"passed over {why}" for why in refused)]))


def load_engine(path: Path, card: EngineCard, threads: int, batch: int | None = None) -> Engine:
    """The engine of one card, unchecked."""
    module, _, name = RUNTIMES[card.runtime].partition(":")
    return cast(Engine, getattr(import_module(module), name)(path, card, threads, batch))


def refusal(artifact: Artifact, path: Path, card: EngineCard) -> str:
    """Why this host must not run the engine of `card`; empty where it may."""
    if card.host != host_id():
        return f"built for {card.host}, this host is {host_id()}"
    if card.weights_digest != artifact.spec.weights_digest:
        return f"built from weights {card.weights_digest[:8]}, the artifact has {artifact.spec.weights_digest[:8]}"
    for package, built_with in card.versions.items():
        if (installed := _version(package)) != built_with:
            return f"built with {package} {built_with}, installed is {installed}"
    file = path.parent / card.file
    if not file.is_file():
        return f"{card.file} is missing"
    if (digest := file_digest(file)) != card.file_digest:
        return f"{card.file} has digest {digest[:8]}, its card says {card.file_digest[:8]}: damaged or replaced"
    return ""


def file_digest(path: Path) -> str:
    """BLAKE3 of a file's bytes: 0.1 s for 350 MB in the page cache, and once per process."""
    stat = path.stat()
    return _file_digest(path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
