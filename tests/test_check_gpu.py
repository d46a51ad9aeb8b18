"""The GPU check never pretends: no GPU is said in one line, and whatever a check does becomes a row of the report."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline import check_gpu, rig_gpu

GPU = {"name": "Test GPU 9000", "compute_capability": "9.0"}
CHECK = check_gpu.CHECKS[0]


def no_driver() -> dict[str, str]:
    raise check_gpu.NoGpu("the NVIDIA driver is not here")


def test_a_host_without_gpu_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(check_gpu, "find_gpu", no_driver)
    monkeypatch.setattr(sys, "argv", ["check_gpu", "--out", str(tmp_path / "out")])
    assert check_gpu.main() == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "the NVIDIA driver is not here" in shown.err
    assert not (tmp_path / "out").exists(), "no report without a GPU"


def test_every_check_names_a_function_and_none_needs_a_gpu_library_to_import() -> None:
    for check in check_gpu.CHECKS:
        name, function = check.probe.split(":")
        assert callable(getattr(importlib.import_module(f"pipeline.{name}"), function)), check.name
    names = [check.name for check in check_gpu.CHECKS]
    assert len(set(names)) == len(names)
    assert {name[0] for name in names if name[1] == " "} == set("abcdefg")


def test_report_holds_every_row_and_one_failure_means_exit_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = iter(["pass"] * (len(check_gpu.CHECKS) - 1) + ["not run"])

    def run(check: check_gpu.Check, flags: list[str]) -> dict[str, object]:
        return check_gpu.row(check, next(answers), "a | b", {"n": 1, "stderr": ""}, 0.5)  # type: ignore[arg-type]

    monkeypatch.setattr(check_gpu, "find_gpu", lambda: GPU)
    monkeypatch.setattr(check_gpu, "run_one", run)
    monkeypatch.setattr(sys, "argv", ["check_gpu", "--out", str(tmp_path)])
    assert check_gpu.main() == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [one["name"] for one in report["checks"]] == [check.name for check in check_gpu.CHECKS]
    assert report["gpu"] == GPU
    assert "python" in report["versions"]
    table = [line for line in (tmp_path / "gpu_check.md").read_text().splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(check_gpu.CHECKS)
    assert "a \\| b" in table[1], "a bar in an answer must not break the table"


@pytest.mark.parametrize(
    ("code", "stdout", "status", "words"),
    [
        (-11, "", "fail", "the process died: SIGSEGV"),
        (2, "", "fail", "the process died: exit 2"),
        (0, 'noise\n{"status": "pass", "answer": "yes", "evidence": {"x": 1}}\n', "pass", "yes"),
    ],
)
def test_whatever_the_child_does_becomes_a_row(
    monkeypatch: pytest.MonkeyPatch, code: int, stdout: str, status: str, words: str
) -> None:
    done = subprocess.CompletedProcess([], code, stdout, "\x1b[31mred words\x1b[0m")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    one = check_gpu.run_one(CHECK, [])
    assert (one["status"], one["answer"]) == (status, words)
    assert one["evidence"]["stderr"] == "red words"


def test_a_check_that_hangs_becomes_a_row() -> None:
    one = check_gpu.run_one(CHECK, [], limit_s=0.01)
    assert (one["status"], one["answer"]) == ("fail", "did not come back in 0 s")


def test_a_missing_library_is_not_run_and_an_error_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # makes `import torch` fail
    told = check_gpu.child(CHECK, SimpleNamespace(pictures=None, artifact=None))
    assert told["status"] == "not run"
    assert "torch cannot be imported" in told["answer"]
    told = check_gpu.child(CHECK._replace(probe="rig_gpu:shrink"), object())
    assert told["status"] == "fail"
    assert told["answer"].startswith("AttributeError")


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
