"""The GPU check never pretends: no GPU is said in one line, and whatever a part does becomes a row of the report."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines import EngineUnavailable
from pipeline.devices import EngineWish
from pipeline.gpu_check import check_gpu, prepare_gpu, report_gpu, rig_gpu
from pipeline.gpu_check.checks_gpu import ALONE_CHECKS, CANARY_CHECKS, CHECKS, TOGETHER_CHECKS, Check
from pipeline.hardware_share_gpu import VARIABLE

ROOT = Path(__file__).resolve().parents[1]
GPU = {"name": "Test GPU 9000", "sm": "sm90"}
CHECK = CHECKS[0]
FIGURES = {
    "full GPU over OpenCV + ORT CUDA": 12.0,
    "image stage 400": 2.5,
    "image stage 800": 9.0,  # 8 is the bar
    "B/32 decode alone": 20_000,
    "B/32 model alone": 16_000,
    "B/32 end to end": 15_500,
}


def finished(check: Check, status: Any = "pass", figures: dict[str, float] | None = None) -> dict[str, Any]:
    return check_gpu.row(check, status, "a | b", {"figures": figures or {}, "stderr": ""}, 0.5)


def test_a_host_without_gpu_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(check_gpu, "gpu_problem", lambda: "no GPU is visible")
    monkeypatch.setattr(sys, "argv", ["check_gpu", "--out", str(tmp_path / "out")])
    assert check_gpu.main() == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "no GPU is visible" in shown.err
    assert not (tmp_path / "out").exists(), "no report without a GPU"


def test_every_part_names_a_function_and_none_needs_a_gpu_library_to_import() -> None:
    code = "import sys; " + "; ".join(f"import pipeline.gpu_check.{check.probe.split(':')[0]}" for check in CHECKS)
    code += "; sys.exit(any(name in sys.modules for name in ('cvcuda', 'nvidia.nvimgcodec', 'cuda.bindings', 'cv2')))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    for check in CHECKS:
        name, function = check.probe.split(":")
        assert callable(getattr(importlib.import_module(f"pipeline.gpu_check.{name}"), function)), check.name
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert {name[0] for name in names if name[1] == " "} == set("abcdefg")


def run_main(monkeypatch: pytest.MonkeyPatch, out: Path, status: str, figures: dict[str, float]) -> int:
    def one(check: Check, *_: object) -> dict[str, Any]:
        mine = check.name == ALONE_CHECKS[0].name
        return finished(check, status if check is CHECKS[-1] else "pass", figures if mine else None)

    monkeypatch.setattr(check_gpu, "gpu_problem", lambda: "")
    monkeypatch.setattr(check_gpu, "describe", lambda: GPU)
    monkeypatch.setattr(check_gpu, "run_one", one)
    monkeypatch.setattr(check_gpu, "draw", lambda out: None)
    monkeypatch.setattr(sys, "argv", ["check_gpu", "--out", str(out)])
    return check_gpu.main()


@pytest.mark.parametrize(
    ("status", "figures", "code"),
    [
        ("pass", {}, 0),
        ("not run", {}, 1),
        ("fail", {}, 1),
        ("pass", {"one picture p50": 3.9}, 0),
        ("pass", {"one picture p50": 4.1}, 1),
    ],
)
def test_one_part_that_did_not_pass_or_one_figure_missed_is_exit_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str, figures: dict[str, float], code: int
) -> None:
    assert run_main(monkeypatch, tmp_path, status, figures) == code


def test_report_holds_every_part_every_bar_and_what_did_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run_main(monkeypatch, tmp_path, "not run", FIGURES) == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [one["name"] for one in report["checks"]] == [check.name for check in CHECKS]
    assert report["gpu"] == GPU
    assert "python" in report["versions"]
    assert report["figures"]["B/32 end to end over the slower of decode and model"] == round(15_500 / 16_000, 3)
    text = (tmp_path / "gpu_check.md").read_text()
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert f"| {CHECKS[-1].name} | not run | a \\| b |" in sections["What could not run, or failed"]
    assert "a \\| b" in sections["All parts"], "a bar in an answer must not break the table"
    assert sections["All parts"].count("\n| ") == 1 + len(CHECKS)
    for name in report_gpu.BARS:
        (line,) = [line for line in sections["Figures"].splitlines() if line.startswith(f"| {name} |")]
        verdict = {"image stage 800": "**no**"}.get(name, "yes" if name in report["figures"] else "not measured")
        assert line.endswith(f"| {verdict} |"), line


def test_plots_are_drawn_from_what_was_measured_and_a_bad_one_costs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    stage = {who: {"decode": 3.0, "preprocess": 1.0, "total": 4.0} for who in ("gpu", "opencv")}
    evidence = {
        "image stage": {"ms": dict.fromkeys(("400", "800", "1600"), stage)},
        "pipelines": {"rates": {"one": 900, "other": 9000}, "batch": 256},
        "replicas": {"figures": "not what was expected"},
    }
    rows = [check_gpu.row(check, "pass", "", evidence[check.name], 1.0) for check in CHECKS if check.name in evidence]
    plots, reason = report_gpu.draw(rows, tmp_path)
    assert sorted(path.name for path in plots) == ["image_stage.png", "pipelines.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots)
    assert "replicas: " in reason
    assert "decode mixes was not measured" in reason


def test_a_figure_is_met_or_not_by_its_own_sign() -> None:
    rows = [finished(CHECK, figures=FIGURES)]
    assert report_gpu.unmet(rows) == ["image stage 800"]
    assert report_gpu.unmet([finished(CHECK, figures=FIGURES | {"B/32 end to end": 14_000})]) == [
        "image stage 800",
        "B/32 end to end",
        "B/32 end to end over the slower of decode and model",
    ]


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "fail", "the process died: SIGSEGV"),
        ("raise SystemExit(3)", "fail", "the process died: exit 3"),
        ('print(\'noise\'); print(\'{"status": "pass", "answer": "yes", "evidence": {}}\')', "pass", "yes"),
    ],
)
def test_whatever_the_child_does_becomes_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, status: str, words: str
) -> None:
    use_as_child(monkeypatch, tmp_path, f"import sys\nsys.stderr.write('\\x1b[31mred words\\x1b[0m')\n{code}\n")
    one = check_gpu.run_one(CHECK, [], 60, set())
    assert (one["status"], one["answer"]) == (status, words)
    assert one["evidence"]["stderr"].startswith("red words")


def test_a_part_that_hangs_becomes_a_row_and_takes_its_own_children_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Lanes and compilers are children of a part; one that went on would disturb every later measurement."""
    note = tmp_path / "pid"
    code = "import subprocess, sys, pathlib\n"
    code += "sleeper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    code += f"pathlib.Path({str(note)!r}).write_text(str(sleeper.pid))\nsleeper.wait()\n"
    use_as_child(monkeypatch, tmp_path, code)
    one = check_gpu.run_one(CHECK, [], 3, set())
    assert (one["status"], one["answer"]) == ("fail", "did not come back in 3 s")
    stat = Path(f"/proc/{note.read_text()}/stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the child of the part lives on")


def use_as_child(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """An interpreter that runs `code` whatever it is asked for."""
    (script := folder / "child.py").write_text(code)
    (python := folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}"\n')
    os.chmod(python, 0o755)
    monkeypatch.setattr(sys, "executable", str(python))


def test_a_part_that_no_longer_fits_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> dict[str, Any]:
        raise AssertionError("it was started")

    monkeypatch.setattr(check_gpu, "run_one", never)
    run = check_gpu.Run([], lambda rows: None)
    run.began -= check_gpu.TOTAL_S - 10
    one = run.one(CHECK)
    assert one["status"] == "not run"
    assert "10 of 460 s were left" in one["answer"]
    assert "--only" in one["answer"]


@pytest.mark.parametrize(
    ("without", "whole", "share"),
    [("pass", "pass", ""), ("pass", "fail", "0"), ("fail", "pass", ""), ("fail", "fail", ""), ("not run", "fail", "")],
)
def test_only_a_hardware_decoder_that_is_to_blame_is_left_out(
    monkeypatch: pytest.MonkeyPatch, without: str, whole: str, share: str
) -> None:
    statuses: dict[str, Any] = dict(zip([check.name for check in CANARY_CHECKS], (without, whole), strict=True))
    monkeypatch.setattr(check_gpu, "run_one", lambda check, *_: finished(check, statuses.get(check.name, "pass")))
    monkeypatch.setenv(VARIABLE, "")  # to be put back
    for ask in (check_gpu.Run.choose_decoders, lambda run: run.only("latency")):
        os.environ[VARIABLE] = ""
        ask(run := check_gpu.Run([], lambda rows: None))
        assert os.environ[VARIABLE] == share
        assert {name: run.rows[name]["status"] for name in statuses} == statuses, "both are in the report"


def test_the_parts_that_matter_fit_into_eight_minutes_at_their_limits() -> None:
    first_phase_s = max(check.limit_s for check in TOGETHER_CHECKS)
    then = (*CANARY_CHECKS, *ALONE_CHECKS[:5])
    assert first_phase_s + sum(check.limit_s for check in then) <= check_gpu.TOTAL_S


def test_what_does_not_fit_into_a_part_costs_nothing_that_was_built_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where AOTInductor takes longer than there is time: the engine on the CUDA provider is measured."""
    plain = prepare_gpu._run
    outcomes = {"random": "0", "cuda": "0", "tensorrt": "sys.exit('no TensorRT here')", "aoti-cuda": "time.sleep(60)"}

    def run(command: list[str], environment: dict[str, str], limit_s: float) -> str:
        (code,) = [code for word, code in outcomes.items() if word in command]
        return plain([sys.executable, "-c", f"import sys, time; {code}"], environment, limit_s)

    card = SimpleNamespace(
        tower="vision", runtime="cuda", precision="fp16", batch=64, rows_per_s=900.0, parity={}, fused_attention=0,
        passed=True,
    )  # fmt: skip
    spec = SimpleNamespace(vision=SimpleNamespace(layers=24))
    made = SimpleNamespace(spec=spec, cards=lambda: [(tmp_path, card)])
    monkeypatch.setattr(prepare_gpu, "_run", run)
    monkeypatch.setattr(prepare_gpu, "artifact", lambda job, arch: made)
    began = time.monotonic()
    finding = prepare_gpu.b32(rig_gpu.Job(tmp_path, None, prepare_gpu.END_S + 4.0))
    assert time.monotonic() - began < 30
    assert not finding.ok
    told = finding.evidence["told"]
    assert (told["weights"][:5], told["cuda"][:5]) == ("built", "built")
    assert told["tensorrt"].startswith("exit 1: no TensorRT here")
    assert told["aoti-cuda"].startswith("not done in the ")
    assert list(finding.evidence["engines"]) == ["cuda fp16"]
    lines = [json.loads(line)["evidence"]["told"] for line in capsys.readouterr().out.splitlines()]
    assert [list(one)[-1] for one in lines] == list(told), "each step is told when it ends, whatever ends the part"
    outcomes["tensorrt"] = "0"
    assert list(prepare_gpu.b32(rig_gpu.Job(tmp_path, None)).evidence["told"])[1:] == ["cuda", "tensorrt"]
    outcomes["cuda"] = "sys.exit('none')"
    with pytest.raises(rig_gpu.CannotRun, match=r"no engine of ViT-L-14 could be built: .*'cuda': 'exit 1: none"):
        prepare_gpu.l14(rig_gpu.Job(tmp_path, None))


def test_what_takes_longest_is_compiled_last_and_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Until then L/14 has the engine that takes no compiler; its weights are not made twice."""
    asked: list[str] = []
    card = SimpleNamespace(tower="vision", runtime="none", fused_attention=0)
    made = SimpleNamespace(spec=SimpleNamespace(vision=SimpleNamespace(layers=24)), cards=lambda: [(tmp_path, card)])

    def run(command: list[str], environment: dict[str, str], limit_s: float) -> str:
        asked.append(command[-1])
        (tmp_path / prepare_gpu.L14).mkdir(exist_ok=True)
        return "no TensorRT here" if command[-1] == "tensorrt" else ""

    monkeypatch.setattr(prepare_gpu, "_run", run)
    monkeypatch.setattr(prepare_gpu, "artifact", lambda job, arch: made)
    job = rig_gpu.Job(tmp_path, None)
    assert prepare_gpu.l14(job).ok
    assert prepare_gpu.compile_l14(job).ok
    assert asked == [str(tmp_path / prepare_gpu.L14), "cuda", "tensorrt", "aoti-cuda"]
    names = [check.name for check in ALONE_CHECKS]
    assert names.index("memory") < names.index("compile ViT-L-14") < names.index("index L/14")


def test_the_engine_that_is_measured_first_is_the_one_that_auto_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rates = {"cuda": 9000.0, "aoti-cuda": 8000.0}

    def rows_per_s(wish: EngineWish, kind: str) -> float:
        if wish.runtime not in rates:
            raise EngineUnavailable(f"no {wish.runtime}")
        return rates[wish.runtime]

    monkeypatch.setattr(prepare_gpu, "artifact", lambda job, arch: None)
    monkeypatch.setattr(EngineWish, "rows_per_s", rows_per_s)
    job = rig_gpu.Job(tmp_path, None)
    assert prepare_gpu.runtimes(job, prepare_gpu.B32) == ["cuda", "aoti-cuda"]
    rates["aoti-cuda"] = 10_000.0
    assert prepare_gpu.runtimes(job, prepare_gpu.B32) == ["aoti-cuda", "cuda"]
    rates.clear()
    with pytest.raises(rig_gpu.CannotRun, match=r"no cuda.*no tensorrt.*no aoti-cuda"):
        prepare_gpu.runtimes(job, prepare_gpu.B32)


def test_a_missing_library_is_not_run_and_an_error_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = rig_gpu.Job(tmp_path, None)
    monkeypatch.setitem(sys.modules, "torch", None)  # makes `import torch` fail
    told = check_gpu.child(CHECK._replace(probe="probes_gpu:size_order"), job)
    assert told["status"] == "not run"
    assert "torch cannot be imported" in told["answer"]
    told = check_gpu.child(CHECK._replace(probe="rig_gpu:shrink"), job)
    assert told["status"] == "fail"
    assert told["answer"].startswith("AttributeError")


def test_what_was_not_prepared_is_not_run_and_names_the_row_to_look_at(tmp_path: Path) -> None:
    job = rig_gpu.Job(tmp_path, None)
    for check in (*CANARY_CHECKS, *ALONE_CHECKS):
        if check.name == "tests alone":  # they prepare what they need
            continue
        told = check_gpu.child(check, job)
        assert (told["status"], "see the row `prepare" in told["answer"]) == ("not run", True), told


def test_the_messages_that_the_page_explains_are_those_we_give() -> None:
    page = (ROOT / "docs/gpu.md").read_text().split("## What a message means")[1].split("\n## ")[0]
    sources = [path.read_text() for folder in ("engines", "pipeline") for path in (ROOT / folder).rglob("*.py")]
    code = re.sub(r"[\"']\s+f?[\"']", "", "\n".join(sources))  # literals that lie beside each other are one
    for words in (
        "no GPU can be used",
        "not installed: pip install '.[gpu-cu13]'",
        "the GPU gives wrong pixels: ",
        "expected a number from 0 to 1",
        "nvImageCodec found no nvJPEG",
        "which cannot be loaded (",
        "nvImageCodec refused some of ",
        "(nodes), asked for ",
        "built without a GPU, never compared with the reference",
        "missed its accuracy bar",
        "does not fit in GPU memory",
    ):
        assert words in page, words
        assert words in code, words


def test_the_bar_on_pixels_rejects_the_wrong_resize_and_a_turned_picture() -> None:
    encoded = rig_gpu.jpeg(500, 375, seed=1, orientation=6)
    want = rig_gpu.shrink(rig_gpu.upright(encoded))
    assert want.shape == (3, 224, 224)
    assert rig_gpu.close(rig_gpu.distance(want, want))
    turned = rig_gpu.shrink(Image.open(io.BytesIO(encoded)).convert("RGB"))
    assert not rig_gpu.close(rig_gpu.distance(turned, want)), "EXIF ignored"
    small = rig_gpu.upright(encoded).resize((224, 298), Image.Resampling.BILINEAR).crop((0, 37, 224, 261))
    bilinear = np.asarray(small, dtype=np.float32).transpose(2, 0, 1)
    assert not rig_gpu.close(rig_gpu.distance(bilinear, want)), "bilinear for bicubic"


# ---- the whole of it, with parts that do their worst -----------------------------------------------------------------

WORST = """
import ctypes, json, os, signal, subprocess, sys, time
from engines.memory_gpu import Stream
from pipeline.gpu_check.rig_gpu import Finding, Job, tell

def good(job): return Finding(True, "good", {"figures": {"good": 1}})
def error(job): raise RuntimeError("an error")
def crash(job): tell(figures={"before the crash": 2}); ctypes.string_at(0)
def hang(job):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tell(figures={"before the hang": 3})
    time.sleep(600)
def noise(job): print("3\\n[]\\n{"); print(json.dumps({"evidence": 1})); os._exit(0)
def silence(job): os._exit(0)
def late(job):
    import atexit
    atexit.register(lambda: ctypes.string_at(0))
    return Finding(True, "measured", {})
def survivor(job):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(8)"], start_new_session=True)
    return Finding(True, "left a child that holds its pipes", {})
def poison(job):
    import fake_runtime
    fake_runtime.fault()
    Stream()
def full(job): open("/dev/full", "w").write(70000 * " ")
def limit(job): return Finding(True, f"{job.limit_s:.0f} s", {})
def share(job): return Finding(True, os.environ.get("NIGHTJAR_HARDWARE_SHARE", "unset"), {})
right_without = right_whole = good
wrong_without, wrong_whole = error, crash
"""
ORDERS = """
import os, sys
from pathlib import Path
sys.path[1:1] = {places!r}
exec(Path({fake!r}).read_text())
from pipeline.gpu_check import checks_gpu
def make(names):  # what others do to this host must not end a part that comes back by itself
    return tuple(checks_gpu.Check(name, "", "worst:" + name, 10.0 if name == "hang" else 40.0) for name in names)
checks_gpu.TOGETHER_CHECKS, checks_gpu.ALONE_CHECKS = make({together!r}), make({alone!r})
checks_gpu.CANARY_CHECKS = make({canaries!r})
checks_gpu.CHECKS = checks_gpu.TOGETHER_CHECKS + checks_gpu.CANARY_CHECKS + checks_gpu.ALONE_CHECKS
import pipeline.gpu_check
pipeline.gpu_check.__path__.append({folder!r})
"""
PARTS = ("error", "crash", "hang", "noise", "silence", "late", "survivor", "poison", "full")
RIGHT = ("right_without", "right_whole")


def start_worst(
    folder: Path, together: tuple[str, ...], alone: tuple[str, ...], canaries: tuple[str, ...] = RIGHT
) -> subprocess.Popen[str]:
    """`python -m pipeline.gpu_check` on stand-in GPUs, its parts replaced."""
    (folder / "worst.py").write_text(WORST)
    fake = ROOT / "tests" / "fake_gpu"
    values = {"places": [str(fake), str(ROOT)], "fake": str(fake / "sitecustomize.py"), "folder": str(folder)}
    (folder / "sitecustomize.py").write_text(ORDERS.format(**values, together=together, alone=alone, canaries=canaries))
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{fake}:{ROOT}"}
    environment.pop(VARIABLE, None)
    command = [sys.executable, "-m", "pipeline.gpu_check", "--out", str(folder / "out")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_whatever_parts_do_the_others_run_and_the_report_is_written(tmp_path: Path) -> None:
    began = time.monotonic()
    with start_worst(tmp_path, PARTS, ("good",)) as process:
        shown, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert time.monotonic() - began < 60
    report = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    rows = {one["name"]: (one["status"], one["answer"]) for one in report["checks"]}
    assert rows == {
        "error": ("fail", "RuntimeError: an error"),
        "crash": ("fail", "the process died: SIGSEGV"),
        "hang": ("fail", "did not come back in 10 s"),
        "noise": ("fail", "the process said nothing"),
        "silence": ("fail", "the process said nothing"),
        "late": ("pass", "measured (then the process died: SIGSEGV)"),
        "survivor": ("pass", "left a child that holds its pipes"),
        "poison": ("fail", "GpuError: cudaStreamCreateWithFlags failed with code 719: unspecified launch failure"),
        "full": ("fail", "OSError: [Errno 28] No space left on device"),
        "good": ("pass", "good"),
        **dict.fromkeys(RIGHT, ("pass", "good")),
    }
    assert report["figures"] == {"before the crash": 2, "before the hang": 3, "good": 1}
    assert "| hang |" in (tmp_path / "out" / "gpu_check.md").read_text()
    assert len(shown.splitlines()) == len(PARTS) + len(RIGHT) + 2, shown


def test_one_wrong_decoder_does_not_hide_all_measurements(tmp_path: Path) -> None:
    with start_worst(tmp_path, ("limit",), ("share",), ("right_without", "wrong_whole")) as process:
        shown, errors = process.communicate(timeout=60)
    report = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert {one["name"]: one["answer"] for one in report["checks"]} == {
        "limit": "40 s",  # a part knows when it is ended
        "right_without": "good",
        "wrong_whole": "the process died: SIGSEGV",
        "share": "0",
    }, errors
    assert report["gpu"][VARIABLE] == "0"
    assert f"{VARIABLE}=0, without the hardware decoder" in shown


def test_a_check_that_is_ended_early_leaves_what_is_done_and_nobody_behind(tmp_path: Path) -> None:
    with start_worst(tmp_path, ("good",), ("hang", "late")) as process:
        written = tmp_path / "out" / "gpu_check.json"
        for _ in range(300):
            if written.exists() and any(row["status"] == "pass" for row in json.loads(written.read_text())["checks"]):
                break
            time.sleep(0.1)
        time.sleep(0.5)
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "ended early; what is done is in" in errors
    rows = {row["name"]: row for row in json.loads(written.read_text())["checks"]}
    assert rows["good"]["status"] == "pass"
    assert (rows["late"]["status"], rows["late"]["answer"]) == ("not run", "not reached before it was ended")


def test_a_checkout_that_was_never_installed_compiles_the_same_image_stage() -> None:
    """Bits depend on the flags (contracted products)."""
    root = Path(__file__).parents[1]
    (module,) = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    line = next(line for line in (root / "Makefile").read_text().splitlines() if line.startswith("\t-cc "))
    assert set(module["extra-compile-args"]) < set(line.split())
