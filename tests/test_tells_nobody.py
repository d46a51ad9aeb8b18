"""Promise: nothing of what is run here is written elsewhere or told to anybody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines.spec import find_artifact

OWN = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "CI")  # settings of this process that would say so already
# Telemetry is written when a session is opened, at the latest some hundred milliseconds after.
OPEN = """
import sys, time
from pathlib import Path
{module}
from onnxruntime import InferenceSession
InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
time.sleep(1)
"""


def left_at_home(module: str, graph: Path, home: Path) -> list[Path]:
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if name not in OWN} | {"HOME": str(home)}
    command = [sys.executable, "-B", "-c", OPEN.format(module=module), str(graph)]
    subprocess.run(command, env=env, check=True, cwd=Path(__file__).parents[1])
    return [path for path in home.rglob("*") if path.is_file()]


def test_onnx_runtime_keeps_no_record_of_its_user(tiny_model: Path, tmp_path: Path) -> None:
    graph = next(find_artifact(str(tiny_model)).path.glob("onnx/text*.onnx"))
    if not left_at_home("", graph, tmp_path / "without"):
        pytest.skip("this ONNX Runtime keeps no record by itself")
    assert left_at_home("import engines.ort", graph, tmp_path / "engines") == []
    assert left_at_home("import export.to_onnx", graph, tmp_path / "export") == []
