"""On a GPU, and skipped elsewhere: every engine it can have gives the reference's vectors, with all slots in flight."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from engines import build_gpu, choose, gate, memory_gpu, open_engine
from engines.build import build_engines
from engines.engine_gpu import GRAPH_ROWS_MAX
from engines.memory_gpu import Stream, copy_to_device, pinned_array
from engines.spec import Artifact

pytestmark = pytest.mark.gpu


RUNTIMES = ("tensorrt", "cuda", "aoti-cuda")


@pytest.fixture(scope="module")
def on_gpu(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny model with every engine this GPU can have. One by one: what fails must not hide the others."""
    root = tmp_path_factory.mktemp("gpu-artifacts")
    artifact = build_engines(str(tiny_model), "ort-cpu", root=root).artifact
    for runtime in RUNTIMES:
        if not build_gpu.problem(runtime):
            with suppress(Exception):  # `built` asks for it again, and says why
                build_engines(str(tiny_model), runtime, root=root)
    return artifact


def built(artifact: Artifact, tiny_model: Path, runtime: str) -> None:
    """Skips where `runtime` cannot be had on this host, and fails where it can and was not built."""
    if problem := build_gpu.problem(runtime):
        pytest.skip(problem)
    if runtime not in gpu_runtimes(artifact):
        report = build_engines(str(tiny_model), runtime, root=artifact.path.parent)
        pytest.fail(f"{runtime} was not built: {report.failures}")


def gpu_runtimes(artifact: Artifact) -> list[str]:
    return [card.runtime for _, card in artifact.cards() if card.host in {gpu.identity for gpu in memory_gpu.gpus()}]


def test_every_gpu_engine_passed_its_gate(on_gpu: Artifact) -> None:
    assert "cuda" in gpu_runtimes(on_gpu)
    for _, card in on_gpu.cards():
        assert card.passed
        assert card.verified
        assert card.rows_per_s > 0


@pytest.mark.parametrize("runtime_name", RUNTIMES)
@pytest.mark.parametrize("batch", [1, GRAPH_ROWS_MAX + 1, 256])
def test_a_gpu_engine_gives_the_vectors_of_the_reference(
    on_gpu: Artifact, tiny_model: Path, runtime_name: str, batch: int
) -> None:
    built(on_gpu, tiny_model, runtime_name)
    engine = cast(gate.ExactEngine, open_engine(on_gpu, "vision", runtime_name, batch=batch))
    gate.check(engine, on_gpu)
    stream, slots = Stream(), range(engine.slots)
    pixels, _ = gate.golden(on_gpu, "vision")
    batches = [np.resize(np.roll(pixels, slot, 0), (batch, *pixels.shape[1:])) for slot in slots]
    held = [pinned_array(rows.shape, engine.card.input_dtype) for rows in batches]
    for _ in range(20):  # all slots in flight, filled on another stream
        for slot in slots:
            held[slot][:] = batches[slot]
            copy_to_device(engine.input(slot), held[slot], stream)
            engine.input(slot).ready.record(stream)
            engine.launch(slot, batch)
        got = [engine.result_fp32(slot) for slot in slots]
        for slot in slots:
            want = gate.encode(engine, batches[slot])[0]
            np.testing.assert_array_equal(got[slot], want)


def test_a_plan_on_this_gpu_has_its_attention_fused(on_gpu: Artifact, tiny_model: Path) -> None:
    built(on_gpu, tiny_model, "tensorrt")
    card = choose(on_gpu, "vision", "tensorrt").card
    assert card.fused_attention == on_gpu.spec.vision.layers


@pytest.mark.alone
def test_memory_of_a_gpu_engine_comes_back(on_gpu: Artifact) -> None:
    from cuda.bindings import runtime as cuda

    def free_bytes() -> int:
        gc.collect()
        return int(cuda.cudaMemGetInfo()[1])

    open_engine(on_gpu, "vision", "cuda")  # libraries keep what they load once
    before = free_bytes()
    for _ in range(3):
        open_engine(on_gpu, "vision", "cuda")
    assert before - free_bytes() < 64 << 20
