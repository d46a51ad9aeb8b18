"""GPU engines: tested on a CUDA runtime that runs nothing before somebody waits for it, so that what our code forgets
to order comes out wrong every time. That the real one does the same: test_engines_on_gpu.py.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from lazy_gpu import GPU, LazyRuntime, cpu_engine, gpu_card, lazy_runtime

from engines import EngineUnavailable, gate, memory_gpu, open_engine, ort, ort_gpu, rates, trt_gpu
from engines.build import main as make_engines
from engines.engine_gpu import GRAPH_ROWS_MAX
from engines.memory_gpu import OutOfGpuMemory, Stream, copy_to_device, device_array, pinned_array
from engines.spec import Artifact, find_artifact

runtime = pytest.fixture(lazy_runtime)


@pytest.fixture
def artifact(tiny_model: Path) -> Artifact:
    return find_artifact(str(tiny_model))


def rows_for(engine: Any, count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    shape = (count, *engine.card.row_shape)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# ---- launch and result ---------------------------------------------------------------------------------------------


def test_vectors_are_those_of_the_reference_engine(artifact: Artifact, runtime: LazyRuntime) -> None:
    engine, reference = cpu_engine(artifact), open_engine(artifact, "vision", "ort-cpu", batch=32)
    rows = rows_for(engine, 32)
    gate.fill(engine, 0, rows)
    engine.launch(0, 32)
    reference.input(0)[:] = rows
    reference.launch(0, 32)
    np.testing.assert_array_equal(engine.result(0), reference.result(0))


def test_the_gate_takes_a_gpu_engine_as_any_other(artifact: Artifact, runtime: LazyRuntime) -> None:
    parity = gate.check(cast(gate.ExactEngine, cpu_engine(artifact)), artifact)
    assert parity.error_over_spread < 1e-5
    assert parity.moved_rows_changed == 0


@pytest.mark.parametrize(("share", "all_lean"), [(1e-6, False), (0.5, True)])
def test_on_a_gpu_last_bits_may_move_but_no_row_leans_on_another(
    artifact: Artifact, runtime: LazyRuntime, monkeypatch: pytest.MonkeyPatch, share: float, all_lean: bool
) -> None:
    engine = cast(gate.ExactEngine, cpu_engine(artifact))
    exact = engine.result_fp32
    monkeypatch.setattr(engine, "result_fp32", lambda slot: (got := exact(slot)) + share * np.roll(got, 1, axis=0))
    inputs, want_nd = gate.golden(artifact, "vision")
    assert gate.measure(engine, inputs, want_nd).moved_rows_changed == (len(inputs) if all_lean else 0)


def test_launch_waits_for_the_stage_that_fills_the_input_and_for_nobody_on_the_host(
    artifact: Artifact, runtime: LazyRuntime
) -> None:
    engine, stage = cpu_engine(artifact), Stream()
    batches = [rows_for(engine, 32, seed) for seed in range(engine.slots)]
    held = [pinned_array(batch.shape, np.float32) for batch in batches]
    waits = runtime.waits
    for slot, batch in enumerate(batches):
        held[slot][:] = batch
        copy_to_device(engine.input(slot), held[slot], stage)  # queued, not done
        engine.input(slot).ready.record(stage)
        engine.launch(slot, 32)
    assert runtime.waits == waits
    assert not any(runtime.ran.values())
    got = [engine.result(slot) for slot in range(engine.slots)]
    assert runtime.waits == waits + engine.slots  # one wait a batch
    reference = open_engine(artifact, "vision", "ort-cpu", batch=32)
    for batch, vectors in zip(batches, got, strict=True):
        reference.input(0)[:] = batch
        reference.launch(0, 32)
        np.testing.assert_array_equal(vectors, reference.result(0))


def test_a_short_batch_gives_its_rows_whatever_lies_behind_them(artifact: Artifact, runtime: LazyRuntime) -> None:
    engine = cpu_engine(artifact)  # its memory is NaN: nobody has written there
    rows = rows_for(engine, 5)
    gate.fill(engine, 0, rows)
    engine.launch(0, 5)
    alone = engine.result(0)
    gate.fill(engine, 1, rows_for(engine, 32, 1))
    gate.fill(engine, 1, rows)
    engine.launch(1, 5)
    assert alone.shape == (5, engine.card.dim)
    np.testing.assert_array_equal(alone, engine.result(1))


def test_results_belong_to_the_caller(artifact: Artifact, runtime: LazyRuntime) -> None:
    engine = cpu_engine(artifact)
    gate.fill(engine, 0, rows_for(engine, 32))
    engine.launch(0, 32)
    first, exact = engine.result(0), engine.result_fp32(0)
    before, exact_before = first.copy(), exact.copy()
    gate.fill(engine, 0, rows_for(engine, 32, 1))
    engine.launch(0, 32)
    engine.result(0)
    np.testing.assert_array_equal(first, before)
    np.testing.assert_array_equal(exact, exact_before)


def test_small_batches_run_as_a_graph_and_therefore_in_one_slot(artifact: Artifact, runtime: LazyRuntime) -> None:
    assert cpu_engine(artifact, batch=GRAPH_ROWS_MAX).slots == 1
    assert cpu_engine(artifact, batch=GRAPH_ROWS_MAX + 1).slots == 3
    words: tuple[tuple[Any, str, str], ...] = (
        (ort_gpu.CudaEngine, "1", "0"), (ort_gpu.TensorRtEngine, "True", "False"),
    )  # fmt: skip
    for kind, yes, no in words:
        engine = object.__new__(kind)
        on, off = ({k: v for k, v in engine.provider_options("fp16", graphed).items() if "cuda_graph" in k}
                   for graphed in (True, False))  # fmt: skip
        assert list(on.values()) == [yes]
        assert list(off.values()) == [no]


def test_a_graph_is_captured_before_anybody_else_is_at_work(
    artifact: Artifact, runtime: LazyRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured at the first batch, it would be spoilt by memory that the decoder's thread takes just then."""
    ran: list[int] = []
    plain = ort.BoundSession.run
    monkeypatch.setattr(ort.BoundSession, "run", lambda self, slot, how=None: [ran.append(slot), plain(self, slot)])
    engine = cpu_engine(artifact, batch=GRAPH_ROWS_MAX)
    assert ran == [0]
    assert not runtime.queues[engine.stream.handle], "and done: nothing is left to run when the engine is open"
    cpu_engine(artifact, batch=GRAPH_ROWS_MAX + 1)
    assert ran == [0]


def test_a_batch_beyond_what_was_compiled_is_refused(artifact: Artifact, runtime: LazyRuntime) -> None:
    assert cpu_engine(artifact, card={"compiled_rows": 32}, batch=20).card.batch == 20
    with pytest.raises(EngineUnavailable, match="at most 32 rows, asked for 33: open it with batch=32 or less"):
        cpu_engine(artifact, card={"compiled_rows": 32}, batch=33)


def test_rates_keep_every_slot_busy(artifact: Artifact, runtime: LazyRuntime) -> None:
    engine = cpu_engine(artifact)
    for slot in range(engine.slots):
        gate.fill(engine, slot, rows_for(engine, 32))
    assert rates._rows_per_s(cast(gate.ExactEngine, engine), engine.slots, 0.05) > 0


# ---- memory --------------------------------------------------------------------------------------------------------


def test_memory_that_does_not_fit_is_told_with_the_remedy(artifact: Artifact, runtime: LazyRuntime) -> None:
    runtime.bytes_left = 100_000
    with pytest.raises(OutOfGpuMemory, match=r"cudaMalloc.* does not fit in GPU memory: use a smaller batch"):
        cpu_engine(artifact)
    gc.collect()
    assert cpu_engine(artifact, batch=1).card.batch == 1  # what the failed one took came back
    assert runtime.last_error == 0, "ONNX Runtime would take it for a failure of its own"


@pytest.mark.parametrize(
    "words",
    [
        "Failed to allocate memory for requested buffer of size 123",
        "CUDA failure 2: out of memory ; GPU=0",
        "CUDA Runtime failure: '#2' at /src/device_buffer.cpp:61",
        "NVCV_ERROR_OUT_OF_MEMORY: not enough",
        "CUBLAS failure: CUBLAS_STATUS_ALLOC_FAILED",
        "[defaultAllocator.cpp::allocate::58] Error Code 1: Cuda Runtime (In allocate: out of memory)",
    ],
)
def test_memory_that_runs_out_inside_onnx_runtime_is_told_as_such(words: str) -> None:
    with (
        pytest.raises(OutOfGpuMemory, match="256 rows does not fit in GPU memory"),
        memory_gpu.told_out_of_memory("256 rows"),
    ):
        raise onnxruntime.capi.onnxruntime_pybind11_state.Fail(words)
    with pytest.raises(ValueError, match="else"), memory_gpu.told_out_of_memory("256 rows"):
        raise ValueError("something else")


def test_memory_goes_back_with_the_last_view(runtime: LazyRuntime) -> None:
    array = device_array((4, 8), np.float16)
    part = array.rows(3, 1)
    assert (part.pointer - array.pointer, part.shape, part.nbytes) == (16, (2, 8), 32)
    interface = part.__cuda_array_interface__
    assert (interface["data"], interface["typestr"], interface["stream"]) == ((part.pointer, False), "<f2", -1)
    with pytest.raises(ValueError, match=r"rows \[0, 5\) of an array of 4 rows"):
        array.rows(5)
    del array
    gc.collect()
    assert runtime.blocks
    del part
    gc.collect()
    assert not runtime.blocks
    host = pinned_array((3, 2), np.int32)[1:]
    gc.collect()
    assert runtime.blocks
    host[:] = 7
    del host
    gc.collect()
    assert not runtime.blocks


def test_a_copy_of_other_bytes_is_refused(runtime: LazyRuntime) -> None:
    array, stream = device_array((4, 8), np.float16), Stream()
    for wrong in (np.zeros((4, 8), np.float32), np.zeros((3, 8), np.float16), np.zeros((8, 4), np.float16).T):
        with pytest.raises(ValueError, match="two contiguous arrays of one shape and dtype"):
            copy_to_device(array, wrong, stream)


def test_a_gpu_is_named_by_what_an_engine_depends_on(runtime: LazyRuntime) -> None:
    (gpu,) = memory_gpu.gpus()
    assert gpu == GPU
    assert gpu.identity == "sm89-nvidia-l4-driver580.65.06"
    assert memory_gpu.gpu_problem() == ""


# ---- no silent fallback --------------------------------------------------------------------------------------------


def test_a_provider_that_is_not_there_is_an_error(artifact: Artifact) -> None:
    graph = artifact.onnx("vision", "fp32")
    with pytest.raises(EngineUnavailable, match=r"NoSuchProvider is not part of this onnxruntime"):
        ort.open_session(graph, "NoSuchProvider")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_went_elsewhere_is_an_error(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ONNX Runtime's CUDA provider does without its libraries: it logs, and runs on the CPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [ort_gpu.CUDA_PROVIDER, ort.CPU_PROVIDER])
    graph = artifact.onnx("vision", "fp32")
    with pytest.raises(EngineUnavailable, match=r"opened on {'CPUExecutionProvider': \d+} \(nodes\), asked for CUDA"):
        ort.open_session(graph, ort_gpu.CUDA_PROVIDER)
    monkeypatch.setattr(ort_gpu, "load_libraries", lambda provider: None)
    with pytest.raises(
        EngineUnavailable, match=r"CUDAExecutionProvider does not open vision-fp32\.onnx: .*fallback to CPU"
    ):
        ort_gpu.open_gpu_session(graph, ort_gpu.CUDA_PROVIDER, {}, cast(Any, SimpleNamespace(handle=1)))


def test_a_session_that_left_one_node_to_another_provider_is_an_error(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = {ort_gpu.CUDA_PROVIDER: 3, ort.CPU_PROVIDER: 1}
    told = [SimpleNamespace(ep_name=name, get_nodes=lambda count=count: [0] * count) for name, count in nodes.items()]
    session = SimpleNamespace(get_providers=lambda: list(nodes), get_provider_graph_assignment_info=lambda: told)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(nodes))
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    with pytest.raises(EngineUnavailable, match=r"opened on {'CUDAExecutionProvider': 3, 'CPUExecutionProvider': 1}"):
        ort.open_session(artifact.onnx("vision", "fp32"), ort_gpu.CUDA_PROVIDER)
    told.pop()
    assert ort.open_session(artifact.onnx("vision", "fp32"), ort_gpu.CUDA_PROVIDER) is session


def test_a_library_that_cannot_be_loaded_is_named_with_the_remedy(
    artifact: Artifact, runtime: LazyRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As where a download was cut, or a library misses another one: exit 2, not a traceback."""
    (library := tmp_path / "nvidia" / "cu13" / "lib" / "libcudart.so.13").parent.mkdir(parents=True)
    library.write_bytes(b"half a download")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [ort_gpu.CUDA_PROVIDER, ort.CPU_PROVIDER])
    words = rf"CUDAExecutionProvider needs {library}, which cannot be loaded \(.+\): pip install --force-reinstall"
    with pytest.raises(EngineUnavailable, match=words):
        ort_gpu.load_libraries(ort_gpu.CUDA_PROVIDER)
    assert make_engines(["--model", artifact.spec.model, "--runtime", "cuda"]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_the_context_of_a_plan_is_a_graph_onnx_runtime_accepts(artifact: Artifact, tmp_path: Path) -> None:
    """Up to the provider, which needs a GPU: the CPU has no kernel for the node, and says just that."""
    trt_gpu.write_context(tmp_path, gpu_card(artifact, "tensorrt", "fp16", input_dtype="float16"), "sm90")
    with pytest.raises(Exception, match=r"Failed to find kernel for com\.microsoft\.EPContext\(1\)"):
        onnxruntime.InferenceSession(tmp_path / trt_gpu.CONTEXT, providers=[ort.CPU_PROVIDER])
    graph = onnx.load(tmp_path / trt_gpu.CONTEXT).graph
    told = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in graph.node[0].attribute}
    assert (told["embed_mode"], told["ep_cache_context"], told["hardware_architecture"]) == (0, b"engine.plan", b"90")
    assert [tensor.name for tensor in (*graph.input, *graph.output)] == ["pixels", "vectors"]
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
