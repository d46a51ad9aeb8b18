"""Engines give the right vectors, the same bits wherever a row stands, and refuse what they must not run."""

from __future__ import annotations

import json
import os
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

from engines import EngineUnavailable, choose, gate, open_engine
from engines.aoti import AotiCpuEngine
from engines.build import Report, build_engines
from engines.hardware import gemm_peak_gflops, host_id, physical_cores
from engines.plan import batch_rows, choose_precision, faster_precision, plan
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
    assert free > 10, f"another Python thread took {free} steps beside a run: it stands still"
    assert held < 10, f"another Python thread took {held} steps beside torch's runner: is our own still needed?"


def steps_beside(run: Callable[[], object], runs: int = 51) -> float:
    """Steps another Python thread takes during one call: the median of `runs`."""
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


# ---- the gate rejects ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(artifact: Artifact) -> tuple[gate.ExactEngine, npt.NDArray[Any], npt.NDArray[np.float32]]:
    return exact(artifact, "vision", "ort-cpu"), *gate.golden(artifact, "vision")


def test_gate_rejects_swapped_rows(reference: Any) -> None:
    engine, inputs, want_nd = reference
    swapped = want_nd.copy()
    swapped[[3, 4]] = want_nd[[4, 3]]
    assert not gate.measure(engine, inputs, want_nd).failures
    assert "error/spread" in gate.measure(engine, inputs, swapped).failures[0]


def test_gate_rejects_the_vectors_of_another_model(reference: Any) -> None:
    engine, inputs, want_nd = reference
    other = np.random.default_rng(1).standard_normal(want_nd.shape).astype(np.float32)
    assert gate.measure(engine, inputs, other / np.linalg.norm(other, axis=1, keepdims=True)).failures


@pytest.mark.parametrize(("strength", "passes"), [(0.5, True), (2.0, False)])
def test_gate_rejects_noise_above_the_bar_only(reference: Any, strength: float, passes: bool) -> None:
    engine, inputs, want_nd = reference
    spread = np.linalg.norm(want_nd - want_nd.mean(0), axis=1).mean()
    noise = np.random.default_rng(2).standard_normal(want_nd.shape)
    noise *= strength * gate.SPREAD_ERROR_MAX["fp32"] * spread / np.linalg.norm(noise, axis=1, keepdims=True)
    parity = gate.measure(engine, inputs, (want_nd + noise).astype(np.float32))
    assert (not parity.failures) == passes
    assert parity.error_over_spread == pytest.approx(strength * gate.SPREAD_ERROR_MAX["fp32"], rel=0.05)


class Spoiled:
    """An engine whose vectors go through `spoil` first."""

    def __init__(self, engine: gate.ExactEngine, spoil: Callable[[npt.NDArray[np.float32]], Any]) -> None:
        self.card, self.slots, self.input, self.launch = engine.card, engine.slots, engine.input, engine.launch
        self._engine, self._spoil = engine, spoil

    def result_fp32(self, slot: int) -> npt.NDArray[np.float32]:
        return np.asarray(self._spoil(self._engine.result_fp32(slot)), np.float32)

    def result(self, slot: int) -> npt.NDArray[np.float16]:
        return self.result_fp32(slot).astype(np.float16)


def test_gate_rejects_rows_that_lean_on_their_neighbours(reference: Any) -> None:
    engine, inputs, want_nd = reference
    parity = gate.measure(Spoiled(engine, lambda got: got + 1e-3 * np.roll(got, 1, axis=0)), inputs, want_nd)
    assert parity.moved_rows_changed == len(inputs)
    assert "12 of 12 vectors change with their place in the batch" in parity.failures


def test_gate_rejects_nan(reference: Any) -> None:
    engine, inputs, want_nd = reference
    assert gate.measure(Spoiled(engine, lambda got: got * np.nan), inputs, want_nd).failures == [
        "error/spread nan, allowed 0.001"
    ]
    with pytest.raises(ValueError, match="have a spread of nan"):
        gate.measure(engine, inputs, want_nd * np.nan)


def test_int8_must_find_the_same_nine() -> None:
    rng = np.random.default_rng(3)
    want_nd = rng.standard_normal((60, 32)).astype(np.float32)
    want_nd /= np.linalg.norm(want_nd, axis=1, keepdims=True)
    assert gate.top_overlap(want_nd, want_nd) == 1
    noisy = want_nd + 0.05 * rng.standard_normal(want_nd.shape).astype(np.float32)
    assert 0.2 < gate.top_overlap(noisy, want_nd) < gate.OVERLAP_MIN
    with pytest.raises(ValueError, match="at least 18 rows, there are 12"):
        gate.top_overlap(want_nd[:12], want_nd[:12])


def test_gate_failure_carries_its_numbers(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gate.SPREAD_ERROR_MAX, "fp32", 1e-12)
    with pytest.raises(
        gate.GateFailed, match=r"text ort-cpu fp32 missed its accuracy bar: error/spread 0\.0"
    ) as failed:
        gate.check(exact(artifact, "text", "ort-cpu"), artifact)
    assert failed.value.parity.error_over_spread > 1e-12


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
    assert "against aoti-cpu fp32 50.0" in choose(editable, "vision").reason
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
    with pytest.raises(EngineUnavailable, match="unknown runtime 'tensorrt'; known: auto, ort-cpu, aoti-cpu"):
        open_engine(artifact, "text", "tensorrt")


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


# ---- building ------------------------------------------------------------------------------------------------------


def test_a_second_build_does_nothing_and_says_so(artifact: Artifact) -> None:
    code = "import sys; from engines.build import main; code = main(); print('torch' in sys.modules); sys.exit(code)"
    start = time.perf_counter()
    said = run_python(["-c", code, "--model", artifact.spec.model], NIGHTJAR_ARTIFACTS=str(artifact.path.parent))
    assert time.perf_counter() - start < 5
    assert "nothing changed: 3 engines are current" in said
    assert "auto takes for vision: " in said
    assert said.endswith("False\n"), "torch was imported to find out that nothing changed"


def test_build_prints_one_json_object(artifact: Artifact) -> None:
    arguments = ["-m", "engines.build", "--model", artifact.spec.model, "--json"]
    found = json.loads(run_python(arguments, NIGHTJAR_ARTIFACTS=str(artifact.path.parent)))
    assert found["built"] == 0
    assert [engine["runtime"] for engine in found["engines"]] == ["ort-cpu", "ort-cpu", "aoti-cpu"]


def test_a_build_that_misses_its_bar_fails_unless_allowed(
    editable: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engines import build

    monkeypatch.setitem(gate.SPREAD_ERROR_MAX, "fp32", 1e-12)
    monkeypatch.setenv("NIGHTJAR_ARTIFACTS", str(editable.path.parent))
    for path, _ in editable.cards():
        path.unlink()
    arguments = ["--model", editable.spec.model, "--runtime", "ort-cpu"]
    assert build.main(arguments) == 1
    assert "vision ort-cpu fp32 missed its accuracy bar: error/spread 0.0" in capsys.readouterr().err
    assert editable.cards() == []
    assert build.main([*arguments, "--allow-inaccurate"]) == 0
    assert [card.passed for _, card in editable.cards()] == [False, False]
    assert "MISSED" in capsys.readouterr().out


def test_without_a_compiler_auto_says_why_and_a_name_is_an_error(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    wanted, notes = plan(artifact, "auto", "auto")
    assert {want.runtime for want in wanted} == {"ort-cpu"}
    assert "g++ is not on PATH" in notes[0]
    assert "Going on with ort-cpu alone" in notes[0]
    with pytest.raises(EngineUnavailable, match=r"apt-get install g\+\+"):
        plan(artifact, "aoti-cpu", "auto")


def test_a_compiler_that_fails_is_named_not_hidden(
    editable: Artifact, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, card in editable.cards():
        if card.runtime == "aoti-cpu":
            path.unlink()
    monkeypatch.setattr("export.to_aoti.INDUCTOR", {"cpp.cxx": (None, "/bin/false")})
    with pytest.raises(EngineUnavailable, match="aoti-cpu did not compile") as failed:
        build_engines(str(model), "aoti-cpu", root=editable.path.parent)
    words = str(failed.value)
    assert "\n" not in words

    def fail(*_: Any) -> None:
        raise EngineUnavailable(words)

    monkeypatch.setattr("export.to_aoti.compile_tower", fail)
    report = build_engines(str(model), root=editable.path.parent)
    assert [card.runtime for card in report.cards] == ["ort-cpu", "ort-cpu"]
    assert f"{words}. Going on without it" in report.notes


def test_errors_of_the_command_are_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engines import build

    monkeypatch.setenv("NIGHTJAR_ARTIFACTS", str(tmp_path))
    assert build.main(["--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bf16_passes_its_own_bar_where_it_is_named(model: Path, artifact: Artifact) -> None:
    built = build_engines(str(model), "aoti-cpu", "bf16", root=artifact.path.parent)
    assert not built.failures
    card = choose(artifact, "vision", "aoti-cpu", "bf16").card
    assert SPREAD_ERROR_MAX["fp32"] < card.parity["error_over_spread"] < SPREAD_ERROR_MAX["bf16"]
    assert card.parity["moved_rows_changed"] == 0


# ---- hardware ------------------------------------------------------------------------------------------------------


def test_precision_is_decided_by_flags_and_a_measurement(editable: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    assert faster_precision(412, 142).precision == "bf16"
    assert faster_precision(90, 142) == ("fp32", "measured GEMM peak bf16 90, fp32 142 GFLOP/s")
    monkeypatch.setattr("engines.plan.has_bf16", lambda: False)
    assert choose_precision(editable).precision == "fp32"
    monkeypatch.setattr("engines.plan.has_bf16", lambda: True)
    monkeypatch.setattr(
        "engines.plan.gemm_peak_gflops", lambda precision, threads: {"bf16": 412, "fp32": 142}[precision]
    )
    assert choose_precision(editable).precision == "bf16"
    monkeypatch.setattr("engines.plan.gemm_peak_gflops", None)  # a second time it is read, not measured
    assert choose_precision(editable).reason == "measured GEMM peak bf16 412, fp32 142 GFLOP/s"


def test_hardware_is_named_and_counted() -> None:
    assert host_id() == host_id().lower()
    assert host_id().isascii()
    assert " " not in host_id()
    assert 1 <= physical_cores() <= len(os.sched_getaffinity(0))
    assert gemm_peak_gflops("fp32", 1) > 0.5


def test_runs_are_sized_by_tokens() -> None:
    assert {tokens: batch_rows(tokens) for tokens in (5, 50, 197, 257, 577)} == {5: 32, 50: 8, 197: 2, 257: 2, 577: 2}
