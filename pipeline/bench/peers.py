"""`bench peers`: our index against what users run today, on clean and on dirty pictures.

Same files for all, warm in the page cache, same cores, rounds in turns, medians and spread. Every contestant's rate
counts from when its model is loaded; what came before is a column of its own. What counts as done is what lies on disk
at the end. Each peer lives in `.venv-<peer>`, made here on top of our own torch; what cannot be had is listed with the
reason. On the dirty pictures the score is pictures embedded, and what became of the others.
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
from pipeline.bench.pictures import Corpus, dirty_copies, jpegs_below
from pipeline.bench.processes import ChildFailed, Limit, OutOfTime, index_command, run_measured
from pipeline.bench.race import PEERS, give_fastembed_its_graph

DISTINCT, DIRTY = 48, 60
HF = ("hf-one", "hf-batched")


class Peer(NamedTuple):
    """`times`: pictures for one of 15 images/s, times this, so that all take about as long."""

    name: str
    times: int
    packages: tuple[str, ...]
    precision: str = "fp32"


def contestants(model: str) -> list[Peer]:
    torch = version("torch").partition("+")[0]
    cards = {card.precision for _, card in find_artifact(model).cards() if card.tower == "vision"}
    ours = [Peer(f"nightjar {p}", times, (), p) for p, times in (("fp32", 2), ("bf16", 4), ("int8", 4)) if p in cards]
    return [
        Peer("hf-one", 1, ()),
        Peer("hf-batched", 2, ()),
        *ours,
        Peer("sentence-transformers", 2, ("sentence-transformers==6.2.0", f"torch=={torch}")),
        Peer("fastembed", 2, ("fastembed==0.9.1",)),
        Peer(
            "clip-retrieval",
            2,
            ("clip-retrieval==2.45.0", "setuptools<=80.9.0", "transformers<5", "wandb", f"torch=={torch}"),
        ),
    ]


def make_venv(peer: Peer, venvs: Path, limit: Limit) -> Path:
    """Python of the peer's environment, in which torch is ours: the same for all, and gigabytes less.

    Raises:
        ChildFailed: it cannot be installed, with pip's reason. OutOfTime: not within the limit.
    """
    if not peer.packages:
        return Path(sys.executable)
    home = (venvs / f".venv-{peer.name}").absolute()
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
            pythons[peer.name] = make_venv(peer, venvs, Limit(900))
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
    whole: dict[str, Any] = {"model": model, "contestants": list(rows.values()), "dirty": on_dirty}
    for turn in range(rounds):
        for peer in [peer for peer in table if peer.name in pythons]:
            folder = corpus.folder(images * peer.times)
            try:
                found[peer.name].append(_clean(peer, pythons[peer.name], folder, model, work, limit))
            except (ChildFailed, OutOfTime) as error:
                rows[peer.name]["note"] = str(error)
                continue
            rows[peer.name] |= _summary(found, peer.name)
            yield whole
        for peer in [peer for peer in table if found[peer.name] and turn == 0]:
            on_dirty.append(_dirty(peer, pythons[peer.name], dirty, good, model, work, limit))
            yield whole


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


def _clean(peer: Peer, python: Path, folder: Path, model: str, work: Path, limit: Limit) -> dict[str, float]:
    count = len(os.listdir(folder))
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
        target.unlink(missing_ok=True)
        env = {"OMP_NUM_THREADS": str(physical_cores())}
        done = run_measured([python, PEERS, peer.name, model, folder, target], limit, env)
        lost, seconds = count - _on_disk(target), done.result["seconds"]
        rate = done.result["images"] / seconds
    return {
        "images": count, "lost": lost, "images_per_s": rate, "start_s": done.wall_s - seconds,
        "cpu_s_per_image": done.cpu_s / count, "peak_rss_mb": done.peak_rss_mb,
    }  # fmt: skip


def _on_disk(target: Path) -> int:
    return len(np.load(target)) if target.exists() else 0


def _dirty(
    peer: Peer, python: Path, folder: Path, good: set[str], model: str, work: Path, limit: Limit
) -> dict[str, Any]:
    """Files = embedded + told (quarantined with a reason) + lost in silence, or the run died with nothing on disk."""
    files, row = (
        len(os.listdir(folder)),
        {"contestant": peer.name, "files": len(os.listdir(folder)), "pictures": len(good)},
    )
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
            run_measured([python, PEERS, peer.name, model, folder, target], limit)
            embedded, told = _on_disk(target), 0
    except ChildFailed as error:
        return {
            **row,
            "embedded": 0,
            "told": 0,
            "lost in silence": 0,
            "died": str(error).strip().splitlines()[-1][-160:],
        }
    except OutOfTime as error:
        return {**row, "died": f"not measured: {error}"}
    return {**row, "embedded": embedded, "told": told, "lost in silence": files - embedded - told, "died": ""}
