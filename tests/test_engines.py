"""Engines give the right vectors, the same bits wherever a row stands, and refuse what they must not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from compare import SPREAD_ERROR_MAX, assert_same_vectors
from engines import EngineUnavailable, choose, gate, load_engine, open_engine
from engines.aoti import AotiCpuEngine
from engines.build import Report, build_engines
from engines.hardware import gemm_peak_gflops, has_bf16, host_id, physical_cores
from engines.plan import batch_rows, faster_precision, plan
from engines.spec import Artifact, EngineCard, Tower
from export.random_model import write_random_model

VISION_RUNTIMES = ("ort-cpu", "aoti-cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "tiny", "tiny")


@pytest.fixture(scope="module")
def report(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """All engines of a tiny model, built once (one C++ compilation, 20 s)."""
    return build_engines(str(model), root=tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="module")
def artifact(report: Report) -> Artifact:
    return report.artifact


def exact(artifact: Artifact, tower: Tower, runtime: str, **how: Any) -> gate.ExactEngine:
    return cast(gate.ExactEngine, open_engine(artifact, tower, runtime, **how))


def random_rows(engine: gate.ExactEngine, count: int, seed: int = 0) -> npt.NDArray[Any]:
    shape = (count, *engine.card.row_shape)
    if engine.card.input_dtype == "int32":
        return np.random.default_rng(seed).integers(0, 500, shape, dtype=np.int32)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# ---- right vectors -------------------------------------------------------------------------------------------------


def test_every_engine_passed_its_gate_and_says_what_was_measured(report: Report) -> None:
    assert [(card.tower, card.runtime) for card in report.cards] == [
        ("vision", "ort-cpu"), ("text", "ort-cpu"), ("vision", "aoti-cpu"),
    ]  # fmt: skip
    assert not report.failures
    for card in report.cards:
        assert card.passed
        assert card.parity["error_over_spread"] < card.parity["error_allowed"] == SPREAD_ERROR_MAX[card.precision]
        assert card.rows_per_s > 0
        assert 0 < card.peak_share < 1.5
        assert card.bytes > 0
        assert card == EngineCard.from_json(card.to_json())


@pytest.mark.parametrize(
    ("tower", "runtime"), [("vision", "ort-cpu"), ("vision", "aoti-cpu"), ("text", "ort-cpu")]
)
def test_vectors_are_those_of_the_original_model(artifact: Artifact, tower: Tower, runtime: str) -> None:
    engine = exact(artifact, tower, runtime)
    inputs, want_nd = gate.golden(artifact, tower)
    got_nd, stored_nd = gate.encode(engine, inputs)
    assert_same_vectors(got_nd, want_nd, spread_error_max=SPREAD_ERROR_MAX[engine.card.precision])
    assert stored_nd.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(stored_nd.astype(np.float32), axis=1), 1, atol=2e-3)


@pytest.mark.parametrize(
    ("tower", "runtime"), [("vision", "ort-cpu"), ("vision", "aoti-cpu"), ("text", "ort-cpu")]
)
def test_bits_depend_on_nothing_but_the_row(artifact: Artifact, tower: Tower, runtime: str) -> None:
    """Any place, any neighbours, any number of rows, whatever an earlier batch left behind them."""
    engine = exact(artifact, tower, runtime, batch=16)
    rows = random_rows(engine, 16)
    engine.input(0)[:] = rows
    engine.launch(0, 16)
    want = engine.result(0).view(np.uint16)
    for place in range(16):
        others = random_rows(engine, 16, seed=place + 1)
        engine.input(1)[:] = others
        engine.input(1)[place] = rows[0]
        engine.launch(1, place + 1)
        assert (engine.result(1).view(np.uint16)[place] == want[0]).all(), f"row 0 changes at place {place}"
        assert len(engine.result(1)) == place + 1


def test_bits_do_not_depend_on_threads(artifact: Artifact) -> None:
    path, card, _ = choose(artifact, "vision", "aoti-cpu")
    results = []
    for threads, team in ((1, 1), (2, 1), (2, 2)):
        engine = AotiCpuEngine(path, card, threads, 32, team=team)
        engine.input(0)[:] = random_rows(engine, 32)
        engine.launch(0, 32)
        results.append(engine.result(0).view(np.uint16))
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()


@pytest.mark.parametrize("runtime", VISION_RUNTIMES)
def test_slots_do_not_share_memory(artifact: Artifact, runtime: str) -> None:
    engine = exact(artifact, "vision", runtime, batch=3)
    rows = random_rows(engine, 3)
    for slot in range(engine.slots):
        engine.input(slot)[:] = rows[slot]
    for slot in range(engine.slots):
        engine.launch(slot, 1)
    first = engine.result(0)
    assert not np.array_equal(first, engine.result(1))
    before = first.copy()
    engine.input(0)[:] = rows[1]
    engine.launch(0, 1)
    engine.result(0)
    np.testing.assert_array_equal(first, before)  # the caller owns what it was given


# ---- the C ABI -----------------------------------------------------------------------------------------------------


def test_c_abi_gives_the_bits_of_torchs_own_runner(artifact: Artifact) -> None:
    import torch

    path, card, _ = choose(artifact, "vision", "aoti-cpu")
    engine = exact(artifact, "vision", "aoti-cpu", batch=card.compiled_rows)
    rows = random_rows(engine, card.compiled_rows)
    engine.input(0)[:] = rows
    engine.launch(0, card.compiled_rows)
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path.parent / card.file), 1)
    (want,) = runner.run([torch.from_numpy(rows)])
    np.testing.assert_array_equal(engine.result_fp32(0), want.numpy())


def test_python_goes_on_while_a_library_runs(artifact: Artifact) -> None:
    """The longest time another thread is held up must be a small part of a call; torch's runner holds it for all."""
    engine = exact(artifact, "vision", "aoti-cpu", threads=1, batch=2048)
    engine.launch(0, 2048)
    engine.result(0)
    stalls: list[float] = []
    done = threading.Event()

    def spin() -> None:
        last = time.perf_counter()
        while not done.is_set():
            now = time.perf_counter()
            stalls.append(now - last)
            last = now

    spinner = threading.Thread(target=spin)
    spinner.start()
    start = time.perf_counter()
    engine.launch(0, 2048)
    engine.result(0)
    seconds = time.perf_counter() - start
    done.set()
    spinner.join()
    assert sum(stall for stall in stalls if stall > 0.5 * seconds) == 0, f"held up {max(stalls):.3f} of {seconds:.3f} s"
