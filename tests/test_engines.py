"""Engines give the right vectors, the same bits wherever a row stands, and refuse what they must not run."""

from __future__ import annotations

import os
import re
import shutil
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

from engines import GPU_RUNTIMES, EngineUnavailable, choose, gate, open_engine
from engines.aoti import AotiCpuEngine
from engines.build import Report
from engines.hardware import host_id
from engines.spec import Artifact, EngineCard, Tower

VISION_RUNTIMES = ("ort-cpu", "aoti-cpu")


@pytest.fixture
def artifact(all_engines: Report) -> Artifact:
    return all_engines.artifact


def exact(artifact: Artifact, tower: Tower, runtime: str, **how: Any) -> gate.ExactEngine:
    return cast(gate.ExactEngine, open_engine(artifact, tower, runtime, **how))


def random_rows(engine: gate.ExactEngine, count: int, seed: int = 0) -> npt.NDArray[Any]:
    shape = (count, *engine.card.row_shape)
    if engine.card.input_dtype == "int32":
        return np.random.default_rng(seed).integers(0, 500, shape, dtype=np.int32)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# ---- right vectors -------------------------------------------------------------------------------------------------


def test_every_engine_passed_its_gate_and_says_what_was_measured(all_engines: Report) -> None:
    on_cpu = [(card.tower, card.runtime) for card in all_engines.cards if card.runtime not in GPU_RUNTIMES]
    assert on_cpu == [
        ("vision", "ort-cpu"), ("text", "ort-cpu"), ("vision", "aoti-cpu"),
    ]  # fmt: skip
    assert not all_engines.failures
    for card in all_engines.cards:
        assert card.passed
        assert card.parity["error_over_spread"] < card.parity["error_allowed"] == SPREAD_ERROR_MAX[card.precision]
        assert card.rows_per_s > 0
        assert 0 < card.peak_share < 1.5
        assert card.bytes > 0
        assert card == EngineCard.from_json(card.to_json())


@pytest.mark.parametrize(("tower", "runtime"), [("vision", "ort-cpu"), ("vision", "aoti-cpu"), ("text", "ort-cpu")])
def test_vectors_are_those_of_the_original_model(artifact: Artifact, tower: Tower, runtime: str) -> None:
    engine = exact(artifact, tower, runtime)
    inputs, want_nd = gate.golden(artifact, tower)
    got_nd, stored_nd = gate.encode(engine, inputs)
    assert_same_vectors(got_nd, want_nd, spread_error_max=SPREAD_ERROR_MAX[engine.card.precision])
    assert stored_nd.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(stored_nd.astype(np.float32), axis=1), 1, atol=2e-3)


@pytest.mark.parametrize(("tower", "runtime"), [("vision", "ort-cpu"), ("vision", "aoti-cpu"), ("text", "ort-cpu")])
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
    """The twin is torch's own runner, which keeps the GIL: beside it a decoder thread stands still."""
    import torch

    path, card, _ = choose(artifact, "vision", "aoti-cpu")
    engine = AotiCpuEngine(path, card, threads=1, batch=card.compiled_rows)
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path.parent / card.file), 1)
    rows = torch.from_numpy(random_rows(engine, card.compiled_rows))
    free = steps_beside(lambda: engine._run(0, 0))
    held = steps_beside(lambda: runner.run([rows]))
    assert free > 2, f"another Python thread took {free} steps beside a run: it stands still"
    assert held < free / 3, f"another Python thread took {held} steps beside torch's runner, {free} beside ours"


def steps_beside(run: Callable[[], object], runs: int = 301) -> float:
    """Steps another Python thread takes during one call, which takes some 50 us: the median of `runs`."""
    steps, done = [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            steps[0] += 1
            time.sleep(0)  # gives the GIL away by itself

    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)  # nobody takes the GIL away: it moves only when a thread lets go of it
    thread = threading.Thread(target=count)
    thread.start()
    taken = []
    try:
        for _ in range(runs):
            before = steps[0]
            run()
            taken.append(steps[0] - before)
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    return float(np.median(taken))


# ---- choosing and refusing -----------------------------------------------------------------------------------------


@pytest.fixture
def editable(artifact: Artifact, tmp_path: Path) -> Artifact:
    """A copy whose cards a test may spoil."""
    return Artifact.open(Path(shutil.copytree(artifact.path, tmp_path / artifact.path.name)))


def spoil(artifact: Artifact, **changes: Any) -> None:
    for path, card in artifact.cards():
        path.write_text(replace(card, **changes).to_json())


def test_auto_takes_the_fastest_that_passed(editable: Artifact) -> None:
    for path, card in editable.cards():
        path.write_text(replace(card, rows_per_s=100.0 if card.runtime == "ort-cpu" else 50.0).to_json())
    assert choose(editable, "vision").card.runtime == "ort-cpu"
    assert re.search(r"against aoti-cpu (fp32|bf16) 50\.0", choose(editable, "vision").reason)
    path, card, _ = choose(editable, "vision", "ort-cpu")
    path.write_text(replace(card, passed=False).to_json())
    assert choose(editable, "vision").card.runtime == "aoti-cpu"
    assert "missed its accuracy bar" in choose(editable, "vision").reason


def test_a_named_inaccurate_engine_opens_and_says_so(editable: Artifact, caplog: pytest.LogCaptureFixture) -> None:
    spoil(editable, passed=False)
    open_engine(editable, "text", "ort-cpu")
    assert "missed its accuracy bar when it was built" in caplog.text
    with pytest.raises(EngineUnavailable, match="name the runtime to use it all the same"):
        open_engine(editable, "text")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"host": "other-cpu"}, rf"built for other-cpu, this host is {host_id()}.*make engines MODEL="),
        ({"weights_digest": "feed" * 16}, "built from weights feedfeed"),
        ({"versions": {"torch": "1.0", "onnxruntime": "1.0"}}, r"built with \w+ 1\.0, installed is"),
        ({"file_digest": "0" * 64}, "damaged or replaced"),
        ({"file": "gone.so"}, r"gone\.so is missing"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(editable: Artifact, changes: dict[str, Any], words: str) -> None:
    spoil(editable, **changes)
    for runtime in ("auto", "aoti-cpu"):
        with pytest.raises(EngineUnavailable, match=words):
            open_engine(editable, "vision", runtime)


def test_a_damaged_library_is_refused(editable: Artifact) -> None:
    path, card, _ = choose(editable, "vision", "aoti-cpu")
    with (path.parent / card.file).open("r+b") as library:
        library.seek(1000)
        library.write(b"x")
    with pytest.raises(EngineUnavailable, match="damaged or replaced"):
        open_engine(editable, "vision", "aoti-cpu")


def test_what_was_not_built_is_an_error_with_the_command(artifact: Artifact) -> None:
    with pytest.raises(EngineUnavailable, match=r"none was built\. Run: make engines MODEL=\S+/tiny RUNTIME=aoti-cpu"):
        open_engine(artifact, "text", "aoti-cpu")
    with pytest.raises(EngineUnavailable, match=r"Run: make engines MODEL=\S+/tiny PRECISION=fp16"):
        open_engine(artifact, "vision", precision="fp16")
    with pytest.raises(EngineUnavailable, match="unknown runtime 'openvino'; known: auto, ort-cpu, aoti-cpu"):
        open_engine(artifact, "text", "openvino")


def test_a_text_query_needs_no_torch(artifact: Artifact) -> None:
    code = """
import sys
from pathlib import Path
from engines import open_engine
from engines.spec import Artifact
engine = open_engine(Artifact.open(Path(sys.argv[1])), "text", batch=1)
engine.launch(0, 1)
print(engine.result(0).shape, [name for name in sys.modules if name.split(".")[0] in ("torch", "transformers")])
"""
    assert run_python(["-c", code, str(artifact.path)]) == "(1, 32) []\n"


def test_a_compiled_engine_needs_no_torch_module(artifact: Artifact) -> None:
    code = """
import sys
from pathlib import Path
from engines import open_engine
from engines.spec import Artifact
engine = open_engine(Artifact.open(Path(sys.argv[1])), "vision", "aoti-cpu")
engine.launch(0, 5)
print(engine.result(0).shape, "torch" in sys.modules)
"""
    assert run_python(["-c", code, str(artifact.path)]) == "(5, 32) False\n"


def run_python(arguments: list[str], **environment: str) -> str:
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
