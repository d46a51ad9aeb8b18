"""Promise: a plan that does not fit in GPU memory leads to a smaller batch, whichever library keeps that to itself.

Without a GPU and without TensorRT: a library of its names that runs out of memory, on the stand-in CUDA runtime.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from lazy_gpu import LazyRuntime, gpu_card, lazy_runtime

from engines import EngineUnavailable, ort_gpu, trt_gpu
from engines.memory_gpu import OutOfGpuMemory
from engines.spec import Artifact, find_artifact

runtime = pytest.fixture(lazy_runtime)
FULL = "[executionContext.cpp::initialize::612] Error Code 2: OutOfMemory (Requested size was 202244096 bytes.)"
ROW_BYTES = 100_000  # of activations


@pytest.fixture
def artifact(tiny_model: Path) -> Artifact:
    return find_artifact(str(tiny_model))


class Library(ModuleType):
    """What trt_gpu uses of TensorRT to open a plan. `refuses` is what it says where a context would take memory."""

    __version__ = "10.16.1.11"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.refuses = ""
        self.given: list[tuple[str, Any]] = []

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)

    ExecutionContextAllocationStrategy = SimpleNamespace(STATIC="static", USER_MANAGED="user managed")

    def Runtime(self, log: Any) -> Any:
        def create_execution_context(strategy: str = "static") -> Any:
            self.given.append(("strategy", strategy))
            if self.refuses and strategy == "static":
                log.log(1, self.refuses)
                return None
            return self

        engine = SimpleNamespace(create_execution_context=create_execution_context)
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: engine if plan == b"plan" else None)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.rows = shape[0]
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return ROW_BYTES * self.rows

    def set_device_memory(self, pointer: int, nbytes: int) -> None:
        self.given.append(("memory", nbytes))


@pytest.fixture
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library(request.param)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


@pytest.mark.parametrize("library", ["tensorrt_rtx"], indirect=True)
def test_a_plan_takes_memory_for_the_rows_it_is_opened_with(
    artifact: Artifact, runtime: LazyRuntime, library: Library, tmp_path: Path
) -> None:
    """Its profile goes up to 256 rows, and by itself it would take what those need, however small the batch."""
    (tmp_path / "engine.plan").write_bytes(b"plan")
    card = gpu_card(artifact, "tensorrt-rtx", "fp16", file="engine.plan", batch=256, compiled_rows=256)

    def opened(batch: int) -> trt_gpu.TensorRtRtxEngine:
        return trt_gpu.TensorRtRtxEngine(tmp_path / "card.json", card, 1, batch)

    engine = opened(32)
    assert engine.card.batch == 32
    assert library.given == [("strategy", "user managed"), ("memory", 32 * ROW_BYTES)]
    runtime.bytes_left = 100 * ROW_BYTES
    with pytest.raises(OutOfGpuMemory):
        opened(256)
    assert opened(64).card.batch == 64


@pytest.mark.parametrize("library", ["tensorrt_rtx"], indirect=True)
def test_a_plan_that_does_not_know_its_memory_is_refused(
    artifact: Artifact, runtime: LazyRuntime, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 bytes are the library's way to say that it failed: it must not run on memory that is none."""
    (tmp_path / "engine.plan").write_bytes(b"plan")
    card = gpu_card(artifact, "tensorrt-rtx", "fp16", file="engine.plan", batch=256, compiled_rows=256)
    monkeypatch.setattr(library, "update_device_memory_size_for_shapes", lambda: 0)
    with pytest.raises(EngineUnavailable, match=r"engine\.plan does not say what 8 rows take in memory: no reason"):
        trt_gpu.TensorRtRtxEngine(tmp_path / "card.json", card, 1, 8)


def never_opens(graph: Path, *_: object) -> Any:
    raise EngineUnavailable(f"TensorrtExecutionProvider does not open {graph.name}: could not build execution context.")


@pytest.mark.parametrize("library", ["tensorrt"], indirect=True)
@pytest.mark.parametrize(
    ("plan", "says", "error", "words"),
    [
        (
            b"plan",
            FULL,
            OutOfGpuMemory,
            "opening engine.plan does not fit in GPU memory: .*Requested size was 202244096",
        ),
        (b"plan", "Error Code 6: API Usage Error", EngineUnavailable, "execution context. TensorRT says: Error Code 6"),
        (b"of another version", "", EngineUnavailable, "TensorRT says: tensorrt cannot read the plan: no reason given"),
        (b"plan", "", EngineUnavailable, r"does not open engine.onnx: could not build execution context\.$"),
    ],
    ids=["full", "refused", "unreadable", "opens by itself"],
)
def test_tensorrt_is_asked_for_the_reason_that_onnx_runtime_keeps(
    artifact: Artifact, runtime: LazyRuntime, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    plan: bytes, says: str, error: type[Exception], words: str,
) -> None:  # fmt: skip
    (tmp_path / "engine.plan").write_bytes(plan)
    library.refuses = says
    monkeypatch.setattr(ort_gpu, "open_gpu_session", never_opens)
    card = gpu_card(artifact, "tensorrt", "fp16", file="engine.plan", batch=256, compiled_rows=256)
    with pytest.raises(error, match=words):
        ort_gpu.TensorRtEngine(tmp_path / "card.json", card, 1, 256)
