"""The gate rejects wrong engines; the build proves, measures and keeps the right ones, and says what it left out."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from compare import SPREAD_ERROR_MAX
from runs import run_module

from engines import EngineUnavailable, choose, gate, hardware, open_engine
from engines.build import Report, build_engines
from engines.gate import OVERLAP_MIN
from engines.hardware import gemm_peak_gflops, has_int8, host_id, physical_cores
from engines.plan import batch_rows, choose_precision, faster_precision, plan
from engines.spec import Artifact


@pytest.fixture
def artifact(all_engines: Report) -> Artifact:
    return all_engines.artifact


@pytest.fixture
def editable(artifact: Artifact, tmp_path: Path) -> Artifact:
    """A copy whose cards a test may spoil."""
    return Artifact.open(Path(shutil.copytree(artifact.path, tmp_path / artifact.path.name)))


@pytest.fixture
def reference(artifact: Artifact) -> tuple[gate.ExactEngine, npt.NDArray[Any], npt.NDArray[np.float32]]:
    engine = cast(gate.ExactEngine, open_engine(artifact, "vision", "ort-cpu"))
    return engine, *gate.golden(artifact, "vision")


# ---- the gate rejects ----------------------------------------------------------------------------------------------


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
    assert "36 of 36 vectors change with their place in the batch" in parity.failures


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
        gate.check(cast(gate.ExactEngine, open_engine(artifact, "text")), artifact)
    assert failed.value.parity.error_over_spread > 1e-12


# ---- building ------------------------------------------------------------------------------------------------------


def test_a_second_build_does_nothing_and_says_so(artifact: Artifact) -> None:
    env = {"NIGHTJAR_ARTIFACTS": str(artifact.path.parent), "PYTHONPROFILEIMPORTTIME": "1"}
    there = [artifact.path.parent, *artifact.path.parent.rglob("*")]
    before = [path.stat().st_mtime_ns for path in there]
    start = time.perf_counter()
    ran = run_module("engines.build", "--model", artifact.spec.model, env=env)
    assert time.perf_counter() - start < 5
    assert ran.code == 0
    assert "nothing changed: 3 engines are current" in ran.stdout
    assert "auto takes for vision: " in ran.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in ran.stderr.splitlines()}
    assert "engines.gate" in imported
    assert "torch" not in imported, "torch was imported to find out that nothing changed"
    assert [path.stat().st_mtime_ns for path in there] == before, "it must do on a read-only disk"


def test_two_builds_at_once_build_once(editable: Artifact, tmp_path: Path) -> None:
    """The one that waited finds what the other has built, and what a third left that was killed is removed."""
    (folder,) = editable.path.glob("engines/vision-ort-cpu-*")
    os.replace(folder, tmp_path / "built")
    command = [sys.executable, "-m", "engines.build", "--model", editable.spec.model, "--runtime", "ort-cpu", "--json"]
    env = {**os.environ, "NIGHTJAR_ARTIFACTS": str(tmp_path)}
    with (editable.path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert waiting.stderr is not None
        assert waiting.stderr.readline() == f"another process builds in {editable.path}; waiting for it\n"
        (editable.path / ".making" / "half").mkdir(parents=True)
        os.replace(tmp_path / "built", folder)
    said, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    assert json.loads(said)["built"] == 0
    assert not (editable.path / ".making").exists()


@pytest.mark.parametrize("module", ["engines.build", "export"])
def test_a_disk_that_takes_nothing_is_one_line_and_exit_1(module: str, artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["onnx", artifact.spec.model] if module == "export" else ["--model", artifact.spec.model]
    ran = run_module(module, *words, env={"NIGHTJAR_ARTIFACTS": str(tmp_path / "file" / "artifacts")})
    assert (ran.code, ran.stderr.count("\n")) == (1, 1)
    assert "Not a directory" in ran.stderr


def test_build_prints_one_json_object(artifact: Artifact) -> None:
    env = {"NIGHTJAR_ARTIFACTS": str(artifact.path.parent)}
    found = run_module("engines.build", "--model", artifact.spec.model, "--json", env=env).report
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


def test_a_compiler_that_fails_is_named_not_hidden(editable: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, card in editable.cards():
        if card.runtime == "aoti-cpu":
            path.unlink()
    monkeypatch.setattr("export.to_aoti.INDUCTOR", {"cpp.cxx": (None, "/bin/false")})
    with pytest.raises(EngineUnavailable, match="aoti-cpu did not compile") as failed:
        build_engines(editable.spec.model, "aoti-cpu", root=editable.path.parent)
    words = str(failed.value)
    assert "\n" not in words

    def fail(*_: Any) -> None:
        raise EngineUnavailable(words)

    monkeypatch.setattr("export.to_aoti.compile_tower", fail)
    report = build_engines(editable.spec.model, root=editable.path.parent)
    assert [card.runtime for card in report.cards] == ["ort-cpu", "ort-cpu"]
    assert f"{words}. Going on without it" in report.notes


def test_errors_of_the_command_are_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engines import build

    monkeypatch.setenv("NIGHTJAR_ARTIFACTS", str(tmp_path))
    assert build.main(["--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bf16_passes_its_own_bar_where_it_is_named(editable: Artifact) -> None:
    built = build_engines(editable.spec.model, "aoti-cpu", "bf16", root=editable.path.parent)
    assert not built.failures
    card = choose(editable, "vision", "aoti-cpu", "bf16").card
    assert SPREAD_ERROR_MAX["fp32"] < card.parity["error_over_spread"] < SPREAD_ERROR_MAX["bf16"]
    assert card.parity["moved_rows_changed"] == 0


@pytest.mark.skipif(not has_int8(), reason="int8 needs VNNI or AMX, this CPU has neither")
def test_int8_passes_its_own_bar_and_is_taken_only_where_it_is_named(editable: Artifact) -> None:
    built = build_engines(editable.spec.model, "aoti-cpu", "int8", root=editable.path.parent)
    assert not built.failures
    card = choose(editable, "vision", "aoti-cpu", "int8").card
    assert 5e-3 < card.parity["error_over_spread"] < SPREAD_ERROR_MAX["bf16"]  # it is 8-bit, and better than its bar
    assert card.parity["top9_overlap"] >= OVERLAP_MIN
    assert card.parity["moved_rows_changed"] == 0
    assert choose(editable, "vision", "auto", "int8").card.precision == "int8"
    chosen = choose(editable, "vision")
    assert chosen.card.precision != "int8"
    assert "int8 is only taken where it is named" in chosen.reason


def test_int8_is_refused_where_its_sums_would_overflow(editable: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.plan.has_int8", lambda: False)
    with pytest.raises(EngineUnavailable, match="avx512_vnni, avx_vnni or amx_int8"):
        build_engines(editable.spec.model, "aoti-cpu", "int8", root=editable.path.parent)


# ---- hardware ------------------------------------------------------------------------------------------------------


def test_precision_is_decided_by_flags_and_a_measurement(editable: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    assert faster_precision(412, 142).precision == "bf16"
    assert faster_precision(90, 142) == ("fp32", "measured GEMM peak bf16 90, fp32 142 GFLOP/s")
    monkeypatch.setattr("engines.plan.has_bf16", lambda: False)
    assert choose_precision(editable).precision == "fp32"
    monkeypatch.setattr("engines.plan.has_bf16", lambda: True)
    (editable.path / "engines" / f"precision-{host_id()}.json").unlink(missing_ok=True)  # a host with bf16 measured
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


@pytest.mark.parametrize(
    ("mine", "files", "cpus"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),  # a container: its own group is mounted as the root
        ("0::/a.slice/b.service", {"a.slice/b.service/cpu.max": "200000 100000"}, 2.0),  # systemd: CPUQuota=200%
        ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, 4.0),  # of the group above
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, math.inf),
        ("4:cpu,x:/a\n1:y:/", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3.0),
        ("4:cpu:/hidden", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        (None, {}, math.inf),  # no control groups
    ],
)
def test_a_quota_of_any_group_above_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: str | None, files: dict[str, str], cpus: float
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    if mine is not None:
        (tmp_path / "mine").write_text(f"{mine}\n")
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path)
    monkeypatch.setattr(hardware, "MY_CGROUPS", tmp_path / "mine")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(10_000, 10_016)))  # no host tells where they are
    assert hardware._cgroup_cpus() == cpus
    assert physical_cores() == min(16, math.ceil(cpus) if cpus < math.inf else 16)


def test_runs_are_sized_by_tokens() -> None:
    assert {tokens: batch_rows(tokens) for tokens in (5, 50, 197, 257, 577)} == {5: 32, 50: 8, 197: 2, 257: 2, 577: 2}
