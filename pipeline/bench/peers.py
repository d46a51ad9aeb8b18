"""`bench peers`: our index against what users run today, on clean and on dirty pictures.

Same files for all, warm in the page cache, same cores, rounds in turns, medians and spread. A tool that has several
modes shows all of them in the first round, and goes on with its fastest and those nearly as fast. Every contestant's
rate counts from when its model is loaded; what came before is a column of its own. fastembed's processes load theirs
when pictures come: their rate is that of the second half of the pictures, where others, ours too, fill and empty their
line within the time taken. What counts as done is what lies on disk at the end. Each peer lives in `.venv-<peer>`, made
here on top of our own torch; what cannot be had is listed with the reason.

`halves`: from files to what the model takes, and from there to vectors, apart from each other with all cores for each
(but clip-retrieval's reader, which has its workers). Ours are the stages of a lane: bytes in memory to pixels, and the
engine `index` takes. On the dirty pictures the score is pictures embedded, and what became of the others.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engines import open_engine
from engines.hardware import physical_cores
from engines.spec import Precision, find_artifact
from pipeline.bench.encoders import encoded_per_s, images_per_s
from pipeline.bench.ladder import index_vectors, lane_time
from pipeline.bench.pictures import EDGE, Corpus, dirty_copies, jpegs_below
from pipeline.bench.processes import ChildFailed, Limit, OutOfTime, index_command, run_measured

PEERS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "peers.py"
DISTINCT, DIRTY = 48, 60
CLEAN_S = 150.0  # three times what the slowest takes: one that hangs costs nobody else its rounds
DIRTY_S = 120.0  # twice what the slowest takes for as many clean ones, most of it to start
INSTALL_S = 900.0
FASTEMBED = ("fastembed==0.9.1",)
FASTEMBED_PROCESSES = "fastembed/processes"
NEAR = 0.85  # of its fastest mode's rate: one round cannot tell them apart


class Peer(NamedTuple):
    """`times`: pictures for one of 15 images/s, times this, so that all take about as long."""

    name: str  # with its mode behind a slash, where it has several
    times: int
    packages: tuple[str, ...]
    precision: Precision = "fp32"

    @property
    def ours(self) -> bool:
        return self.name.startswith("nightjar")

    @property
    def tool(self) -> str:
        return self.name.partition("/")[0]


def contestants(model: str) -> list[Peer]:
    torch = version("torch").partition("+")[0]
    clip_retrieval = ("clip-retrieval==2.45.0", "setuptools<=80.9.0", "transformers<5", "wandb", f"torch=={torch}")
    cards = {card.precision for _, card in find_artifact(model).cards() if card.tower == "vision"}
    ours = [Peer(f"nightjar {p}", times, (), p) for p, times in (("fp32", 4), ("bf16", 8), ("int8", 12)) if p in cards]
    return [
        Peer("hf-one", 1, ()),
        Peer("hf-batched", 2, ()),
        *ours,
        Peer("sentence-transformers", 2, ("sentence-transformers==6.2.0", f"torch=={torch}")),
        Peer("fastembed/threads", 2, FASTEMBED),
        Peer(FASTEMBED_PROCESSES, 8, FASTEMBED),  # in whole batches for each
        *(Peer(f"clip-retrieval/{workers}x64", 2, clip_retrieval) for workers in (0, 1, 2)),
        Peer("clip-retrieval/4x256", 11, clip_retrieval),  # its defaults; two batches, or nothing overlaps
    ]


def make_venv(peer: Peer, venvs: Path, limit: Limit) -> Path:
    """Python of the peer's environment, in which torch is ours: the same for all, and gigabytes less.

    Raises:
        ChildFailed: it cannot be installed, with pip's reason. OutOfTime: not within the limit.
    """
    if not peer.packages:
        return Path(sys.executable)
    home = (venvs / f".venv-{peer.tool}").absolute()
    python, done = home / "bin" / "python", home / ".done"
    if done.exists():
        return python
    site = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    _run([sys.executable, "-m", "venv", str(home)], limit)
    (site / "nightjar.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.packages], limit)
    done.touch()
    return python


def _run(command: list[str], limit: Limit) -> None:
    limit.check()
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit.left_s)
    except subprocess.TimeoutExpired:
        raise OutOfTime(f"not installed within {limit.seconds:g} s") from None
    if ran.returncode:
        raise ChildFailed(f"cannot be installed: {(ran.stderr or ran.stdout).strip()[-400:]}")


def peers(
    pictures: Path, model: str, images: int, rounds: int, limit: Limit, work: Path, venvs: Path
) -> Iterator[dict[str, Any]]:
    """Installing does not count against `limit`: it happens once."""
    rows: dict[str, dict[str, Any]] = {}
    pythons: dict[str, Path] = {}
    table = contestants(model)
    for peer in table:
        rows[peer.name] = {
            "contestant": peer.name,
            "precision": peer.precision,
            "packages": " ".join(peer.packages),
            "note": "",
        }
        try:
            pythons[peer.name] = make_venv(peer, venvs, Limit(INSTALL_S))
        except (ChildFailed, OutOfTime) as error:
            rows[peer.name]["note"] = str(error)
    give_fastembed_its_graph(model)
    limit = Limit(limit.seconds)
    corpus = Corpus(jpegs_below(pictures), work, DISTINCT)
    for peer in table:  # made and warm before anybody is timed
        corpus.folder(images * peer.times)
    dirty = work / "dirty"
    good = dirty_copies(corpus.distinct, dirty, DIRTY)
    found: dict[str, list[dict[str, float]]] = {peer.name: [] for peer in table}
    halves: dict[str, list[dict[str, float]]] = {}
    on_dirty: list[dict[str, Any]] = []
    whole: dict[str, Any] = {
        "model": model,
        "pictures": f"{len(corpus.distinct)} JPEGs of {EDGE} pixels, each copy with a unique comment",
        "contestants": list(rows.values()),
        "halves": [],
        "dirty": on_dirty,
    }
    running = [peer for peer in table if peer.name in pythons]
    for turn in range(rounds):
        for peer in running:
            try:
                found[peer.name].append(
                    _clean(peer, pythons[peer.name], corpus, images * peer.times, model, work, limit)
                )
            except (ChildFailed, OutOfTime) as error:
                rows[peer.name]["note"] = f"{turn} of {rounds} rounds: {error}"
                continue
            rows[peer.name] |= _summary(found, peer.name)
            yield whole
        running = fastest_modes([peer for peer in running if found[peer.name]], found)
    for turn in range(rounds):
        for peer in running:
            folder = corpus.folder(images * peer.times)
            try:
                taken = _halves(peer, pythons[peer.name], folder, model, limit)
            except (ChildFailed, OutOfTime) as error:
                rows[peer.name]["note"] = f"halves, {turn} of {rounds} rounds: {error}"
                continue
            halves.setdefault(peer.name, []).append(taken)
            whole["halves"] = [_summary_of_halves(halves[name], rows[name]) for name in halves]
            yield whole
    for peer in running:  # last, for not all of them come back from there
        on_dirty.append(_dirty(peer, pythons[peer.name], dirty, good, model, work, limit))
        yield whole
    yield whole


def fastest_modes(peers: list[Peer], found: dict[str, list[dict[str, float]]]) -> list[Peer]:
    """Of each tool, by the first round, and those that are NEAR."""
    rates = {peer.name: found[peer.name][0]["images_per_s"] for peer in peers}
    best: dict[str, float] = {}
    for peer in peers:
        best[peer.tool] = max(best.get(peer.tool, 0.0), rates[peer.name])
    return [peer for peer in peers if rates[peer.name] >= NEAR * best[peer.tool]]


def give_fastembed_its_graph(model: str) -> None:
    """fastembed reads MODEL/model.onnx with an input `pixel_values`; ours is the same network."""
    target = Path(model) / "model.onnx"
    if not target.exists():
        shutil.copyfile(find_artifact(model).onnx("vision", "fp32"), target)


def _summary(found: dict[str, list[dict[str, float]]], name: str) -> dict[str, float]:
    """Medians; `times_hf_one` is the median of ratios within a round."""
    rates = [one["images_per_s"] for one in found[name]]
    ratios = [
        mine["images_per_s"] / theirs["images_per_s"]
        for mine, theirs in zip(found[name], found["hf-one"], strict=False)
    ]
    spread = {"images_per_s_min": min(rates), "images_per_s_max": max(rates)}
    return {
        "rounds": len(rates),
        **_medians(found[name]),
        **spread,
        **({"times_hf_one": statistics.median(ratios)} if ratios else {}),
    }


def _medians(taken: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in taken) for key in taken[0]}


def _summary_of_halves(taken: list[dict[str, float]], row: dict[str, Any]) -> dict[str, Any]:
    return {"contestant": row["contestant"], "rounds": len(taken), **_medians(taken), "whole": row["images_per_s"]}


def _halves(peer: Peer, python: Path, folder: Path, model: str, limit: Limit) -> dict[str, float]:
    """Pictures a second, prepared and encoded."""
    if peer.ours:
        limit.check()
        artifact = find_artifact(model)
        engine = open_engine(artifact, "vision", precision=peer.precision)
        return {"prepared": images_per_s(artifact, folder), "encoded": encoded_per_s(engine)}
    at_once, budget = 1, thread_budget()
    if peer.name == FASTEMBED_PROCESSES:
        at_once, budget = physical_cores(), {"OMP_NUM_THREADS": "1"}
    command = [python, PEERS, peer.name, model, folder]
    with ThreadPoolExecutor(at_once) as pool:
        ran = list(pool.map(lambda _: run_measured(command, limit, budget).result, range(at_once)))
    return {half: sum(one[half] for one in ran) for half in ("prepared", "encoded")}


def _clean(
    peer: Peer, python: Path, corpus: Corpus, count: int, model: str, work: Path, limit: Limit
) -> dict[str, float]:
    folder, limit = corpus.folder(count), Limit(min(limit.left_s, CLEAN_S))
    for path in folder.iterdir():  # in the page cache, whatever the one before has pushed out
        path.read_bytes()
    if peer.ours:
        out = work / "index"
        shutil.rmtree(out, ignore_errors=True)
        done = run_measured(
            [*index_command(folder, out, model), "--devices", "cpu", "--precision", peer.precision], limit
        )
        lost = index_vectors(out, sorted(os.listdir(folder))).lost
        lanes = lane_time(json.loads((out / "runs" / "1.json").read_text()))
        rate, seconds = lanes["images_per_s"], lanes["seconds"]
    else:
        target = work / "peer.npy"
        half, half_s = 0, 0.0
        if peer.name == FASTEMBED_PROCESSES:
            half = count // 2
            command = [python, PEERS, peer.name, model, corpus.folder(half), target]
            half_s = run_measured(command, limit, thread_budget()).result["seconds"]
        target.unlink(missing_ok=True)
        done = run_measured([python, PEERS, peer.name, model, folder, target], limit, thread_budget())
        lost = count - _on_disk(target)
        rate = (done.result["images"] - half) / (done.result["seconds"] - half_s)
        seconds = done.result["images"] / rate
    return {
        "images": count, "lost": lost, "images_per_s": rate, "start_s": done.wall_s - seconds,
        "cpu_s_per_image": done.cpu_s / count, "peak_rss_mb": done.peak_rss_mb,
    }  # fmt: skip


def thread_budget() -> dict[str, str]:
    """What everybody may use, as they are told."""
    return {"OMP_NUM_THREADS": str(physical_cores())}


def _on_disk(target: Path) -> int:
    return len(np.load(target)) if target.exists() else 0


def _dirty(
    peer: Peer, python: Path, folder: Path, good: set[str], model: str, work: Path, limit: Limit
) -> dict[str, Any]:
    """Files = embedded + told (quarantined with a reason) + lost in silence, or the run died with nothing on disk."""
    files = len(os.listdir(folder))
    row = {"contestant": peer.name, "files": files, "pictures": len(good)}
    if limit.left_s <= 0:
        return {**row, "died": f"not measured within the limit of {limit.seconds:g} s"}
    limit = Limit(min(limit.left_s, DIRTY_S))
    try:
        if peer.ours:
            out = work / "dirty-index"
            shutil.rmtree(out, ignore_errors=True)
            done = run_measured(
                [*index_command(folder, out, model), "--devices", "cpu", "--precision", peer.precision], limit
            )
            embedded, told = files - index_vectors(out, sorted(os.listdir(folder))).lost, done.result["quarantined"]
        else:
            target = work / "dirty.npy"
            target.unlink(missing_ok=True)
            run_measured([python, PEERS, peer.name, model, folder, target], limit, thread_budget())
            embedded, told = _on_disk(target), 0
    except ChildFailed as error:
        return {
            **row,
            "embedded": 0,
            "told": 0,
            "lost in silence": 0,
            "died": str(error).strip().splitlines()[-1][-160:],
        }
    except OutOfTime:
        return {**row, "died": f"had not come to an end after {limit.seconds:.0f} s"}
    return {**row, "embedded": embedded, "told": told, "lost in silence": files - embedded - told, "died": ""}
