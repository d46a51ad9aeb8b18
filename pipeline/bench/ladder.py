"""`bench ladder`: every rung on the same pictures, timed, weighed and checked. A rung that loses a picture, scores one
twice or changes answers fails, however fast it is.

Speed is measured with `--model` (random weights do), answers with the demo model, whose answers mean something: the
nine best pictures for a hundred texts, against those of Hugging Face one by one in fp32. Without that first rung there
is nothing to compare with, and nothing is measured. Every clock starts when the models are loaded; starts are in a
column of their own, and in `bench startup`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from engines.gate import SPREAD_ERROR_MAX, row_distances
from engines.hardware import gemm_peak_gflops, physical_cores
from engines.spec import ArtifactMissing, find_artifact
from pipeline.bench.pictures import Corpus, jpegs_below
from pipeline.bench.processes import ChildFailed, Limit, OutOfTime, index_command, run_measured
from pipeline.bench.rungs import Rung, rungs
from pipeline.search.embedders import TextEmbedder

SEED = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "seed.py"
DISTINCT = 48  # pictures with different pixels; more are copies with a comment of their own
ANSWER_PICTURES, ANSWER_TEXTS, TOP = 200, 100, 9
STORED_ERROR = 0.01  # of float16, in units of the spread; twelve times what rounding costs
OVERLAP_MIN = {"fp32": 0.99, "fp16": 0.95, "bf16": 0.95, "int8": 0.95}


class Vectors(NamedTuple):
    """What one run of a rung left on disk. Rows are in the order of the names, where none is lost."""

    emb_nd: npt.NDArray[np.float32]
    lost: int
    twice: int


class Ran(NamedTuple):
    vectors: Vectors
    images_per_s: float
    start_s: float
    stages_s: dict[str, float]  # busy time, added up over threads and processes


class Answers:
    """Pictures and texts of the demo, and the nine best that the reference found."""

    def __init__(self, model: str, work: Path) -> None:
        self.model, self.pictures = model, work / "answers"
        made = work / "demo"
        command = [
            sys.executable,
            "-m",
            "export.demo_pictures",
            str(made),
            "--count",
            str(ANSWER_PICTURES),
            "--seed",
            "7",
        ]
        subprocess.run(command, check=True, capture_output=True)
        self.pictures.mkdir()
        captions = json.loads((work / "demo-captions.json").read_text())
        for number, one in enumerate(captions):
            os.link(made / one["file"], self.pictures / f"{number:05d}.jpg")
        texts = list(dict.fromkeys(one["caption"] for one in captions))[:ANSWER_TEXTS]
        self.texts_nd = TextEmbedder(find_artifact(model)).embed(texts).astype(np.float32)
        self.best: npt.NDArray[np.intp] | None = None

    def overlap(self, emb_nd: npt.NDArray[np.float32]) -> float:
        """Share of the reference's nine that are among these nine. The first to come is the reference."""
        best = np.argsort(-(self.texts_nd @ emb_nd.T), axis=1, kind="stable")[:, :TOP]
        if self.best is None:
            self.best = best
        return float(np.mean([len(np.intersect1d(a, b)) / TOP for a, b in zip(self.best, best, strict=True)]))


class Climb:
    """Runs rungs and remembers what the reference, which is the first, gave."""

    def __init__(self, model: str, answers: Answers, corpus: Corpus, work: Path, limit: Limit) -> None:
        self.artifact, self.model, self.answers = find_artifact(model), model, answers
        self.corpus, self.work, self.limit = corpus, work, limit
        self.reference_nd: npt.NDArray[np.float32] | None = None

    def once(self, rung: Rung, with_answers: bool) -> dict[str, Any]:
        """One row: figures, and why it fails, if it does.

        Raises:
            ChildFailed: it died, or it is the reference and lost pictures. OutOfTime: the limit was reached.
        """
        run = self._seed if rung.runner == "seed" else self._index
        before = self._peak(rung)
        ran, asked, peak_rss_mb, joules = run(rung, with_answers)
        peak = (before + self._peak(rung)) / 2  # as close in time as can be
        made = [ran.vectors, asked] if asked else [ran.vectors]
        lost, twice = sum(one.lost for one in made), sum(one.twice for one in made)
        if self.reference_nd is None and (lost or twice):
            raise ChildFailed(f"the reference lost {lost} pictures and scored {twice} twice: it is none")
        gflop_per_s = ran.images_per_s * self.artifact.spec.vision.gflop
        row = {
            "images": rung.images,
            "images_per_s": ran.images_per_s,
            "start_s": ran.start_s,
            "stages_ms_per_image": {stage: 1000 * s / rung.images for stage, s in ran.stages_s.items()},
            "peak_rss_mb": peak_rss_mb,
            "gflop_per_s": gflop_per_s,
            "peak_gflop_per_s": peak or None,
            "peak_share": gflop_per_s / peak if peak else None,
            "joules_per_image": joules and joules / rung.images,
            "lost": lost,
            "scored_twice": twice,
            **self._compared(ran.vectors, asked),
        }
        return {**row, "failures": failures(row, rung)}

    def _peak(self, rung: Rung) -> float:
        """GFLOP/s; of a GPU as measured when the engine was built, 0 where nobody measured it."""
        if rung.device == "cpu":
            return gemm_peak_gflops(rung.precision, physical_cores())
        wanted = (rung.config.get("--runtime"), rung.precision)
        peaks = [
            card.gflop_per_s / card.peak_share
            for _, card in self.artifact.cards()
            if (card.runtime, card.precision) == wanted and card.peak_share
        ]
        return peaks[0] if peaks else 0.0

    def _compared(self, speed: Vectors, asked: Vectors | None) -> dict[str, float | None]:
        if self.reference_nd is None:
            self.reference_nd = speed.emb_nd[: len(self.corpus.distinct)]
        error = None
        if not speed.lost and not speed.twice:
            want_nd = self.reference_nd[np.arange(len(speed.emb_nd)) % len(self.reference_nd)]
            error = float(row_distances(speed.emb_nd, want_nd, self.reference_nd).mean())
        overlap = self.answers.overlap(asked.emb_nd) if asked and not asked.lost and not asked.twice else None
        return {"error_over_spread": error, "top9_overlap": overlap}

    def _seed(self, rung: Rung, with_answers: bool) -> tuple[Ran, Vectors | None, float, float | None]:
        speed, asked = self.work / "speed.npz", self.work / "answers.npz"
        runs = [
            {
                "model": self.model,
                "pictures": str(self.corpus.folder(rung.images)),
                "images": rung.images,
                "out": str(speed),
            }
        ]
        if with_answers:  # first: it warms what the other measures
            pictures = str(self.answers.pictures)
            runs.insert(
                0, {"model": self.answers.model, "pictures": pictures, "images": ANSWER_PICTURES, "out": str(asked)}
            )
        done = run_measured([sys.executable, SEED, json.dumps({**rung.config, "runs": runs})], self.limit)
        told, batch = done.result[-1], rung.config["batch"]
        ran = Ran(
            _npz(speed, rung.images, batch),
            told["images"] / told["seconds"],
            done.result[0]["start_s"],
            told["stages_s"],
        )
        answers = _npz(asked, ANSWER_PICTURES, batch) if with_answers else None
        return ran, answers, done.peak_rss_mb, done.joules

    def _index(self, rung: Rung, with_answers: bool) -> tuple[Ran, Vectors | None, float, float | None]:
        options = [word for pair in rung.config.items() for word in pair]
        asked = None
        if with_answers:
            out = self.work / "answers-index"
            shutil.rmtree(out, ignore_errors=True)
            run_measured([*index_command(self.answers.pictures, out, self.answers.model), *options], self.limit)
            asked = index_vectors(out, sorted(os.listdir(self.answers.pictures)))
        out, folder = self.work / "index", self.corpus.folder(rung.images)
        shutil.rmtree(out, ignore_errors=True)
        done = run_measured([*index_command(folder, out, self.model), *options], self.limit)
        lanes = lane_time(json.loads((out / "runs" / "1.json").read_text()))
        if not lanes:
            raise ChildFailed(f"{rung.images} images were done before the first second was: give --images more")
        ran = Ran(
            index_vectors(out, sorted(os.listdir(folder))), lanes["images_per_s"], done.wall_s - lanes["seconds"],
            {"preprocess": lanes["decode_s"], "forward": lanes["engine_s"]},
        )  # fmt: skip
        return ran, asked, done.peak_rss_mb, done.joules


def failures(row: dict[str, Any], rung: Rung) -> list[str]:
    """Why this is no rung to stand on; `top9_overlap` of None was not asked for, or is told by another failure."""
    found = [
        f"{row[kind]} images {words}"
        for kind, words in (("lost", "lost"), ("scored_twice", "scored twice"))
        if row[kind]
    ]
    error, allowed = row["error_over_spread"], SPREAD_ERROR_MAX[rung.precision] + STORED_ERROR
    if error is not None and not error <= allowed:  # this way round, so that NaN fails
        found.append(f"error/spread {error:.4f}, allowed {allowed}")
    overlap, needed = row["top9_overlap"], OVERLAP_MIN[rung.precision]
    if overlap is not None and not overlap >= needed:
        found.append(f"top-{TOP} overlap {overlap:.3f}, needed {needed}")
    return found


def lane_time(record: dict[str, Any]) -> dict[str, float]:
    """From runs/<n>.json: what the lanes did between their start and their last vector. Empty if nobody looked."""
    ticks = {
        name: sum(values)
        for name, values in record["throughput"].items()
        if isinstance(values, list) and name != "bound"
    }
    lanes, lane_s = max(1, len(record["lanes"])), ticks.get("lane_s", 0.0)
    if not lane_s:
        return {}
    return {
        "seconds": lane_s / lanes,
        "images_per_s": lanes * ticks["rows"] / lane_s,
        "decode_s": lane_s - ticks["decode_wait_s"] - ticks["slot_wait_s"],
        "engine_s": lane_s - ticks["encode_wait_s"],
    }


def _npz(path: Path, images: int, batch: int) -> Vectors:
    with np.load(path) as stored:
        batches, emb_nd = stored["batches"].tolist(), stored["emb_nd"].astype(np.float32)
    sizes = {number: min(batch, images - batch * number) for number in range(-(-images // batch))}
    lost = sum(rows for number, rows in sizes.items() if number not in batches)
    twice = sum(sizes.get(number, batch) for number in batches) - sum(
        sizes[number] for number in set(batches) & set(sizes)
    )
    return Vectors(emb_nd, lost, twice)


def index_vectors(out: Path, names: list[str]) -> Vectors:
    """Rows of an index by name; what is missing, and what was computed without ending in a row of its own."""
    with h5py.File(out / "index.h5") as file:
        keys, emb_nd = file["key"].asstr()[:].tolist(), file["embeddings"][:].astype(np.float32)
    computed = sum(json.loads(path.read_text())["embedded"] for path in (out / "runs").glob("*.json"))
    at = {key: row for row, key in enumerate(keys)}
    lost = sum(name not in at for name in names)
    order = [at[name] for name in names if name in at]
    return Vectors(emb_nd[order], lost, max(len(keys), computed) - (len(names) - lost))


def ladder(
    pictures: Path, model: str, answers_model: str, images: int, rounds: int, limit: Limit, work: Path
) -> Iterator[list[dict[str, Any]]]:
    """The table after each measurement, so that whoever stops it keeps what was measured.

    Raises:
        ArtifactMissing: the model, or the one for answers, has no engines; says how to build them.
    """
    for needed in (model, answers_model):
        if not any(card.tower == "vision" for _, card in find_artifact(needed).cards()):
            raise ArtifactMissing(f"{needed} has no engines. Run: make engines MODEL={needed}")
    corpus = Corpus(jpegs_below(pictures), work, min(DISTINCT, images))
    climb = Climb(model, Answers(answers_model, work), corpus, work, limit)
    reference, *others = table = rungs(climb.artifact, physical_cores(), images)
    found: dict[str, list[dict[str, Any]]] = {rung.name: [] for rung in table}
    skipped = {rung.name: rung.absent for rung in table if rung.absent}
    turns = [(rung, 0) for rung in table if rung.core] + [
        (r, turn) for turn in range(1, rounds) for r in table if r.core
    ]
    for rung, turn in turns + [(rung, 0) for rung in table if not rung.core]:
        if rung.name in skipped:
            continue
        try:
            found[rung.name].append(climb.once(rung, with_answers=turn == 0))
        except OutOfTime as error:
            if not found[rung.name]:
                skipped[rung.name] = str(error)
        except ChildFailed as error:
            skipped[rung.name] = f"failed: {error}"
        if not found[reference.name]:
            reason = f"nothing to compare with: {reference.name} did not run"
            skipped |= {other.name: skipped.get(other.name, reason) for other in others}
        _tell(rung, found[rung.name], skipped.get(rung.name, ""))
        yield [_row(rung, found[rung.name], skipped.get(rung.name, "")) for rung in table]


def _tell(rung: Rung, rounds: list[dict[str, Any]], skipped: str) -> None:
    words = f"{rounds[-1]['images_per_s']:.1f} images/s {'; '.join(rounds[-1]['failures'])}" if rounds else ""
    print(f"{rung.name}: {words} {skipped}".rstrip(), file=sys.stderr, flush=True)


def _row(rung: Rung, rounds: list[dict[str, Any]], skipped: str) -> dict[str, Any]:
    """Medians over rounds; failures and losses of any of them; answers of the round that asked."""
    row: dict[str, Any] = {
        "rung": rung.name, "change": rung.change, "figure": rung.figure, "precision": rung.precision,
        "device": rung.device, "config": rung.config, "core": rung.core, "skipped": skipped, "rounds": len(rounds),
    }  # fmt: skip
    if not rounds:
        return row
    for name in rounds[0]:
        values = [one[name] for one in rounds if one[name] is not None]
        if name == "stages_ms_per_image":
            row[name] = {stage: statistics.median(one[stage] for one in values) for stage in values[0]}
        elif name == "failures":
            row[name] = sorted({words for one in values for words in one})
        elif name in ("lost", "scored_twice"):
            row[name] = sum(values)
        else:
            row[name] = statistics.median(values) if values else None
    rates = [one["images_per_s"] for one in rounds]
    return {**row, "images_per_s_min": min(rates), "images_per_s_max": max(rates)}
