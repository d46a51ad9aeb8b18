"""AOTInductor engines. `aoti-cpu` is a C++/OpenMP library made from one tower, for one CPU and a few rows a run.

The library is run through its C ABI with ctypes, which gives the GIL back while it computes: a spinning Python thread
stalls for 36 ms beside a run, against 345 ms beside torch's own runner, and decoding lives in such threads. Only
libtorch_cpu is loaded, not Python's torch: 0.3 s instead of 1.9 s, 110 MB less. Outputs are the same bits either way.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import byref, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engines import EngineUnavailable
from engines.spec import EngineCard, Precision
from engines.turns import turn

RUNS_PER_WORKER = 2  # in one batch, so that a worker that was held up leaves its second run to the others
# Buffers of a run go back to the allocator, not to the kernel, which would clear their pages anew for the next: 2 % of
# bf16's time, 4 % of int8's. Arrays larger than the second limit, glibc's highest, are mapped alone as ever.
M_TRIM_THRESHOLD, TRIM_BYTES = -1, 128 << 20
M_MMAP_THRESHOLD, MMAP_BYTES = -3, 32 << 20
TORCH_DTYPES = {"float32": "float32", "int32": "int32", "bf16": "bfloat16", "fp32": "float32", "int8": "int8"}


class LibTorch:
    """The few C functions of libtorch_cpu that a compiled library and its tensors need."""

    def __init__(self, folder: Path) -> None:
        # RTLD_GLOBAL: a compiled library finds its symbols here.
        self._lib = ctypes.CDLL(str(folder / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
        self._cpu = int(self._lib.aoti_torch_device_type_cpu())
        self._omp = ctypes.CDLL(str(folder / "libgomp.so.1"))
        self._lib.MKL_Set_Num_Threads_Local.argtypes = [c_int32]
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # other C libraries than glibc have none, and no such thresholds
            libc.mallopt(c_int32(M_TRIM_THRESHOLD), c_int32(TRIM_BYTES))
            libc.mallopt(c_int32(M_MMAP_THRESHOLD), c_int32(MMAP_BYTES))

    def use_threads(self, threads: int) -> None:
        """For the calling thread alone: a decoder that asks torch for one thread keeps it, and does not slow us."""
        self._omp.omp_set_num_threads(c_int32(threads))
        self._lib.MKL_Set_Num_Threads_Local(threads)

    def tensor(self, pointer: int, shape: Sequence[int], dtype: str) -> c_void_p:
        """A tensor over memory that the caller keeps alive. The caller owns the handle."""
        strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
        sizes_c, strides_c = (c_int64 * len(shape))(*shape), (c_int64 * len(shape))(*strides)
        torch_dtype = c_int32(getattr(self._lib, f"aoti_torch_dtype_{TORCH_DTYPES[dtype]}")())
        handle = c_void_p()
        code = self._lib.aoti_torch_create_tensor_from_blob_v2(
            c_void_p(pointer), c_int64(len(shape)), sizes_c, strides_c, c_int64(0), torch_dtype, c_int32(self._cpu),
            c_int32(0), byref(handle), c_int32(0), None, c_int64(0),
        )  # fmt: skip
        _expect_ok(code, "aoti_torch_create_tensor_from_blob_v2")
        return handle

    def address(self, tensor: c_void_p) -> int:
        pointer = c_void_p()
        _expect_ok(self._lib.aoti_torch_get_data_ptr(tensor, byref(pointer)), "aoti_torch_get_data_ptr")
        return pointer.value or 0

    def delete(self, tensor: c_void_p) -> None:
        _expect_ok(self._lib.aoti_torch_delete_tensor_object(tensor), "aoti_torch_delete_tensor_object")

    def square_product(self, precision: Precision, size: int, threads: int) -> Callable[[], None]:
        """A call that multiplies two random size x size matrices: what the GEMM peak is measured with."""
        values = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
        if precision == "bf16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)  # the upper half of a float32 is a bfloat16
        elif precision == "int8":
            values = (values * 40).astype(np.int8)
        sums = np.zeros((size, size), np.int32)
        a, b = (self.tensor(matrix.ctypes.data, matrix.shape, precision) for matrix in values)
        into = self.tensor(sums.ctypes.data, sums.shape, "int32")

        def multiply(_keeps: tuple[npt.NDArray[Any], ...] = (values, sums)) -> None:
            self.use_threads(threads)
            if precision == "int8":
                _expect_ok(self._lib.aoti_torch_cpu__int_mm_out(into, a, b), "aoti_torch_cpu__int_mm_out")
                return
            made, none, few = c_void_p(), None, c_int64(0)
            product = self._lib.aoti_torch_cpu__linear_pointwise  # oneDNN: torch.mm is MKL, half as fast on AMD in fp32
            _expect_ok(product(a, b, none, b"none", none, few, none, byref(made)), "aoti_torch_cpu__linear_pointwise")
            self.delete(made)

        return multiply


@lru_cache(maxsize=1)
def open_libtorch() -> LibTorch:
    found = importlib.util.find_spec("torch")  # finds, does not import
    if found is None or not found.submodule_search_locations:
        raise EngineUnavailable("aoti-cpu needs the libraries of torch: pip install 'nightjar[cpu]'")
    return LibTorch(Path(found.submodule_search_locations[0]) / "lib")


class AotiCpuEngine:
    """One library, `threads` workers that run it on a few rows each, `slots` input buffers.

    A batch is cut into runs of the compiled size; each worker takes the next run, with an OpenMP team of its own of
    `team` threads. One thread a run is fastest: nothing waits at the barriers of a hundred parallel regions, which cost
    5 % on an idle machine and a third of the speed beside other work. Bits depend on neither number.
    """

    slots = 3  # two batches with the workers, one that is being filled

    def __init__(self, card_path: Path, card: EngineCard, threads: int, batch: int | None, team: int = 1) -> None:
        self._torch, self._model = open_libtorch(), _load(card_path.parent / card.file)
        self._team, self._run_rows, workers = team, card.compiled_rows, max(1, threads // team)
        batch = batch or card.compiled_rows * RUNS_PER_WORKER * workers
        buffer_rows = -(-batch // card.compiled_rows) * card.compiled_rows
        self.card = replace(card, batch=batch, threads=threads)
        self._inputs = [np.zeros((buffer_rows, *card.row_shape), card.input_dtype) for _ in range(self.slots)]
        self._outputs = [np.zeros((buffer_rows, card.dim), np.float32) for _ in range(self.slots)]
        self._rows = [0] * self.slots
        self._runs: list[list[Future[None]]] = [[] for _ in range(self.slots)]
        self._container = c_void_p()
        create = self._model.AOTInductorModelContainerCreateWithDevice
        self._checked(create(byref(self._container), c_size_t(workers), b"cpu", None))  # one copy of the weights
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="aoti")

    def input(self, slot: int) -> npt.NDArray[Any]:
        return self._inputs[slot][: self.card.batch]

    def launch(self, slot: int, n: int) -> None:
        """Asynchronous: launching the next slot before this one's result is asked for keeps every worker busy.

        Rows from `n` on keep what an earlier batch left there; no row depends on another.
        """
        self._rows[slot] = n
        self._runs[slot] = [self._workers.submit(self._run, slot, row) for row in range(0, n, self._run_rows)]

    def result(self, slot: int) -> npt.NDArray[np.float16]:
        return self._finished(slot).astype(np.float16)

    def result_fp32(self, slot: int) -> npt.NDArray[np.float32]:
        return self._finished(slot).copy()

    def _finished(self, slot: int) -> npt.NDArray[np.float32]:
        for run in self._runs[slot]:
            run.result()
        return self._outputs[slot][: self._rows[slot]]

    def _run(self, slot: int, row: int) -> None:
        self._torch.use_threads(self._team)  # every time: torch, where it is loaded, resets a thread's number once
        source = self._inputs[slot][row : row + self._run_rows]
        target = self._outputs[slot][row : row + self._run_rows]
        given = self._torch.tensor(source.ctypes.data, source.shape, self.card.input_dtype)  # the run consumes it
        made = c_void_p()
        run = self._model.AOTInductorModelContainerRun
        with turn(self._team):
            self._checked(run(self._container, byref(given), c_size_t(1), byref(made), c_size_t(1), None, None))
        ctypes.memmove(target.ctypes.data, self._torch.address(made), target.nbytes)
        self._torch.delete(made)

    def _checked(self, code: int) -> None:
        if code:
            words = c_char_p()
            self._model.AOTInductorGetLastError(byref(words))
            raise RuntimeError(f"the compiled library failed with code {code}: {(words.value or b'').decode()}")


def _load(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library.resolve()))
    except OSError as error:
        raise EngineUnavailable(f"{library.name} cannot be loaded ({error}); build it again") from error


def _expect_ok(code: int, function: str) -> None:
    if code:
        raise RuntimeError(f"{function} failed with code {code}; its reason is on the standard error of this process")
