"""`bench peers`: our index against what users run today, on clean and on dirty pictures.

Same files for all, warm in the page cache, same cores, rounds in turns, medians and spread. A peer that has several
modes shows all of them in the first round, and goes on with its fastest. Every contestant's rate counts from when its
model is loaded; what came before is a column of its own. fastembed's processes load theirs when pictures come: their
rate is that of the second half of the pictures, where others, ours too, fill and empty their line within the time
taken. What counts as done is what lies on disk at the end. Each peer lives in `.venv-<peer>`, made here on top of our
own torch; what cannot be had is listed with the reason. On the dirty pictures the score is pictures embedded, and what
became of the others. What preparing and what encoding alone cost is told by `bench encoders`.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engines.hardware import physical_cores
from engines.spec import find_artifact
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


class Peer(NamedTuple):
    """`times`: pictures for one of 15 images/s, times this, so that all take about as long."""

    name: str  # with its mode behind a slash, where it has several
    times: int
    packages: tuple[str, ...]
    precision: str = "fp32"

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
        *(Peer(f"clip-retrieval/{workers} workers", 2, clip_retrieval) for workers in (0, 1, 2)),
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
    on_dirty: list[dict[str, Any]] = []
    whole: dict[str, Any] = {
        "model": model,
        "pictures": f"{len(corpus.distinct)} JPEGs of {EDGE} pixels, each copy with a unique comment",
        "contestants": list(rows.values()),
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
    for peer in running:  # last, for not all of them come back from there
        on_dirty.append(_dirty(peer, pythons[peer.name], dirty, good, model, work, limit))
        yield whole
    yield whole


def fastest_modes(peers: list[Peer], found: dict[str, list[dict[str, float]]]) -> list[Peer]:
    """Of each tool, by the first round."""
    rates = {peer.name: found[peer.name][0]["images_per_s"] for peer in peers}
    best = {peer.tool: peer.name for peer in sorted(peers, key=lambda peer: rates[peer.name])}
    return [peer for peer in peers if peer.name == best[peer.tool]]


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
    medians = {key: statistics.median(one[key] for one in found[name]) for key in found[name][0]}
    spread = {"images_per_s_min": min(rates), "images_per_s_max": max(rates)}
    return {
        "rounds": len(rates),
        **medians,
        **spread,
        **({"times_hf_one": statistics.median(ratios)} if ratios else {}),
    }


def _clean(
    peer: Peer, python: Path, corpus: Corpus, count: int, model: str, work: Path, limit: Limit
) -> dict[str, float]:
    folder, limit = corpus.folder(count), Limit(min(limit.left_s, CLEAN_S))
    if peer.name.startswith("nightjar"):
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
            half_s = run_measured(command, limit, _threads()).result["seconds"]
        target.unlink(missing_ok=True)
        done = run_measured([python, PEERS, peer.name, model, folder, target], limit, _threads())
        lost = count - _on_disk(target)
        rate = (done.result["images"] - half) / (done.result["seconds"] - half_s)
        seconds = done.result["images"] / rate
    return {
        "images": count, "lost": lost, "images_per_s": rate, "start_s": done.wall_s - seconds,
        "cpu_s_per_image": done.cpu_s / count, "peak_rss_mb": done.peak_rss_mb,
    }  # fmt: skip


def _threads() -> dict[str, str]:
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
        if peer.name.startswith("nightjar"):
            out = work / "dirty-index"
            shutil.rmtree(out, ignore_errors=True)
            done = run_measured(
                [*index_command(folder, out, model), "--devices", "cpu", "--precision", peer.precision], limit
            )
            embedded, told = files - index_vectors(out, sorted(os.listdir(folder))).lost, done.result["quarantined"]
        else:
            target = work / "dirty.npy"
            target.unlink(missing_ok=True)
            run_measured([python, PEERS, peer.name, model, folder, target], limit, _threads())
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
