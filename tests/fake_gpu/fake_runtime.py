"""Stands in for `cuda.bindings.runtime`: device memory is host memory, queued work is done at once, faults to order.

    FAKE_GPU = {"folder": "...", "gpus": 2,          where it keeps what outlives a process; how many GPUs there are
                "bytes": 300000,                     memory of each
                "room": 2,                           pictures of a batch whose pixels fit beside all else
                "dies": {"0": 5}, "for_ever": true,  GPU 0 faults at its fifth batch; once, or from then on
                "wrong": [1],                        GPUs that decode every picture to zeros
                "after": {"cpu": ["gpu:0"]},         the CPU's lane starts when GPU 0's has started or failed to
                "slow": 0.1}                         seconds that every batch of a GPU takes

A picture whose bytes end with GPU-KILL makes the GPU that decodes it fault, every time; GPU-HANG never comes back.
"""

from __future__ import annotations

import ctypes
import json
import os
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ORDERS: dict[str, Any] = json.loads(os.environ.get("FAKE_GPU", "{}"))
FULL, NO_DEVICE, FAULT = 2, 100, 719
WORDS = {FULL: b"out of memory", NO_DEVICE: b"no CUDA-capable device is detected", FAULT: b"unspecified launch failure"}
cudaStreamNonBlocking = cudaEventBlockingSync = 1
cudaHostAllocDefault = 0
synchronised = 0  # times that the host waited for a stream
used_bytes = 0
_blocks: dict[int, Any] = {}
_fault = 0
_batches = 0


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


def visible() -> list[int]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    everything = range(ORDERS.get("gpus", 1))
    found = everything if given is None else [int(number) for number in given.split(",") if number]
    return [number for number in found if not _grave(number).exists()]


def mine() -> int:
    """The number of the one GPU that a lane sees."""
    return int(os.environ.get("CUDA_VISIBLE_DEVICES") or 0)


def fault() -> None:
    global _fault
    _fault = FAULT


def batch_done() -> None:
    """One more batch on this GPU; it may be its last."""
    global _batches
    _batches += 1
    number = mine()
    if _batches == ORDERS.get("dies", {}).get(str(number)) and not _warning(number).exists():
        _warning(number).touch()
        if ORDERS.get("for_ever"):
            _grave(number).touch()
        fault()


def started(device: str) -> Path:
    return Path(ORDERS["folder"]) / f"started-{device}"


def _grave(number: int) -> Path:
    return Path(ORDERS.get("folder", "/nowhere")) / f"dead-{number}"


def _warning(number: int) -> Path:
    return Path(ORDERS.get("folder", "/nowhere")) / f"died-{number}"


def _done(*values: object) -> tuple[object, ...]:
    return (_fault, *values)


def cudaGetDeviceCount() -> tuple[object, ...]:
    count = len(visible())
    return (0 if count else NO_DEVICE, count)


def cudaDriverGetVersion() -> tuple[object, ...]:
    return 0, 13000


def cudaGetDeviceProperties(index: int) -> tuple[object, ...]:
    uuid = SimpleNamespace(bytes=bytes([index] * 16))
    return 0, SimpleNamespace(uuid=uuid, name=b"Fake GPU\0\0", major=9, minor=0, totalGlobalMem=1 << 30)


def cudaGetErrorString(code: int) -> tuple[object, ...]:
    return 0, WORDS[code]


def cudaMalloc(nbytes: int) -> tuple[object, ...]:
    global used_bytes
    if used_bytes + nbytes > ORDERS.get("bytes", 1 << 40):
        return FULL, 0
    used_bytes += nbytes
    return _done(_new(nbytes))


def cudaMallocAsync(nbytes: int, stream: int) -> tuple[object, ...]:
    return (FULL, 0) if "room" in ORDERS else cudaMalloc(nbytes)


def cudaFreeAsync(pointer: int, stream: int) -> tuple[object, ...]:
    return cudaFree(pointer)


def cudaGetLastError() -> tuple[object, ...]:
    return (_fault,)


def cudaHostAlloc(nbytes: int, flags: int) -> tuple[object, ...]:
    return _done(_new(nbytes))


def _new(nbytes: int) -> int:
    block = (ctypes.c_uint8 * max(1, nbytes)).from_buffer(bytearray(b"\xee" * max(1, nbytes)))
    _blocks[ctypes.addressof(block)] = block
    return ctypes.addressof(block)


def cudaFree(pointer: int) -> tuple[object, ...]:
    global used_bytes
    used_bytes -= len(_blocks[pointer])
    return cudaFreeHost(pointer)


def cudaFreeHost(pointer: int) -> tuple[object, ...]:
    del _blocks[pointer]
    return _done()


def cudaMemcpyAsync(target: int, source: int, nbytes: int, kind: int, stream: int) -> tuple[object, ...]:
    ctypes.memmove(target, source, nbytes)
    return _done()


def cudaStreamCreateWithFlags(flags: int) -> tuple[object, ...]:
    return _done(77)


def cudaEventCreateWithFlags(flags: int) -> tuple[object, ...]:
    return _done(78)


def cudaStreamSynchronize(stream: int) -> tuple[object, ...]:
    global synchronised
    synchronised += 1
    return _done()


def cudaStreamDestroy(stream: int) -> tuple[object, ...]:
    return _done()


def cudaEventDestroy(event: int) -> tuple[object, ...]:
    return _done()


def cudaEventRecord(event: int, stream: int) -> tuple[object, ...]:
    return _done()


def cudaEventSynchronize(event: int) -> tuple[object, ...]:
    return _done()


def cudaStreamWaitEvent(stream: int, event: int, flags: int) -> tuple[object, ...]:
    return _done()
