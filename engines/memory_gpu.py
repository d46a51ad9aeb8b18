"""GPU memory, streams and events through `cuda-bindings`, without torch. Not run on a GPU yet.

    rows = device_array((256, 3, 224, 224), np.float16)    # for a stage to fill, on its own stream
    stage.wait(engine_is_done); ...; rows.ready.record(stage)
    engine.wait(rows.ready); ...                           # nobody waits on the host

Importing this file needs no GPU library and no GPU; `gpu_problem()` says in words why there is none to use, `gpus()` is
empty then. Memory is plain `cudaMalloc`, taken once per lane: a request that does not fit raises `OutOfGpuMemory`.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# cudaErrorMemoryAllocation. Names of the enum differ between bindings of CUDA 12 and 13, numbers do not.
OUT_OF_MEMORY = 2
# The same from ONNX Runtime (the first), cuBLAS and cuDNN, TensorRT, CV-CUDA and nvImageCodec.
OUT_OF_MEMORY_WORDS = (
    "failed to allocate memory", "out of memory", "alloc_failed", "outofmemory", "out_of_memory",
    "cudaerrormemoryallocation", "cuda runtime failure: '#2'",
)  # fmt: skip
INSTALL = "pip install 'nightjar[gpu-cu13]' (driver 580 or newer) or 'nightjar[gpu-cu12]'"
NVML = "libnvidia-ml.so.1"


class GpuError(RuntimeError):
    """A CUDA call failed. After most of them this process can do nothing more on the GPU: start a new one."""


class OutOfGpuMemory(RuntimeError):
    """GPU memory does not hold what was asked for; a smaller batch may fit."""


class GpuInfo(NamedTuple):
    index: int  # type: ignore[assignment]  # among the GPUs this process may see; hides tuple.index
    name: str  # such as "NVIDIA H200"
    sm: str  # compute capability, such as "sm90"
    memory_bytes: int
    driver: str  # such as "580.65.06"; "cuda13.0" where NVML does not answer
    uuid: str  # such as "GPU-8f2c...": what CUDA_VISIBLE_DEVICES takes

    @property
    def identity(self) -> str:
        """Engines built on a GPU of one identity are refused by every other."""
        name = "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())
        return f"{self.sm}-{name}-driver{self.driver}"


class Stream:
    """A non-blocking CUDA stream: it does not wait for the legacy default stream, nor that for it."""

    def __init__(self) -> None:
        runtime = _runtime()
        self.handle: int = int(_call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking))
        # Never destroyed: libraries free pictures on their stream when those go, in an order that nobody chooses at the
        # end of a process, and a C++ destructor that fails takes the process down.

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle

    def synchronize(self) -> None:
        _call("cudaStreamSynchronize", self.handle)

    def wait(self, event: Event) -> None:
        """What is queued here from now on runs after `event`; the host goes on. An event never recorded is past."""
        _call("cudaStreamWaitEvent", self.handle, event.handle, 0)


class Event:
    """A point in a stream. Whoever waits for it on the host sleeps: spinning would take a core from the decoders."""

    def __init__(self) -> None:
        runtime = _runtime()
        self.handle: int = int(_call("cudaEventCreateWithFlags", runtime.cudaEventBlockingSync))
        weakref.finalize(self, runtime.cudaEventDestroy, self.handle)

    def record(self, stream: Stream) -> None:
        _call("cudaEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        _call("cudaEventSynchronize", self.handle)


class DeviceArray:
    """A contiguous array on the GPU. `ready` is recorded by whoever fills it, on its own stream, as its last act."""

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike, pointer: int, ready: Event, owner: object) -> None:
        self.shape, self.dtype, self.pointer, self.ready = shape, np.dtype(dtype), pointer, ready
        self._owner = owner  # keeps the memory: freed when the last view is gone

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3. Stream -1: whoever takes it has ordered its work already, so nobody synchronises for it."""
        return {
            "shape": self.shape, "typestr": self.dtype.str, "data": (self.pointer, False), "version": 3,
            "strides": None, "stream": -1,
        }  # fmt: skip

    def rows(self, stop: int, start: int = 0) -> DeviceArray:
        """A view of rows [start, stop)."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"rows [{start}, {stop}) of an array of {len(self)} rows")
        row_bytes = self.nbytes // max(1, len(self))
        shape = (stop - start, *self.shape[1:])
        return DeviceArray(shape, self.dtype, self.pointer + start * row_bytes, self.ready, self._owner)

    def fill(self, host: npt.NDArray[Any], stream: Stream) -> None:
        """Copy `host` of the same shape here, converted to this dtype, and record `ready`. Waits: not for the loop."""
        converted = np.ascontiguousarray(host, self.dtype)  # must live until the copy is done
        copy_to_device(self, converted, stream)
        self.ready.record(stream)
        self.ready.synchronize()


def has_room(nbytes: int, stream: Stream) -> bool:
    """Whether `nbytes` more can be had now, from the pool that libraries take the buffers of one call from."""
    try:
        pointer = _call("cudaMallocAsync", nbytes, stream.handle)
    except OutOfGpuMemory:
        return False
    _call("cudaFreeAsync", int(pointer), stream.handle)
    return True


@contextmanager
def told_out_of_memory(what: str) -> Iterator[None]:
    """Libraries say it in words only, in exceptions of several kinds that share no base but Exception."""
    try:
        yield
    except OutOfGpuMemory:
        raise
    except Exception as error:
        if says_out_of_memory(str(error)):
            raise OutOfGpuMemory(f"{what} does not fit in GPU memory: {error}") from error
        raise


def says_out_of_memory(words: str) -> bool:
    return any(known in words.lower() for known in OUT_OF_MEMORY_WORDS)


class _Allocation:
    """Owns one block of memory and gives it back when nobody holds it any more."""

    def __init__(self, pointer: int, free: Any) -> None:
        self.pointer = pointer
        weakref.finalize(self, free, pointer)


def device_array(shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
    """Uninitialised GPU memory.

    Raises:
        OutOfGpuMemory: it does not fit.
    """
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    pointer = int(_call("cudaMalloc", nbytes))
    return DeviceArray(shape, dtype, pointer, Event(), _Allocation(pointer, _runtime().cudaFree))


def pinned_array(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Page-locked host memory: the only kind that a GPU copies to and from while the host goes on."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    pointer = int(_call("cudaHostAlloc", nbytes, _runtime().cudaHostAllocDefault))
    block = (ctypes.c_uint8 * nbytes).from_address(pointer)
    weakref.finalize(block, _runtime().cudaFreeHost, pointer)  # every view of the array keeps the block alive
    array: npt.NDArray[Any] = np.ctypeslib.as_array(block).view(dtype).reshape(shape)
    return array


def copy_to_host(target: npt.NDArray[Any], source: DeviceArray, stream: Stream) -> None:
    """Queue a copy. `target` must be page-locked, or the host waits for it."""
    _copy(target.ctypes.data, source.pointer, _same_bytes(target, source), "cudaMemcpyDeviceToHost", stream)


def copy_to_device(target: DeviceArray, source: npt.NDArray[Any], stream: Stream) -> None:
    """Queue a copy. A page-locked `source` must stay as it is until an event after it has passed."""
    _copy(target.pointer, source.ctypes.data, _same_bytes(source, target), "cudaMemcpyHostToDevice", stream)


def _same_bytes(host: npt.NDArray[Any], device: DeviceArray) -> int:
    if host.shape != device.shape or host.dtype != device.dtype or not host.flags.c_contiguous:
        raise ValueError(
            f"a copy needs two contiguous arrays of one shape and dtype: {host.shape} {host.dtype} on the host, "
            f"{device.shape} {device.dtype} on the GPU"
        )
    return device.nbytes


def _copy(target: int, source: int, nbytes: int, kind: str, stream: Stream) -> None:
    _call("cudaMemcpyAsync", target, source, nbytes, getattr(_runtime().cudaMemcpyKind, kind), stream.handle)


def gpus() -> list[GpuInfo]:
    """The GPUs this process may see; empty where there is none to use, and then `gpu_problem` says why."""
    return list(_found()[0])


def gpu_problem() -> str:
    """Why there is no GPU to use, and what to do; empty where there is one."""
    return _found()[1]


@lru_cache(maxsize=1)
def _found() -> tuple[tuple[GpuInfo, ...], str]:
    try:
        if not int(_call("cudaDriverGetVersion")):
            return (), "no GPU can be used: no NVIDIA driver is installed (nvidia-smi would list one)"
        count = int(_call("cudaGetDeviceCount"))
    except ImportError as error:
        return (), f"cuda-bindings cannot be imported ({error}): {INSTALL}"
    except GpuError as error:
        return (), f"no GPU can be used: {error}. Check that nvidia-smi lists one and that its driver is new enough"
    if not count:
        return (), "no GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    driver = _driver_version() or "cuda{}.{}".format(*divmod(int(_call("cudaDriverGetVersion")) // 10, 100))
    found = []
    for index in range(count):
        properties = _call("cudaGetDeviceProperties", index)
        raw = bytes(properties.uuid.bytes).hex()
        uuid = f"GPU-{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}"
        name, sm = bytes(properties.name).split(b"\0")[0].decode(), f"sm{properties.major}{properties.minor}"
        found.append(GpuInfo(index, name, sm, int(properties.totalGlobalMem), driver, uuid))
    return tuple(found), ""


def _driver_version() -> str:
    """As nvidia-smi shows it; empty where NVML cannot be asked."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return ""
    words = ctypes.create_string_buffer(80)
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(words, ctypes.c_uint(len(words))):
        return ""
    return words.value.decode()


@lru_cache(maxsize=1)
def _runtime() -> Any:
    return importlib.import_module("cuda.bindings.runtime")


def _call(name: str, *arguments: Any) -> Any:
    """What a function of the CUDA runtime gives besides its error code.

    Raises:
        OutOfGpuMemory: the GPU, or page-locked host memory, is full.
        GpuError: any other failure.
    """
    runtime = _runtime()
    code, *values = getattr(runtime, name)(*arguments)
    if int(code):
        runtime.cudaGetLastError()  # else the next library that asks for it takes our failure for its own
    if int(code) == OUT_OF_MEMORY:
        raise OutOfGpuMemory(f"{name}{arguments if arguments else ''} does not fit in GPU memory: use a smaller batch")
    if int(code):
        words = runtime.cudaGetErrorString(code)[1]
        raise GpuError(f"{name} failed with code {int(code)}: {bytes(words).decode()}")
    return values[0] if values else None
