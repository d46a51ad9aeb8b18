"""`bench null`: what the pipeline itself costs an image: real files, store, work sharing and all that a CPU lane does
in Python. What is C in it, decoding, resizing and the engine, gives the same little arrays for whatever it is given.

CPU time of all processes of a whole run, publishing included, without imports and lists (of the engine's few vectors
they mean nothing); what a run over one image takes is taken off. Nothing else is: what a thousand images cost is told
with the chunks they are cut into. `lane_user_us` is the Python of a lane and the C that is left to it, hashing, msgpack
and HDF5: an upper bound of its Python.

    python -m pipeline.bench.null_engine --source folder ...     is `pipeline.index` with such a lane

leaves an index of meaningless vectors behind; a second run by the real command finds it complete.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from PIL import Image

from engines import Engine, choose
from engines.spec import Artifact
from pipeline import index, lane_process, stages_cpu
from pipeline.bench.pictures import unique_copies
from pipeline.bench.processes import Limit, OutOfTime, run_measured
from pipeline.config import parse_index
from pipeline.lanes import Board, LaneSpec
from pipeline.stages_cpu import CpuStages
from pipeline.stop import Stop
from pipeline.store import ann

BATCH, SIZE = 256, 1
TURNS, FEW = 10, 5000  # a round has so many runs over one image and over a few: start-up is half of those, and varies


class NullEngine:
    """Gives the same unit vectors for whatever it is given."""

    slots = 3

    def __init__(self, spec: LaneSpec) -> None:
        card = choose(Artifact.open(spec.artifact_path), "vision", spec.runtime, spec.precision, spec.kind).card
        self.card = replace(card, runtime="null", batch=BATCH, rows_per_s=20_000.0)
        emb_nd = np.random.default_rng(0).standard_normal((BATCH, card.dim))
        self._emb_nd = (emb_nd / np.linalg.norm(emb_nd, axis=1, keepdims=True)).astype(np.float16)
        self._pixels_nchw = np.zeros((BATCH, 3, SIZE, SIZE), np.float32)
        self._rows = [0] * self.slots

    def input(self, slot: int) -> npt.NDArray[np.float32]:
        return self._pixels_nchw

    def launch(self, slot: int, n: int) -> None:
        self._rows[slot] = n

    def result(self, slot: int) -> npt.NDArray[np.float16]:
        emb_nd: npt.NDArray[np.float16] = self._emb_nd[: self._rows[slot]]
        return emb_nd.copy()


def little_stages(spec: LaneSpec, board: Board, engine: Engine) -> CpuStages:
    return CpuStages(replace(spec.preprocess, size=SIZE), spec.decode_threads, board)


def main(argv: list[str] | None = None) -> None:
    """One JSON line: images embedded, and what that took from start to end of the run, imports not counted."""
    pixel_hwc, pixel_chw = np.zeros((SIZE, SIZE, 3), np.uint8), np.zeros((3, SIZE, SIZE), np.uint8)
    forked = multiprocessing.get_context("fork")  # so that lanes inherit the patches; nothing here has used OpenMP
    with (
        patch.object(lane_process, "open_lane_engine", NullEngine),
        patch.object(lane_process, "open_stages", little_stages),
        patch("pipeline.decode_cpu.simplejpeg.decode_jpeg", lambda _, **__: pixel_hwc),
        patch.object(stages_cpu, "resize_crop", lambda *_: pixel_chw),
        patch("pipeline.lanes.multiprocessing.get_context", lambda _: forked),
        patch.object(ann, "update", lambda *_: None),
    ):
        cfg, before_s = parse_index(argv), _cpu_s()
        report = index.run(cfg, Stop())
    used = {name: value - before_s[name] for name, value in _cpu_s().items()}
    record = json.loads((cfg.out / "runs" / "1.json").read_text())
    print(json.dumps({**asdict(report), "cpu_s": used, "phases_s": record["phases_s"]}))


def _cpu_s() -> dict[str, float]:
    ours, lanes = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "coordinator user": ours.ru_utime, "coordinator system": ours.ru_stime, "lane user": lanes.ru_utime,
        "lane system": lanes.ru_stime,
    }  # fmt: skip


def null_command(root: Path, out: Path, model: str) -> list[str]:
    words = ["--source", "folder", "--root", str(root), "--out", str(out), "--model", model]
    return [sys.executable, "-m", "pipeline.bench.null_engine", *words, "--devices", "cpu", "--json"]


def little_pictures(folder: Path, count: int) -> None:
    """`count` JPEGs of some hundred bytes, all different."""
    Image.new("RGB", (16, 16)).save(source := folder.parent / "little.jpg")
    unique_copies([source], folder, count)


def null_engine(model: str, counts: list[int], rounds: int, limit: Limit, work: Path) -> Iterator[dict[str, Any]]:
    """CPU us per image by number of images, medians of runs that take turns."""
    used: dict[int, list[dict[str, float]]] = {count: [] for count in (1, *counts)}
    whole: dict[str, Any] = {"model": model, "costs": []}
    try:
        for count in used:
            little_pictures(work / f"null-{count}", count)
        os.sync()
        for turn in range(rounds * TURNS):
            for count, runs in used.items():
                if turn % TURNS == 0 or count <= FEW:
                    runs.append(_run(work / f"null-{count}", work / "null-index", model, count, limit))
            whole["costs"] = _costs(used)
            yield whole
    except OutOfTime as error:
        yield {**whole, "costs": _costs(used), "note": str(error)}


def _run(folder: Path, out: Path, model: str, count: int, limit: Limit) -> dict[str, float]:
    done = run_measured(null_command(folder, out, model), limit).result
    assert done["embedded"] == count, done
    shutil.rmtree(out)
    return {"cpu": sum(done["cpu_s"].values()), **done["cpu_s"], "wall": done["seconds"]}


def _costs(used: dict[int, list[dict[str, float]]]) -> list[dict[str, float]]:
    """Medians, those of a run over one image taken off. Parts of the CPU time have their own; they vary more."""
    median = {
        count: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for count, runs in used.items()
        if runs
    }
    once = median.pop(1, {})
    costs: list[dict[str, float]] = []
    for count, seconds in median.items():
        us = {f"{name}_us".replace(" ", "_"): 1e6 * (seconds[name] - once[name]) / (count - 1) for name in seconds}
        over_first = us["cpu_us"] / costs[0]["cpu_us"] if costs else 1.0
        costs.append({"images": count, "runs": len(used[count]), **us, "over_first": over_first})
    return costs


if __name__ == "__main__":
    main()
