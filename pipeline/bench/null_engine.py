"""`bench null`: what the pipeline itself costs an image: real files, store and work sharing, but decoder and engine do
nothing. CPU time of all processes, without imports and lists (of the engine's few vectors they mean nothing); the cost
of a run over one image is taken off.

    python -m pipeline.bench.null_engine --source folder ...     is `pipeline.index` with such a lane

leaves an index of meaningless vectors behind; a second run by the real command finds it complete.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
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
from pipeline import index, lane_process
from pipeline.batch import Batch
from pipeline.bench.pictures import unique_copies
from pipeline.bench.processes import Limit, OutOfTime, run_measured
from pipeline.config import parse_index
from pipeline.lanes import Board, LaneSpec
from pipeline.stop import Stop
from pipeline.store import ann

BATCH = 256


class NullEngine:
    """Gives the same unit vectors for whatever it is given."""

    slots = 3

    def __init__(self, spec: LaneSpec) -> None:
        card = choose(Artifact.open(spec.artifact_path), "vision", spec.runtime, spec.precision, spec.kind).card
        self.card = replace(card, runtime="null", batch=BATCH, rows_per_s=20_000.0)
        emb_nd = np.random.default_rng(0).standard_normal((BATCH, card.dim))
        self._emb_nd = (emb_nd / np.linalg.norm(emb_nd, axis=1, keepdims=True)).astype(np.float16)
        self._rows = [0] * self.slots

    def input(self, slot: int) -> None:
        return None

    def launch(self, slot: int, n: int) -> None:
        self._rows[slot] = n

    def result(self, slot: int) -> npt.NDArray[np.float16]:
        emb_nd: npt.NDArray[np.float16] = self._emb_nd[: self._rows[slot]]
        return emb_nd.copy()


class NullStages:
    def __call__(self, batch: Batch, out: None) -> Batch:
        batch.encoded, batch.pixels_rows = None, len(batch.ids)
        return batch

    def close(self) -> None:
        pass


def _no_stages(spec: LaneSpec, board: Board, engine: Engine) -> NullStages:
    return NullStages()


def main(argv: list[str] | None = None) -> None:
    """One JSON line: images embedded, and what that took from start to end of the run, imports not counted."""
    forked = multiprocessing.get_context("fork")  # so that lanes inherit the patches; nothing here has used OpenMP
    with (
        patch.object(lane_process, "open_lane_engine", NullEngine),
        patch.object(lane_process, "open_stages", _no_stages),
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
    """CPU us per image by number of images. Larger counts get fewer rounds: their share of start-up is smaller."""
    used: dict[int, list[dict[str, float]]] = {}
    whole: dict[str, Any] = {"model": model, "costs": []}
    for count in (1, *counts):
        little_pictures(work / f"null-{count}", count)
        os.sync()
        for turn in range(rounds if count < 50_000 else 1):
            out = work / f"null-{count}-{turn}"
            try:
                done = run_measured(null_command(work / f"null-{count}", out, model), limit).result
            except OutOfTime as error:
                whole["costs"].append({"images": count, "note": str(error)})
                yield whole
                return
            assert done["embedded"] == count, done
            used.setdefault(count, []).append({**done["cpu_s"], "wall": done["seconds"]})
        if count > 1:
            whole["costs"].append(_cost(count, used))
            whole["costs"][-1]["over_first"] = whole["costs"][-1]["cpu_us"] / whole["costs"][0]["cpu_us"]
            yield whole


def _cost(count: int, used: dict[int, list[dict[str, float]]]) -> dict[str, float]:
    """Medians, the cost of a run over one image taken off."""
    median = {n: {name: statistics.median(one[name] for one in used[n]) for name in used[n][0]} for n in (1, count)}
    us = {name: 1e6 * (median[count][name] - median[1][name]) / (count - 1) for name in median[1]}
    cpu_us = sum(value for name, value in us.items() if name != "wall")
    return {"images": count, "cpu_us": cpu_us, **{f"{name}_us".replace(" ", "_"): value for name, value in us.items()}}


if __name__ == "__main__":
    main()
