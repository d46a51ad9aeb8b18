"""The container files say what the contract asks for. No image was ever built from them; hadolint is in `make lint`."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pictures import write_folder

from pipeline.hardware_share_gpu import VARIABLE

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.nightly.yml").read_text())


def stages() -> dict[str, list[str]]:
    """Stage -> its instructions, lines joined."""
    found: dict[str, list[str]] = {}
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("FROM "):
            found[line.split()[-1]] = []
        found[next(reversed(found))].append(line)
    return found


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_target_runs_unprivileged_answers_for_its_health_and_has_one_cuda_lane(target: str) -> None:
    lines = stages()[target]
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert users[-1].isdigit()
    assert users[-1] != "0"
    assert not [line for line in lines[lines.index(f"USER {users[-1]}") :] if line.startswith("RUN ")]
    (health,) = [line for line in lines if line.startswith("HEALTHCHECK ")]
    assert ("--gpu" in health) == (target == "gpu")
    (pip,) = [line for line in lines if "pip install" in line]
    assert re.search(r"'\.\[(.+)\]'", pip)[1] == {"cpu": "cpu", "gpu": "gpu-cu13"}[target]  # type: ignore[index]
    assert "--constraint constraints.txt" in pip


def test_the_gpu_image_asks_for_the_jpeg_engine() -> None:
    (line,) = [line for line in stages()["gpu"] if "NVIDIA_DRIVER_CAPABILITIES" in line]
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video" in line
    devices = COMPOSE["services"]["nightly-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert {"gpu", "compute", "utility", "video"} <= set(devices[0]["capabilities"])


def test_the_variable_that_the_canary_names_reaches_the_container() -> None:
    """`NIGHTJAR_HARDWARE_SHARE=0 docker compose ...`, for a hardware decoder that gives wrong pictures."""
    environment = COMPOSE["services"]["nightly-gpu"]["environment"]
    assert environment[VARIABLE] == f"${{{VARIABLE}:-1}}"


def test_what_is_copied_is_there_and_not_ignored() -> None:
    copied = [word for line in stages()["base"] if line.startswith("COPY ") for word in line.split()[1:-1]]
    allowed = {line[1:] for line in (ROOT / "docker/Dockerfile.dockerignore").read_text().split() if line[0] == "!"}
    assert set(copied) == allowed
    assert all((ROOT / path).exists() for path in copied)


def test_nothing_says_that_an_image_was_built() -> None:
    assert "NEVER BUILT" in DOCKERFILE


def test_nightly_services_run_our_commands_offline_and_unprivileged() -> None:
    targets = set(stages()) - {"base"}
    for name, service in COMPOSE["services"].items():
        assert service["build"]["target"] in targets, name
        assert importlib.util.find_spec(service["command"][0]) is not None, name
        assert service["network_mode"] == "none", name
        assert service["user"].endswith(":-10001:10001}"), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["restart"] == "no", "an exit code is an answer: a restart would hide it"


def test_the_first_process_of_a_container_has_lanes(tiny_model: Path, tmp_path: Path) -> None:
    """Kubernetes starts a command as process 1, without an init: a lane must not take that for a dead coordinator."""
    alone = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no process namespace can be made here (unshare)")
    write_folder(tmp_path / "pictures", 3)
    options = ["--source", "folder", "--root", tmp_path / "pictures", "--out", tmp_path / "index", "--json"]
    command = [*alone, sys.executable, "-m", "pipeline.index", *map(str, options), "--model", str(tiny_model)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["embedded"] == 3


def test_health_names_what_is_wrong(tmp_path: Path) -> None:
    def health(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "docker/health.py"), *flags]
        environment = {"NIGHTJAR_ARTIFACTS": str(tmp_path / "artifacts"), "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    index = f"--index={tmp_path}"
    assert (done := health(f"--index={tmp_path / 'away'}")).returncode == 1
    assert "takes no file" in done.stderr
    assert (done := health(index)).returncode == 1
    assert "run engines.build first" in done.stderr
    (tmp_path / "artifacts/model").mkdir(parents=True)
    (tmp_path / "artifacts/model/spec.json").write_text("{}")
    assert health(index).returncode == 0
    with_gpu = health(index, "--gpu")
    assert (with_gpu.returncode == 1) == bool(with_gpu.stderr), "no GPU here: it says why"
