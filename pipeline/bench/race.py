"""`bench race`: end-to-end images/s against what users run today, and against our own engines alone.

Same files, same cores, interleaved rounds. Every contestant is timed on n and on 2n pictures; the difference is its
rate, so that nobody pays for imports and model load. The faster ones get more pictures, for similar times. Rates are
per second and per second of CPU time, which neighbours on a shared host disturb less. A host that stands still during
the run over n makes the difference too small: a round in which we seem faster than our own engine does not count.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from engines import open_engine
from engines.spec import find_artifact
from pipeline.bench.peers import (
    FASTEMBED,
    FASTEMBED_PROCESSES,
    INSTALL_S,
    PEERS,
    Peer,
    give_fastembed_its_graph,
    make_venv,
    thread_budget,
)
from pipeline.bench.pictures import EDGE, jpegs_below, small_copies, unique_copies
from pipeline.bench.processes import Limit, index_command, last_json

ENGINE_S = 6.0  # of running the engine alone, twice a round
NOISE = 1.1  # what a run may seem faster than its own engine


class Seconds(NamedTuple):
    wall: float
    cpu: float  # of all threads and child processes; NaN where they are nobody's children


def race(pictures: Path, model: str, images: int, rounds: int, venvs: Path) -> dict[str, Any]:
    """Medians over `rounds` of images per second, and of each contestant's ratio to ours within a round."""
    fastembed_python = str(make_venv(Peer("fastembed/threads", 2, FASTEMBED), venvs, Limit(INSTALL_S)))
    jpegs = jpegs_below(pictures)
    artifact, ours = find_artifact(model), ["nightjar"]
    precisions: dict[str, Literal["auto", "int8"]] = {"nightjar": "auto"}
    if any(card.precision == "int8" for _, card in artifact.cards()):
        precisions["nightjar int8"] = "int8"
        ours.append("nightjar int8")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        contestants: dict[str, tuple[int, Callable[[Path], float]]] = {
            "hf-one": (images, _peer("hf-one", sys.executable, model, work)),
            "hf-batched": (2 * images, _peer("hf-batched", sys.executable, model, work)),
            **{
                mode: (4 * images, _peer(mode, fastembed_python, model, work))
                for mode in ("fastembed/threads", FASTEMBED_PROCESSES)
            },
        }
        for who, times in zip(ours, (8, 12), strict=False):
            contestants[who] = (
                times * images,
                partial(_timed_index, work=work, model=model, precision=precisions[who]),
            )
        jpegs = small_copies(jpegs, work / "small")
        for count in {size for n, _ in contestants.values() for size in (n, 2 * n)}:
            unique_copies(jpegs, work / str(count), count)
        give_fastembed_its_graph(model)
        table: list[dict[str, Seconds]] = []  # a picture
        refused: list[dict[str, float]] = []
        for _ in range(rounds):
            row: dict[str, Seconds] = {}
            for who, (n, run) in contestants.items():
                if who in ours:  # its engine alone before and after, as close in time as can be
                    before = engine_seconds(model, precisions[who])
                row[who] = _marginal(run, work, n)
                if who == FASTEMBED_PROCESSES:  # a fork server's, which ends after whoever is measured
                    row[who] = row[who]._replace(cpu=math.nan)
                if who in ours:
                    after = engine_seconds(model, precisions[who])
                    row[f"{who}, engine alone"] = Seconds(*((b + a) / 2 for b, a in zip(before, after, strict=True)))
            per_s = {who: 1 / seconds.wall for who, seconds in row.items()}
            print(json.dumps(per_s), file=sys.stderr, flush=True)
            if can_be(row, ours):
                table.append(row)
            else:
                refused.append(per_s)
    if not table:
        raise RuntimeError(
            f"no round of {rounds} counts, for nobody is faster than its own engine: {refused} images/s. The host "
            "stood still at times; measure again when it is quiet"
        )
    counts = {who: n for who, (n, _) in contestants.items()}
    return {
        "pictures": f"{len(jpegs)} JPEGs of {EDGE} pixels, each copy with a unique comment",
        "rates": [rates(who, table, ours, counts.get(who)) for who in table[0]],
        "rounds_images_per_s": [{who: 1 / seconds.wall for who, seconds in row.items()} for row in table],
        "rounds_images_per_cpu_s": [_known({who: 1 / seconds.cpu for who, seconds in row.items()}) for row in table],
        "refused": refused,
    }


def can_be(row: dict[str, Seconds], ours: list[str]) -> bool:
    """Whether nobody took less than no time, and none of ours less than its own engine, within noise."""
    least_s = {who: row[f"{who}, engine alone"].wall / NOISE for who in ours}
    return all(seconds.wall > least_s.get(who, 0) for who, seconds in row.items())


def rates(who: str, table: list[dict[str, Seconds]], ours: list[str], images: int | None) -> dict[str, Any]:
    """Medians of rates, and of ratios within a round: how many times as fast each of ours is."""
    one = [row[who] for row in table]
    found: dict[str, Any] = {
        "contestant": who,
        "images": f"{images} to {2 * images}" if images else "",
        "images_per_s": statistics.median(1 / seconds.wall for seconds in one),
        "images_per_cpu_s": statistics.median(1 / seconds.cpu for seconds in one),
    }
    for mine in ours:
        pairs = [(row[who], row[mine]) for row in table]
        found[f"{mine} over it"] = statistics.median(theirs.wall / own.wall for theirs, own in pairs)
        found[f"{mine} over it by CPU time"] = statistics.median(theirs.cpu / own.cpu for theirs, own in pairs)
    return _known(found)


def _known(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not (isinstance(value, float) and math.isnan(value))}


def _marginal(run: Callable[[Path], float], work: Path, images: int) -> Seconds:
    """For one picture more. The contestant's own clock starts after its start-up; of CPU time that is taken off."""
    walls, cpus = [], [_children_cpu_s()]
    for count in (images, 2 * images):
        walls.append(run(work / str(count)))
        cpus.append(_children_cpu_s())
    return Seconds((walls[1] - walls[0]) / images, (cpus[2] - 2 * cpus[1] + cpus[0]) / images)


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _timed_index(root: Path, work: Path, model: str, precision: str) -> float:
    out = work / "index"
    shutil.rmtree(out, ignore_errors=True)
    report = last_json([*index_command(root, out, model), "--precision", precision])
    assert report["embedded"] == len(os.listdir(root)), report
    return float(report["seconds"])


def _peer(who: str, python: str, model: str, work: Path) -> Callable[[Path], float]:
    def run(root: Path) -> float:
        result = last_json([python, str(PEERS), who, model, str(root), str(work / "peer.npy")], thread_budget())
        assert result["images"] == len(os.listdir(root)), result
        return float(result["seconds"])

    return run


def engine_seconds(model: str, precision: Literal["auto", "int8"]) -> Seconds:
    """A picture, in the engine `index` would take, alone, on random pixels, two batches in flight as in a lane."""
    engine = open_engine(find_artifact(model), "vision", precision=precision)
    rows = engine.card.batch
    for slot in (0, 1):
        engine.input(slot)[:] = np.random.default_rng(slot).standard_normal(engine.input(slot).shape, np.float32)
        engine.launch(slot, rows)
    engine.result(0)
    done, start_s, start_cpu_s = 0, time.monotonic(), time.process_time()
    while (seconds := time.monotonic() - start_s) < ENGINE_S:
        engine.launch(done // rows % 2, rows)
        done += rows
        engine.result(done // rows % 2)
    cpu_s = time.process_time() - start_cpu_s
    for slot in (0, 1):
        engine.result(slot)  # leaves the cores to whoever is next
    return Seconds(seconds / done, cpu_s / done)
