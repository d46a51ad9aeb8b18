"""AOTInductor on a GPU: a `.pt2` package of one tower, for hosts with torch's CUDA build and no TensorRT. Not run on a
GPU yet.

torch's own runner is used, so this needs torch in the process (2 s and 0.4 GB of host memory more than the other
runtimes). It holds the GIL while it launches its kernels, not while they run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from engines import EngineUnavailable
from engines.engine_gpu import GEMM_SIZE, SLOTS, GpuEngine, gemm_gflops
from engines.memory_gpu import DeviceArray, OutOfGpuMemory, told_out_of_memory
from engines.spec import EngineCard, Precision

INSTALL = "pip install 'nightjar[gpu-cu13]'"


def problem() -> str:
    """Why no package can be built or run with the torch that is installed; empty where one can. Does not import it."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return f"aoti-cuda needs torch, which is not installed: {INSTALL}"
    if not (Path(found.submodule_search_locations[0]) / "lib" / "libtorch_cuda.so").is_file():
        return f"aoti-cuda needs torch's CUDA build, torch {metadata.version('torch')} is another: {INSTALL}"
    return ""


def versions() -> dict[str, str]:
    return {"torch": metadata.version("torch")}


class AotiCudaEngine(GpuEngine):
    """The package's runner on this engine's stream, over this engine's buffers."""

    def __init__(self, card_path: Path, card: EngineCard, threads: int, batch: int | None, slots: int = SLOTS) -> None:
        super().__init__(card, batch, slots)
        import torch

        self._expect_gpu()
        with self._told_out_of_memory(f"opening {card.file}"):
            self._given = [self._tensor(array) for array in self._inputs]
            self._made = [self._tensor(array) for array in self._outputs]
            package = str(card_path.parent / card.file)
            # Else a run first waits for the one before it, spinning, with the GIL held: nothing would overlap.
            self._runner = torch._inductor.aoti_load_package(package, run_single_threaded=True).loader

    def _enqueue(self, slot: int) -> None:
        with self._told_out_of_memory(f"{self.card.batch} rows"), self._on_stream():
            (vectors,) = self._runner.boxed_run([self._given[slot]])
            self._made[slot].copy_(vectors, non_blocking=True)

    @contextmanager
    def _told_out_of_memory(self, what: str) -> Iterator[None]:
        """A package says of any failure "... API call failed at ...": on a sound GPU it is want of memory."""
        with told_out_of_memory(what):
            try:
                yield
            except RuntimeError as error:
                self.stream.synchronize()  # raises GpuError where the GPU is at fault
                if "API call failed" in str(error):
                    raise OutOfGpuMemory(f"{what} does not fit in GPU memory: {error}") from error
                raise

    def _expect_gpu(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise EngineUnavailable(
                f"torch {torch.__version__} sees no GPU: its CUDA {torch.version.cuda} may be newer than the driver"
            )

    def _tensor(self, array: DeviceArray) -> Any:
        """torch's view of the same memory."""
        import torch

        return torch.as_tensor(array, device="cuda")

    def _on_stream(self) -> AbstractContextManager[Any]:
        import torch

        ours: Any = torch.cuda.ExternalStream(self.stream.handle)  # type: ignore[no-untyped-call]
        on_ours: AbstractContextManager[Any] = torch.cuda.stream(ours)
        return on_ours


def gemm_peak_gflops(precision: Precision) -> float:
    """Speed of a square matrix product in torch, cuBLAS."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, torch.float16)
    a = torch.randn(GEMM_SIZE, GEMM_SIZE, device="cuda", dtype=dtype)
    return gemm_gflops(lambda: a @ a, torch.cuda.synchronize)
