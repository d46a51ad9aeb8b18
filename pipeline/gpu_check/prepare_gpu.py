"""What the measurements of `python -m pipeline.gpu_check` need, made on the spot: nothing is fetched.

JPEGs are generated (500 x 375 pixels give about 80 kB), and a corpus of files with the same pixels and ever new bytes
is laid out in nested folders, so that its parts can be indexed alone. Models have random weights in real shapes: their
speed is that of a trained model, their vectors mean nothing. What is written lies in the page cache when it is read.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engines import EngineUnavailable
from engines.spec import Artifact
from pipeline.bench import unique_copies
from pipeline.devices import EngineWish
from pipeline.gpu_check.rig_gpu import CannotRun, Finding, Job, jpeg

# Name -> width, height, how many different ones.
POOLS = {"500": (500, 375, 256), "400": (400, 400, 32), "800": (800, 800, 32), "1600": (1600, 1600, 32)}
# Each root holds the ones before it: 5,000, 25,000 and 125,000 files.
CORPUS = {"large/middle/small": 5_000, "large/middle/more": 20_000, "large/more": 100_000}
ROOTS = {"small": "large/middle/small", "middle": "large/middle", "large": "large"}
CORPUS_SHARE = 0.5  # of the free space of the folder at most
B32, L14 = "ViT-B-32", "ViT-L-14"
BUILD_LIMIT_S = 150.0
BEST_FIRST = ("tensorrt", "aoti-cuda", "cuda")


def pictures(job: Job) -> Finding:
    for name, (width, height, count) in POOLS.items():
        (folder := job.work / "pools" / name).mkdir(parents=True)
        with ThreadPoolExecutor() as pool:
            made = pool.map(lambda seed, w=width, h=height: jpeg(w, h, seed), range(count))
            for number, encoded in enumerate(made):
                (folder / f"{number:03d}.jpg").write_bytes(encoded)
    files = sorted((job.work / "pools/500").iterdir())
    kb = sum(path.stat().st_size for path in files) / len(files) / 1000
    wanted, free = 1000 * kb * sum(CORPUS.values()), shutil.disk_usage(job.work).free
    share = min(1.0, CORPUS_SHARE * free / wanted)
    counts = {folder: max(len(files), int(share * count)) for folder, count in CORPUS.items()}
    firsts = [sum(list(counts.values())[:number]) for number in range(len(counts))]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda f, c, n: unique_copies(files, job.work / f, c, n), counts, counts.values(), firsts))
    return Finding(True, f"{sum(counts.values())} files of {kb:.0f} kB in {job.work}", {"kB": round(kb), **counts})


def b32(job: Job) -> Finding:
    return model(job, B32)


def l14(job: Job) -> Finding:
    return model(job, L14)


def model(job: Job, arch: str) -> Finding:
    """Random weights, the ONNX Runtime CUDA engine, and the best compiled one: TensorRT, else AOTInductor."""
    folder, environment = job.work / arch, os.environ | {"NIGHTJAR_ARTIFACTS": str(job.work / "artifacts" / arch)}
    _run([sys.executable, "-m", "export", "random", "--arch", arch, str(folder)], environment)
    told = {runtime: _build(folder, runtime, environment) for runtime in ("cuda", "tensorrt")}
    if told["tensorrt"] != "built":
        told["aoti-cuda"] = _build(folder, "aoti-cuda", environment)
    built = [runtime for runtime, words in told.items() if words == "built"]
    if not built:
        raise CannotRun(f"no engine of {arch} could be built: {told}")
    cards = [card for _, card in artifact(job, arch).cards() if card.tower == "vision" and card.runtime in built]
    rows = {
        f"{card.runtime} {card.precision}": {"batch": card.batch, "parity": card.parity, "fused": card.fused_attention}
        for card in cards
    }
    layers = artifact(job, arch).spec.vision.layers
    fused = all(card.fused_attention == layers for card in cards if card.runtime == "tensorrt")
    words = "" if fused else f"; a plan does not hold one attention kernel for each of {layers} layers"
    return Finding(fused and all(card.passed for card in cards), f"{told}{words}", {"told": told, "engines": rows})


def _build(folder: Path, runtime: str, environment: dict[str, str]) -> str:
    """The word "built", or why it was not."""
    try:
        _run([sys.executable, "-m", "engines.build", "--model", str(folder), "--runtime", runtime], environment)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return str(error)[-500:]
    return "built"


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=BUILD_LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr.strip()[-500:]}")


def pool(job: Job, name: str) -> list[bytes]:
    """The generated JPEGs of one size."""
    files = sorted((job.work / "pools" / name).glob("*.jpg"))
    if len(files) != POOLS[name][2]:
        raise CannotRun(f"pictures of {name} pixels are not there: see the row `prepare pictures`")
    return [path.read_bytes() for path in files]


def root(job: Job, name: str) -> tuple[Path, int]:
    """A root of the corpus and how many files it holds."""
    folder = job.work / ROOTS[name]
    count = sum(1 for path in folder.rglob("*.jpg"))
    if not count:
        raise CannotRun("the corpus is not there: see the row `prepare pictures`")
    return folder, count


def artifact(job: Job, arch: str) -> Artifact:
    found = sorted((job.work / "artifacts" / arch).glob("*/spec.json"))
    if not found:
        raise CannotRun(f"{arch} is not there: see the row `prepare {arch}`")
    return Artifact.open(found[0].parent)


def runtimes(job: Job, arch: str) -> list[str]:
    """What this host has of the GPU runtimes for `arch`, best first.

    Raises:
        CannotRun: none of them, with the reason for each.
    """
    fit, refused = [], []
    for runtime in BEST_FIRST:
        try:
            EngineWish(artifact(job, arch), runtime, "auto").rows_per_s("gpu")
            fit.append(runtime)
        except EngineUnavailable as error:
            refused.append(str(error))
    if not fit:
        raise CannotRun(f"no GPU engine of {arch}: {json.dumps(refused)}")
    return fit
