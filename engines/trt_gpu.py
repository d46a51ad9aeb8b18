"""TensorRT plans from our ONNX graphs. `tensorrt` (10.x) builds for the GPU of this host; `tensorrt_rtx` for any GPU it
knows, on a host with none. Neither has run on a GPU yet.

    built = build_plan("tensorrt-rtx", artifact.onnx("vision", "fp16"), batch=256, target="sm89")
    built.attention, len(built.kernels), len(built.plan)

The network is strongly typed: every precision is the graph's own. One profile of 1 to `batch` rows, kernels chosen for
`batch`: an engine runs at one size all its life, and a lane that runs out of memory opens the same plan at half of it
(a profile of that one size gives as many kernels: 33 for three layers of B/32). Memory for activations is then sized
for half as many rows where we give it (`tensorrt-rtx`: 202 MB for 256 rows of B/32, 59 MB for 64); ONNX Runtime takes
what the largest batch needs, and what is halved is all else that a lane holds. Profiling is detailed, so the final
kernels are known and fused attention can be counted: fp16 and bf16 give 8 kernels a block, one of them the whole
attention; fp32 gives 12 and no fused attention.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from engines import EngineUnavailable
from engines.engine_gpu import SLOTS, GpuEngine
from engines.memory_gpu import GpuError, device_array, told_out_of_memory
from engines.spec import EngineCard

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# Distributions that bring the module, the one to name in a card first.
PACKAGES = {
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}
INSTALL = {"tensorrt": "pip install 'nightjar[gpu-cu13]'", "tensorrt-rtx": "pip install tensorrt_rtx==1.7.1.116"}
# The TensorRT provider of ONNX Runtime 1.26 to 1.31 is linked against libnvinfer.so.10 and reads no other's plans.
TENSORRT_MAJOR = 10
PLAN, CONTEXT, KERNELS = "engine.plan", "engine.onnx", "kernels.json"
WAITING = ("signal", "wait", "shape_call")  # entries of a listing that launch nothing on the GPU
KERNEL_LINE = re.compile(r"Name: (.*?), LayerType: (\w+)")


class Built(NamedTuple):
    plan: bytes
    kernels: list[str]  # names of the final kernels, in order; empty where the library lists none

    @property
    def attention(self) -> int:
        """Kernels that hold a whole attention: one per layer where all of them are fused."""
        return sum("mha" in name for name in self.kernels)


def problem(runtime: str) -> str:
    """Why plans of `runtime` cannot be built with what is installed here; empty where they can."""
    try:
        library = _library(runtime)
    except EngineUnavailable as error:
        return str(error)
    major = int(library.__version__.split(".")[0])
    if runtime == "tensorrt" and major != TENSORRT_MAJOR:
        return (
            f"TensorRT {library.__version__} is installed, ONNX Runtime's provider needs {TENSORRT_MAJOR}.x: "
            f"{INSTALL[runtime]}"
        )
    return ""


def versions(runtime: str) -> dict[str, str]:
    """{distribution: version} of the library that builds and reads plans of `runtime`."""
    for package in PACKAGES[runtime]:
        try:
            return {package: metadata.version(package)}
        except metadata.PackageNotFoundError:
            continue
    raise EngineUnavailable(f"{LIBRARIES[runtime]} is not installed as a package: {INSTALL[runtime]}")


def _library(runtime: str) -> ModuleType:
    try:
        return importlib.import_module(LIBRARIES[runtime])
    except (ImportError, OSError, RuntimeError) as error:  # a missing shared library raises any of the three
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineUnavailable(
            f"{runtime} needs {LIBRARIES[runtime]}, which cannot be imported ({words}): {INSTALL[runtime]}"
        ) from error


def build_plan(
    runtime: str, graph: Path, batch: int, target: str | None = None, timing_cache: Path | None = None
) -> Built:
    """Compile `graph` (one input, batch first) for 1 to `batch` rows.

    `target` is an SM such as "sm89", for `tensorrt-rtx` alone; `timing_cache` is read and written where given.

    Raises:
        EngineUnavailable: the library is missing, does not know the target, or refuses the graph; with its own words.
    """
    if why := problem(runtime):
        raise EngineUnavailable(why)
    trt = _library(runtime)
    log = _new_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(half_input(graph), str(graph)):
        words = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise EngineUnavailable(f"{runtime} cannot read {graph.name}: {words}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_compute_capability(trt, runtime, target), 0)
    source = network.get_input(0)
    profile, row = builder.create_optimization_profile(), tuple(source.shape)[1:]
    profile.set_shape(source.name, (1, *row), (batch, *row), (batch, *row))
    config.add_optimization_profile(profile)
    if timing_cache is not None:
        known = timing_cache.read_bytes() if timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise EngineUnavailable(f"{runtime} could not build {graph.name}: {log.reason()}")
    if timing_cache is not None and (measured := config.get_timing_cache()) is not None:
        draft = timing_cache.with_suffix(".tmp")
        draft.write_bytes(bytes(measured.serialize()))
        draft.replace(timing_cache)
    plan = bytes(made)
    return Built(plan, logged_kernels(log.lines) if runtime == "tensorrt-rtx" else _inspected_kernels(trt, log, plan))


def _compute_capability(trt: ModuleType, runtime: str, target: str) -> Any:
    known = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")] if runtime == "tensorrt-rtx" else []
    if target.upper() not in known:
        raise EngineUnavailable(
            f"{runtime} does not build for target {target!r}; it knows {', '.join(known).lower() or 'this GPU alone'}"
        )
    return getattr(trt.ComputeCapability, target.upper())


def _new_log(trt: ModuleType) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps what the library says: its errors, and the kernels it lists when a build ends."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.extend(message.split("\n"))
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message.strip())

        def reason(self) -> str:
            return "; ".join(self.errors[-3:]) or "no reason given"

    return Log()


def _read_plan(trt: ModuleType, log: Any, plan: bytes) -> Any:
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineUnavailable(f"{trt.__name__} cannot read the plan: {log.reason()}")
    return engine


def refusal(runtime: str, plan: Path) -> str:
    """Why the library does not open a plan, in its own words; empty where it does. It takes the memory of a context."""
    trt = _library(runtime)
    log = _new_log(trt)
    try:
        engine = _read_plan(trt, log, plan.read_bytes())
    except EngineUnavailable as error:
        return str(error)
    return "" if engine.create_execution_context() is not None else str(log.reason())


def logged_kernels(lines: Sequence[str]) -> list[str]:
    """The final kernels in the log of a build that ran with detailed profiling."""
    found = (KERNEL_LINE.match(line) for line in lines)
    return [match[1] for match in found if match and match[2] not in WAITING]


def _inspected_kernels(trt: ModuleType, log: Any, plan: bytes) -> list[str]:
    inspector = _read_plan(trt, log, plan).create_engine_inspector()
    return inspected_kernels(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def inspected_kernels(listing: str) -> list[str]:
    """The final kernels in the JSON of TensorRT's engine inspector."""
    layers = json.loads(listing)["Layers"]
    return [layer["Name"] for layer in layers if layer.get("LayerType") not in WAITING]


def half_input(graph: Path) -> bytes:
    """The graph without the cast that makes its float32 input float16, so that a stage writes float16: half the bytes.

    Graphs of other precisions come back as they are. Weights beside the file stay there.
    """
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    source, half = model.graph.input[0], onnx.TensorProto.FLOAT16
    casts = [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] == source.name]
    if casts and all(attribute.i == half for cast in casts for attribute in cast.attribute):
        renamed = {cast.output[0] for cast in casts}
        for cast in casts:
            model.graph.node.remove(cast)
        for node in model.graph.node:
            node.input[:] = [source.name if name in renamed else name for name in node.input]
        source.type.tensor_type.elem_type = half
    return bytes(model.SerializeToString())


def write_context(folder: Path, card: EngineCard, sm: str) -> None:
    """`engine.onnx`: one EPContext node, by which ONNX Runtime's TensorRT provider opens `engine.plan` beside it."""
    import onnx
    from onnx import helper

    dtypes = {"float16": onnx.TensorProto.FLOAT16, "float32": onnx.TensorProto.FLOAT, "int32": onnx.TensorProto.INT32}
    source = helper.make_tensor_value_info(card.input_name, dtypes[card.input_dtype], ["batch", *card.row_shape])
    result = helper.make_tensor_value_info(card.output_name, onnx.TensorProto.FLOAT, ["batch", card.dim])
    node = helper.make_node(
        "EPContext", [card.input_name], [card.output_name], name="engine", domain="com.microsoft",
        main_context=1, embed_mode=0, ep_cache_context=PLAN, hardware_architecture=sm.removeprefix("sm"),
        source="TensorrtExecutionProvider",
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    context = helper.make_graph([node], "plan", [source], [result])
    model = helper.make_model(context, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets[:1]))
    (folder / CONTEXT).write_bytes(model.SerializeToString())


class TensorRtRtxEngine(GpuEngine):
    """A `tensorrt-rtx` plan, run by its own library: ONNX Runtime's TensorRT provider reads TensorRT 10 plans alone."""

    def __init__(self, card_path: Path, card: EngineCard, threads: int, batch: int | None, slots: int = SLOTS) -> None:
        with told_out_of_memory(f"opening {card.file}"):
            super().__init__(card, batch, slots)
            trt = _library(card.runtime)
            self._log = _new_log(trt)
            self._engine = _read_plan(trt, self._log, (card_path.parent / card.file).read_bytes())
            self._context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if self._context is None or not self._context.set_input_shape(card.input_name, self.input(0).shape):
                raise EngineUnavailable(f"{card.file} cannot run {self.card.batch} rows: {self._log.reason()}")
            # By itself it would take what the largest batch of its profile needs.
            nbytes = self._context.update_device_memory_size_for_shapes()
            if not nbytes:  # its way to say that it failed
                raise EngineUnavailable(
                    f"{card.file} does not say what {self.card.batch} rows take in memory: {self._log.reason()}"
                )
            self._activations = device_array((nbytes,), np.uint8)
            self._context.set_device_memory(self._activations.pointer, self._activations.nbytes)

    def _enqueue(self, slot: int) -> None:
        self._context.set_tensor_address(self.card.input_name, self._inputs[slot].pointer)
        self._context.set_tensor_address(self.card.output_name, self._outputs[slot].pointer)
        if not self._context.execute_async_v3(self.stream.handle):
            raise GpuError(f"{self.card.runtime} did not start: {self._log.reason()}")
