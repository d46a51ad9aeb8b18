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
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engines import EngineUnavailable
from engines.spec import Artifact
from pipeline.bench import unique_copies
from pipeline.devices import EngineWish
from pipeline.gpu_check.rig_gpu import CannotRun, Finding, Job, jpeg, tell

# Name -> width, height, how many different ones.
POOLS = {"500": (500, 375, 256), "400": (400, 400, 32), "800": (800, 800, 32), "1600": (1600, 1600, 32)}
# Each root holds the ones before it: 5,000, 25,000 and 125,000 files.
CORPUS = {"large/middle/small": 5_000, "large/middle/more": 20_000, "large/more": 100_000}
ROOTS = {"small": "large/middle/small", "middle": "large/middle", "large": "large"}
CORPUS_SHARE = 0.5  # of the free space of the folder at most
B32, L14 = "ViT-B-32", "ViT-L-14"
END_S = 5.0  # before a part is ended from outside, it ends what it runs, and says what it has
RUNTIMES = ("cuda", "tensorrt", "aoti-cuda")  # in this order: the first needs least
LATE = "not done"


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
    return model(job, B32, RUNTIMES)


def l14(job: Job) -> Finding:
    """Without what is compiled: its weights, its graphs and their proof on the CPU already take two minutes."""
    return model(job, L14, RUNTIMES[:1])


def compile_l14(job: Job) -> Finding:
    artifact(job, L14)
    return model(job, L14, RUNTIMES[1:])


def model(job: Job, arch: str, runtimes: Sequence[str]) -> Finding:
    """Random weights, if they are not there, and an engine for each of `runtimes`; AOTInductor's only without TensorRT.

    What does not fit into the time of this part is told so, and costs nothing that was built before it.
    """
    folder, ends_s, told, built = job.work / arch, time.monotonic() + job.limit_s - END_S, dict[str, str](), set[str]()
    environment = os.environ | {"NIGHTJAR_ARTIFACTS": str(job.work / "artifacts" / arch)}

    def step(name: str, *command: str) -> None:
        began = time.monotonic()
        if not (words := _run([sys.executable, "-m", *command], environment, ends_s - began)):
            built.add(name)
        told[name] = f"{words or 'built'}, {time.monotonic() - began:.0f} s"
        tell(told=told)

    if not folder.exists():
        step("weights", "export", "random", "--arch", arch, str(folder))
    for runtime in runtimes:
        if (runtime, "tensorrt" in built) != ("aoti-cuda", True):
            step(runtime, "engines.build", "--model", str(folder), "--runtime", runtime)
    if not built.intersection(runtimes):
        raise CannotRun(f"no engine of {arch} could be built: {told}")
    cards = [card for _, card in artifact(job, arch).cards() if card.tower == "vision" and card.runtime in built]
    rows = {
        f"{card.runtime} {card.precision}": {
            "batch": card.batch, "rows_per_s": card.rows_per_s, "parity": card.parity, "fused": card.fused_attention
        }
        for card in cards
    }  # fmt: skip
    layers = artifact(job, arch).spec.vision.layers
    fused = all(card.fused_attention == layers for card in cards if card.runtime == "tensorrt")
    words = "" if fused else f"; a plan does not hold one attention kernel for each of {layers} layers"
    in_time = not any(one.startswith(LATE) for one in told.values())
    ok = fused and in_time and all(card.passed for card in cards)
    return Finding(ok, f"{told}{words}", {"told": told, "engines": rows})


def _run(command: list[str], environment: dict[str, str], limit_s: float) -> str:
    """Why it failed; empty where it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=max(0.0, limit_s))
    except subprocess.TimeoutExpired:
        return f"{LATE} in the {max(0.0, limit_s):.0f} s that were left"
    return f"exit {done.returncode}: {done.stderr.strip()[-500:]}" if done.returncode else ""


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
    """What this host has of the GPU runtimes for `arch`, by the rates in their cards: `auto` takes the first.

    Raises:
        CannotRun: none of them, with the reason for each.
    """
    rows_per_s, refused = dict[str, float](), []
    for runtime in RUNTIMES:
        try:
            rows_per_s[runtime] = EngineWish(artifact(job, arch), runtime, "auto").rows_per_s("gpu")
        except EngineUnavailable as error:
            refused.append(str(error))
    if not rows_per_s:
        raise CannotRun(f"no GPU engine of {arch}: {json.dumps(refused)}")
    return sorted(rows_per_s, key=rows_per_s.__getitem__, reverse=True)
