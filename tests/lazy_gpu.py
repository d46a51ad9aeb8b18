"""A CUDA runtime of our own, which runs nothing before somebody waits for it, and engines on it without a GPU."""

from __future__ import annotations

import ctypes
import gc
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engines import choose, memory_gpu, ort, ort_gpu
from engines.memory_gpu import GpuInfo
from engines.spec import Artifact, EngineCard

GPU = GpuInfo(0, "NVIDIA L4", "sm89", 24 << 30, "580.65.06", "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f")


class LazyRuntime:
    """CUDA's runtime on host memory. Each stream is a queue, and nothing in it happens before the host waits.

    What our code forgets to order therefore comes out wrong every time, not once in a thousand.
    """

    cudaStreamNonBlocking = cudaEventBlockingSync = 1
    cudaHostAllocDefault = 0

    class cudaMemcpyKind(IntEnum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.queues: dict[int, deque[Callable[[], None]]] = {}
        self.events: dict[int, tuple[int, int]] = {}  # event -> (stream, operations that were queued before it)
        self.ran: dict[int, int] = {}
        self.waits = 0
        self.bytes_left = 1 << 40
        self.last_error = 0

    def run(self, stream: int, until: int) -> None:
        while self.ran[stream] < until:
            operation = self.queues[stream].popleft()
            self.ran[stream] += 1
            operation()

    def queue(self, stream: int, operation: Callable[[], None]) -> None:
        self.queues[stream].append(operation)

    def _new(self, table: dict[int, Any], value: Any) -> int:
        handle = 1000 + len(table)
        table[handle] = value
        return handle

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, 13000

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, 1

    def cudaGetDeviceProperties(self, index: int) -> tuple[int, Any]:
        uuid = SimpleNamespace(bytes=bytes(range(16)))
        return 0, SimpleNamespace(name=b"NVIDIA L4\0\0", uuid=uuid, major=8, minor=9, totalGlobalMem=24 << 30)

    def cudaGetErrorString(self, code: int) -> tuple[int, bytes]:
        return 0, b"some words"

    def cudaMalloc(self, nbytes: int) -> tuple[int, int]:
        if nbytes > self.bytes_left:
            self.last_error = memory_gpu.OUT_OF_MEMORY
            return memory_gpu.OUT_OF_MEMORY, 0
        self.bytes_left -= nbytes
        block = (ctypes.c_uint8 * nbytes).from_buffer(bytearray(b"\x7e" * nbytes))  # NaN in every float
        self.blocks[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaMallocAsync(self, nbytes: int, stream: int) -> tuple[int, int]:
        return self.cudaMalloc(nbytes)

    def cudaFreeAsync(self, pointer: int, stream: int) -> tuple[int]:
        return self.cudaFree(pointer)

    def cudaGetLastError(self) -> tuple[int]:
        found, self.last_error = self.last_error, 0
        return (found,)

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[int, int]:
        return self.cudaMalloc(nbytes)

    def cudaFree(self, pointer: int) -> tuple[int]:
        self.bytes_left += len(self.blocks.pop(pointer))
        return (0,)

    cudaFreeHost = cudaFree

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        stream = self._new(self.queues, deque())
        self.ran[stream] = 0
        return 0, stream

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[int, int]:
        return 0, self._new(self.events, (0, 0))

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        return (0,)

    def cudaEventDestroy(self, event: int) -> tuple[int]:
        return (0,)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[int]:
        self.events[event] = stream, self.ran[stream] + len(self.queues[stream])
        return (0,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[int]:
        source, until = self.events[event]
        if source:
            self.queue(stream, lambda: self.run(source, until))
        return (0,)

    def cudaEventSynchronize(self, event: int) -> tuple[int]:
        self.waits += 1
        stream, until = self.events[event]
        if stream:
            self.run(stream, until)
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        self.waits += 1
        self.run(stream, self.ran[stream] + len(self.queues[stream]))
        return (0,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> tuple[int]:
        self.queue(stream, lambda: ctypes.memmove(target, source, nbytes))
        return (0,)


def lazy_runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[LazyRuntime]:
    """To be a fixture: what `engines.memory_gpu` calls is lazy, and there is one GPU, `GPU`."""
    lazy = LazyRuntime()
    monkeypatch.setattr(memory_gpu, "_runtime", lambda: lazy)
    monkeypatch.setattr(memory_gpu, "_driver_version", lambda: GPU.driver)
    memory_gpu._found.cache_clear()
    yield lazy
    gc.collect()
    memory_gpu._found.cache_clear()


def gpu_card(artifact: Artifact, runtime: str = "cuda", precision: str = "fp32", **changes: Any) -> EngineCard:
    """As a build on that GPU would write it, over the portable graph."""
    card = choose(artifact, "vision", "ort-cpu").card
    changes = {"host": GPU.identity, "compiled_rows": 0, "batch": 32, "threads": 0, "rows_per_s": 1e5, **changes}
    return replace(card, runtime=runtime, precision=cast(Any, precision), **changes)


class CpuProviderEngine(ort_gpu.OrtGpuEngine):
    """All of the GPU engine but its provider: binding by pointer, slots, streams, copies and events."""

    provider, place = ort.CPU_PROVIDER, "cpu"

    def provider_options(self, precision: Any, graphed: bool) -> dict[str, str]:
        return {}

    def _session(self, graph: Path, graphed: bool) -> Any:
        return ort.open_session(graph, self.provider)

    def _enqueue(self, slot: int) -> None:
        memory_gpu._runtime().queue(self.stream.handle, lambda: super(CpuProviderEngine, self)._enqueue(slot))


def cpu_engine(artifact: Artifact, **how: Any) -> CpuProviderEngine:
    card = gpu_card(artifact, **how.pop("card", {}))
    path = choose(artifact, "vision", "ort-cpu").path
    return CpuProviderEngine(path, card, 1, how.pop("batch", None), **how)
