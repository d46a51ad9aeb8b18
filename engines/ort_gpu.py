"""ONNX Runtime on a GPU: `tensorrt` opens a plan of `trt_gpu`, `cuda` the portable graph. Not run on a GPU yet.

Buffers are bound by pointer and everything is queued on the engine's own stream: ONNX Runtime's stream would not wait
for the stage that fills the input. `Run` returns without waiting for the GPU. Up to GRAPH_ROWS_MAX rows a run is
replayed as a CUDA graph; the TensorRT provider keeps one graph per session, with the addresses it was captured with,
so such an engine has one slot: with two, the second would get the vectors of the first.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from engines import EngineUnavailable, trt_gpu
from engines.engine_gpu import GEMM_SIZE, GRAPH_ROWS_MAX, SLOTS, GpuEngine, gemm_gflops
from engines.memory_gpu import DeviceArray, Stream, device_array, says_out_of_memory, told_out_of_memory
from engines.ort import BoundSession, Buffer, open_session, package
from engines.spec import EngineCard, Precision

TENSORRT_PROVIDER, CUDA_PROVIDER = "TensorrtExecutionProvider", "CUDAExecutionProvider"
# In an order in which each finds what it needs.
CUDA_LIBRARIES = ("libcudart", "libcublasLt", "libcublas", "libnvrtc", "libcurand", "libcufft", "libcudnn")


def problem(provider: str) -> str:
    """Why this ONNX Runtime has no such provider; empty where it has. Whether it starts, only a session tells."""
    if provider in ort.get_available_providers():
        return ""
    return f"{provider} is not part of {package()} {ort.__version__}: pip install 'nightjar[gpu-cu13]'"


class OrtGpuEngine(GpuEngine):
    """One session on one provider, bound to the buffers of this engine."""

    provider = CUDA_PROVIDER
    place = "cuda"

    def __init__(self, card_path: Path, card: EngineCard, threads: int, batch: int | None, slots: int = SLOTS) -> None:
        graphed = (batch or card.batch) <= GRAPH_ROWS_MAX
        with told_out_of_memory(f"opening {card.file}"):
            super().__init__(card, batch, 1 if graphed else slots)
            self._bound = bind(
                self._session(self._graph(card_path), graphed), card, self.place, self._inputs, self._outputs
            )
        self._run_options = run_options()
        if graphed:  # Captured now: memory that any other thread takes while a graph is captured would spoil it.
            self._enqueue(0)
            self.stream.synchronize()

    @abstractmethod
    def provider_options(self, precision: Precision, graphed: bool) -> dict[str, str]:
        """What the provider is opened with, beside our stream."""

    def _graph(self, card_path: Path) -> Path:
        return card_path.parent / self.card.file

    def _session(self, graph: Path, graphed: bool) -> Any:
        return open_gpu_session(graph, self.provider, self.provider_options(self.card.precision, graphed), self.stream)

    def _enqueue(self, slot: int) -> None:
        with told_out_of_memory(f"{self.card.batch} rows"):
            self._bound.run(slot, self._run_options)


class TensorRtEngine(OrtGpuEngine):
    provider = TENSORRT_PROVIDER

    def provider_options(self, precision: Precision, graphed: bool) -> dict[str, str]:
        return {"trt_cuda_graph_enable": "True" if graphed else "False"}  # this provider takes no 1 and 0

    def _graph(self, card_path: Path) -> Path:
        return card_path.parent / trt_gpu.CONTEXT

    def _session(self, graph: Path, graphed: bool) -> Any:
        try:
            return super()._session(graph, graphed)
        except EngineUnavailable as error:  # ONNX Runtime keeps TensorRT's reason to itself, want of memory too
            if words := trt_gpu.refusal(self.card.runtime, graph.parent / self.card.file):
                raise EngineUnavailable(f"{error} TensorRT says: {words}") from error
            raise


class CudaEngine(OrtGpuEngine):
    provider = CUDA_PROVIDER

    def provider_options(self, precision: Precision, graphed: bool) -> dict[str, str]:
        return {
            "arena_extend_strategy": "kSameAsRequested",  # doubling would take up to twice what is needed
            "cudnn_conv_algo_search": "HEURISTIC",  # one convolution, 1 % of the work: a search would not pay
            "enable_cuda_graph": "1" if graphed else "0",
            "use_tf32": "0",  # float32 engines have a bar of .001, TF32 has 10 bits
        }


def open_gpu_session(graph: Path | bytes, provider: str, provider_options: dict[str, str], stream: Stream) -> Any:
    load_libraries(provider)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # A second lock beside reading the assignment back: a node without a GPU kernel fails here, with its name.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if provider == TENSORRT_PROVIDER:  # a plan is finished; there is nothing to rewrite around it
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    on_stream = {"device_id": "0", "user_compute_stream": str(stream.handle)}
    if provider == CUDA_PROVIDER:  # the other one knows no such option, and refuses a session that names it
        on_stream["has_user_compute_stream"] = "1"
    with told_out_of_memory(f"opening {_name(graph)}"):
        try:
            return open_session(graph, provider, options, {**provider_options, **on_stream})
        except (EngineUnavailable, MemoryError):
            raise
        except Exception as error:
            if says_out_of_memory(str(error)):
                raise
            words = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EngineUnavailable(
                f"{provider} does not open {_name(graph)}: {words} If a library is missing, standard error names it: "
                "pip install 'nightjar[gpu-cu13]'"
            ) from error


def _name(graph: Path | bytes) -> str:
    return graph.name if isinstance(graph, Path) else "the graph"


def load_libraries(provider: str) -> None:
    """Load what the provider is linked against from Python packages, where they are: nothing else would find it.

    Not with `ort.preload_dlls`: it looks beside ONNX Runtime alone, which may lie in another folder than torch and its
    CUDA, and prints what it misses where a run prints its report.
    """
    if why := problem(provider):
        raise EngineUnavailable(why)
    roots = [Path(entry) / "nvidia" for entry in dict.fromkeys(sys.path)]
    for name in CUDA_LIBRARIES:
        for library in [library for root in roots for library in root.glob(f"*/lib/{name}.so.*")][:1]:
            try:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:  # names the library, or the one beside it that it misses
                raise EngineUnavailable(
                    f"{provider} needs {library}, which cannot be loaded ({error}): pip install --force-reinstall "
                    "'nightjar[gpu-cu13]'"
                ) from error
    if provider == TENSORRT_PROVIDER:
        if why := trt_gpu.problem("tensorrt"):
            raise EngineUnavailable(why)
        importlib.import_module("tensorrt")


def run_options() -> Any:
    options = ort.RunOptions()
    # Run would wait for the GPU before it returns; here the host waits once per batch, in `result`.
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def bind(
    session: Any, card: EngineCard, place: str, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]
) -> BoundSession:
    def buffers(arrays: Sequence[DeviceArray]) -> list[Buffer]:
        return [Buffer(array.pointer, array.shape, array.dtype) for array in arrays]

    return BoundSession(session, card, place, buffers(inputs), buffers(outputs))


def gemm_peak_gflops(precision: Precision) -> float:
    """Speed of a square matrix product on the CUDA provider, cuBLAS."""
    import onnx
    from onnx import helper

    types = onnx.TensorProto
    number = {"fp32": types.FLOAT, "bf16": types.BFLOAT16}.get(precision, types.FLOAT16)
    shape, dtype = (GEMM_SIZE, GEMM_SIZE), np.float32 if precision == "fp32" else np.float16
    infos = [helper.make_tensor_value_info(name, number, shape) for name in ("a", "c")]
    square = helper.make_graph([helper.make_node("MatMul", ["a", "a"], ["c"])], "square", infos[:1], infos[1:])
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(square, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
    stream, a, c = Stream(), device_array(shape, dtype), device_array(shape, dtype)
    a.fill(np.random.default_rng(0).standard_normal(shape, np.float32), stream)
    session = open_gpu_session(model.SerializeToString(), CUDA_PROVIDER, {"use_tf32": "0"}, stream)
    binding, options = session.io_binding(), run_options()
    element = np.float32 if precision == "fp32" else int(number)
    binding.bind_input("a", "cuda", 0, element, shape, a.pointer)
    binding.bind_output("c", "cuda", 0, element, shape, c.pointer)
    return gemm_gflops(lambda: session.run_with_iobinding(binding, options), stream.synchronize)
