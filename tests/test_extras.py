"""Both CUDA extras can be installed as they are written, and no environment ends up with two CUDA majors.

uv resolves them against pip's index, reading metadata alone: 3 s, where pip would make 600 requests or download 3 GB.
Nothing is installed. TensorRT's library package is a stub that asks NVIDIA's own index what it needs; pyproject.toml
says it for uv, so what is checked of it is the pin, and that TensorRT asks for that version of it.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
CUDA = (12, 13)
BESIDE = ("dev", "bench")  # what a GPU host of a developer has too
MANY_CUDA = {"cuda-pathfinder", "nvidia-ml-py"}  # serve every CUDA


def cuda_majors(packages: dict[str, str]) -> dict[int, list[str]]:
    """CUDA major -> those of `packages` (name: version) built for it. With CUDA 13 NVIDIA's names lost their suffix."""
    found: dict[int, list[str]] = defaultdict(list)
    for name, version in packages.items():
        if suffix := re.search(r"-cu(\d\d)\b", name):
            found[int(suffix[1])].append(name)
        elif name in MANY_CUDA:
            continue
        elif name in ("cuda-bindings", "cuda-toolkit"):
            found[int(version.split(".")[0])].append(name)
        elif name.startswith("nvidia-"):
            found[13].append(name)
    return dict(found)


def requirements(*extras: str) -> list[Requirement]:
    return [Requirement(line) for extra in extras for line in EXTRAS[extra]]


def tensorrt_pin(cuda: int) -> str:
    (found,) = [r for r in requirements(f"gpu-cu{cuda}") if r.name == f"tensorrt-cu{cuda}"]
    return str(found.specifier).removeprefix("==")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment for uv: the index and certificate that pip is configured with."""
    probe = [sys.executable, "-m", "pip", "--retries", "0", "--timeout", "15", "index", "versions", "cvcuda-cu13"]
    asked = subprocess.run(probe, capture_output=True, text=True)
    if asked.returncode:
        pytest.skip(f"pip's index cannot be reached: {asked.stderr.strip().splitlines()[-1][:200]}")
    listed = subprocess.run([*probe[:3], "config", "list"], capture_output=True, text=True, check=True).stdout
    configured = {
        key.split(".")[-1]: value.strip("'") for key, value in re.findall(r"^(\S+)=(.*)$", listed, re.MULTILINE)
    }
    names = {"index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE"}
    return {names[key]: value for key, value in configured.items() if key in names}


def resolve(pyproject: Path, cuda: int, network: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What `pip install '.[gpu-cuNN,dev,bench]'` would bring; constraints.txt pins the CUDA 13 line."""
    command = [sys.executable, "-m", "uv", "--quiet", "pip", "compile", str(pyproject), "--no-header", "--no-annotate"]
    command += [word for extra in (f"gpu-cu{cuda}", *BESIDE) for word in ("--extra", extra)]
    command += ["--constraint", str(ROOT / "constraints.txt")] if cuda == 13 else []
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | network, cwd=pyproject.parent)


@pytest.fixture(scope="module")
def resolved(network: dict[str, str]) -> dict[int, dict[str, str]]:
    """CUDA major -> canonical name -> version."""
    found = {}
    for cuda in CUDA:
        done = resolve(ROOT / "pyproject.toml", cuda, network)
        assert done.returncode == 0, done.stderr
        pins = [line.split(";")[0].strip().split("==") for line in done.stdout.splitlines()]
        found[cuda] = {canonicalize_name(name): version for name, version in pins}
    return found


@pytest.mark.parametrize("cuda", CUDA)
def test_a_cuda_extra_resolves_and_holds_one_cuda_major(resolved: dict[int, dict[str, str]], cuda: int) -> None:
    packages = resolved[cuda]
    majors = cuda_majors(packages)
    assert set(majors) == {cuda}, majors
    assert len(majors[cuda]) >= 15, "torch came without its CUDA libraries"
    assert "onnxruntime-gpu" in packages
    assert "onnxruntime" not in packages, "its files overwrite those of onnxruntime-gpu"


def test_a_torch_of_the_other_cuda_is_noticed(network: dict[str, str], tmp_path: Path) -> None:
    """As it was: torch from 2.11 on is built for CUDA 13."""
    text = (ROOT / "pyproject.toml").read_text()
    assert text.count('"torch==2.10.0"') == 1
    (changed := tmp_path / "pyproject.toml").write_text(text.replace('"torch==2.10.0"', '"torch>=2.11"'))
    done = resolve(changed, 12, network)
    assert done.returncode != 0
    assert "cuda-bindings" in done.stderr


@pytest.mark.parametrize("cuda", CUDA)
def test_every_cuda_library_onnx_runtime_opens_is_asked_for(resolved: dict[int, dict[str, str]], cuda: int) -> None:
    """libonnxruntime_providers_cuda.so needs these; without them it goes on with the CPU and says nothing."""
    suffix = "-cu12" if cuda == 12 else ""
    libraries = {f"nvidia-{name}{suffix}" for name in ("cublas", "cuda-runtime", "cuda-nvrtc", "cufft", "curand")}
    assert not {*libraries, f"nvidia-cudnn-cu{cuda}"} - set(resolved[cuda])


@pytest.mark.parametrize("cuda", CUDA)
def test_tensorrt_is_the_major_onnx_runtime_loads_and_brings_its_libraries(
    resolved: dict[int, dict[str, str]], cuda: int
) -> None:
    pin = tensorrt_pin(cuda)
    assert pin.startswith("10."), "ONNX Runtime's provider opens libnvinfer.so.10"
    brought = {name: version for name, version in resolved[cuda].items() if name.startswith("tensorrt-cu")}
    assert brought == {f"tensorrt-cu{cuda}{part}": pin for part in ("", "-libs", "-bindings")}
    stubs = {row["name"]: row["version"] for row in PYPROJECT["tool"]["uv"]["dependency-metadata"]}
    assert stubs[f"tensorrt-cu{cuda}-libs"] == pin


def test_extras_that_may_be_combined_are_of_one_cuda_major() -> None:
    """By the names in pyproject.toml: those that may not are declared to be in conflict."""
    declared = [{row["extra"] for row in group} for group in PYPROJECT["tool"]["uv"]["conflicts"]]
    for pair in itertools.combinations(EXTRAS, 2):
        if any(set(pair) <= group for group in declared):
            continue
        lowest = {r.name: [s.version for s in r.specifier if s.operator != "<"] for r in requirements(*pair)}
        named = {name: versions[0] if versions else "" for name, versions in lowest.items()}
        assert len(cuda_majors(named)) <= 1, f"{pair}: {cuda_majors(named)}"
        assert not {"onnxruntime", "onnxruntime-gpu"} <= set(named), pair


def test_two_majors_are_noticed() -> None:
    assert set(cuda_majors({"nvidia-cublas": "13.4", "nvidia-cublas-cu12": "12.8"})) == {12, 13}
    assert set(cuda_majors({"cuda-bindings": "12.9.4", "cvcuda-cu13": "0.19"})) == {12, 13}
    assert cuda_majors({"nvidia-cufft": "12.2"}) == {13: ["nvidia-cufft"]}, "12.2 is cuFFT's own number in CUDA 13"
    assert not cuda_majors({"cuda-pathfinder": "1.9", "numpy": "2.4"})


def test_constraints_pin_everything_that_make_installs() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    asked = [Requirement(line) for line in PYPROJECT["project"]["dependencies"]]
    for one in asked + requirements("cpu", "nogpu", "lint", "dev"):
        assert canonicalize_name(one.name) in pins, f"{one.name} is not in constraints.txt: run make lock"
        assert one.specifier.contains(pins[canonicalize_name(one.name)]), one
