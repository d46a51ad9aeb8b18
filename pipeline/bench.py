"""`python -m pipeline.bench`: the figures of docs/benchmarks, each one JSON file with command, hardware and versions.

    race      end-to-end images/s against what users run today, and against our own engines alone: same files, same
              cores, interleaved rounds. Every contestant is timed on n and on 2n pictures; the difference is its rate,
              so that nobody pays for imports and model load. The faster ones get more pictures, for similar times.
              Rates are per second and per second of CPU time, which neighbours on a shared host disturb less.
    memory    peak RSS of lane and coordinator by number of pictures; a tiny model leaves the pipeline alone to be seen
    store     rows/s into shards alone, and with the manifest

These machines are noisy: only ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
from PIL import Image, ImageOps

from engines import open_engine
from engines.hardware import host_id
from engines.spec import find_artifact
from pipeline.batch import Item
from pipeline.store import Outcome, Scope, Store, write_shard

PEERS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "peers.py"
PACKAGES = ("torch", "onnxruntime", "transformers", "simplejpeg", "pillow", "h5py", "numpy")
ENGINE_S = 6.0  # of running the engine alone, twice a round
EDGE, QUALITY = 500, 95  # pictures of the race: as large as those of iNaturalist 2021, about 100 kB


def unique_copies(pictures: list[Path], folder: Path, count: int, first: int = 0) -> None:
    """`count` JPEGs with the pixels of `pictures` in turn, each with a comment of its own: new bytes, same work."""
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        encoded = pictures[number % len(pictures)].read_bytes()
        comment = f"copy {number}".encode()
        segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        (folder / f"{number:07d}.jpg").write_bytes(encoded[:2] + segment + encoded[2:])


def small_copies(pictures: list[Path], folder: Path) -> list[Path]:
    """`pictures` scaled to a long edge of `EDGE` pixels, as JPEGs."""
    folder.mkdir(parents=True)
    made = []
    for number, path in enumerate(pictures):
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        picture.thumbnail((EDGE, EDGE), Image.Resampling.BICUBIC)
        made.append(folder / f"{number:05d}.jpg")
        picture.save(made[-1], quality=QUALITY)
    return made


def last_json(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}: {done.stderr[-2000:]}")
    parsed: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return parsed


def index_command(root: Path, out: Path, model: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pipeline.index",
        "--source",
        "folder",
        "--root",
        str(root),
        "--out",
        str(out),
        "--model",
        model,
        "--json",
    ]


# ---- race --------------------------------------------------------------------------------------------------------


class Seconds(NamedTuple):
    wall: float
    cpu: float  # of all threads and child processes


def race(pictures: Path, model: str, images: int, rounds: int, fastembed_python: str) -> dict[str, Any]:
    """Medians over `rounds` of images per second, and of each contestant's ratio to ours within a round."""
    jpegs = sorted(path for path in pictures.rglob("*.jpg"))
    if not jpegs:
        raise SystemExit(f"no *.jpg below {pictures}; --pictures wants a folder of JPEG photos")
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
            "fastembed": (2 * images, _peer("fastembed", fastembed_python, model, work)),
        }
        for who, times in zip(ours, (4, 8), strict=False):
            contestants[who] = (
                times * images,
                partial(_timed_index, work=work, model=model, precision=precisions[who]),
            )
        jpegs = small_copies(jpegs, work / "small")
        for count in {size for n, _ in contestants.values() for size in (n, 2 * n)}:
            unique_copies(jpegs, work / str(count), count)
        _give_fastembed_its_graph(model)
        table: list[dict[str, Seconds]] = []  # a picture
        for _ in range(rounds):
            row: dict[str, Seconds] = {}
            for who, (n, run) in contestants.items():
                if who in ours:  # its engine alone before and after, as close in time as can be
                    before = engine_seconds(model, precisions[who])
                row[who] = _marginal(run, work, n)
                if who in ours:
                    after = engine_seconds(model, precisions[who])
                    row[f"{who}, engine alone"] = Seconds(*((b + a) / 2 for b, a in zip(before, after, strict=True)))
            table.append(row)
            print(json.dumps({who: 1 / seconds.wall for who, seconds in row.items()}), file=sys.stderr, flush=True)
    return {
        "images": {who: [n, 2 * n] for who, (n, _) in contestants.items()},
        "pictures": f"{len(jpegs)} JPEGs of {EDGE} pixels, each copy with a unique comment",
        "per_s": _rates([{who: 1 / seconds.wall for who, seconds in row.items()} for row in table], ours),
        "per_cpu_s": _rates([{who: 1 / seconds.cpu for who, seconds in row.items()} for row in table], ours),
    }


def _rates(rounds: list[dict[str, float]], ours: list[str]) -> dict[str, Any]:
    return {
        "rounds": rounds,
        "median_images": {who: statistics.median(row[who] for row in rounds) for who in rounds[0]},
        "over": {
            mine: {who: statistics.median(row[mine] / row[who] for row in rounds) for who in rounds[0]} for mine in ours
        },
    }


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
        result = last_json([python, str(PEERS), who, model, str(root), str(work / f"{who}.npy")])
        assert result["images"] == len(os.listdir(root)), result
        return float(result["seconds"])

    return run


def _give_fastembed_its_graph(model: str) -> None:
    """fastembed reads MODEL/model.onnx with an input `pixel_values`; ours is the same network."""
    target = Path(model) / "model.onnx"
    if not target.exists():
        shutil.copyfile(find_artifact(model).onnx("vision", "fp32"), target)


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


# ---- memory ------------------------------------------------------------------------------------------------------


def memory(pictures: Path, model: str, counts: list[int]) -> dict[str, Any]:
    """Peak RSS in MB of coordinator and lane by number of pictures; flat means bounded."""
    jpegs = sorted(path for path in pictures.rglob("*.jpg"))
    peaks = []
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            unique_copies(jpegs, Path(name) / "photos", count)
            command = index_command(Path(name) / "photos", Path(name) / "index", model)
            started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            rss_mb = _watch(started)
            assert started.stdout
            report = json.loads(started.stdout.read().strip().splitlines()[-1])
            assert report["embedded"] == count, report
            peaks.append({"images": count, "images_per_s": report["images_per_s"], **rss_mb})
            print(json.dumps(peaks[-1]), file=sys.stderr, flush=True)
    return {"peak_rss_mb": peaks}


def _watch(started: subprocess.Popen[str]) -> dict[str, float]:
    """VmHWM of the run and of its largest child, read twice a second while it runs."""
    peaks = {"coordinator": 0.0, "lane": 0.0}
    while started.poll() is None:
        try:
            parent = psutil.Process(started.pid)
            peaks["coordinator"] = max(peaks["coordinator"], _peak_mb(parent))
            for child in parent.children():
                peaks["lane"] = max(peaks["lane"], _peak_mb(child))
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue  # it ended between two looks
        time.sleep(0.5)
    return peaks


def _peak_mb(process: psutil.Process) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return max((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), default=0.0)


# ---- store -------------------------------------------------------------------------------------------------------


def store(rows: int, dim: int, rounds: int) -> dict[str, Any]:
    """Rows/s into shards alone, and through listing, shard and manifest."""
    rng = np.random.default_rng(0)
    emb_nd = rng.standard_normal((4096, dim)).astype(np.float32)
    emb_nd /= np.linalg.norm(emb_nd, axis=1, keepdims=True)
    found = [_store_round(rows, emb_nd.astype(np.float16)) for _ in range(rounds)]
    return {
        "rows": rows,
        "dim": dim,
        "rounds": found,
        "median_rows_per_s": {key: statistics.median(round_[key] for round_ in found) for key in found[0]},
    }


def _store_round(rows: int, emb_nd: np.ndarray[Any, np.dtype[np.float16]]) -> dict[str, float]:
    chunk = len(emb_nd)
    with tempfile.TemporaryDirectory() as name, Store.open(Path(name) / "index", "bench", emb_nd.shape[1]) as opened:
        opened.begin_run(Scope("folder", "/bench"))
        seconds = dict.fromkeys(("listing", "shards", "commit"), 0.0)
        for first in range(0, rows, chunk):
            start_s = time.monotonic()
            names = [f"{row:09d}.jpg" for row in range(first, first + chunk)]
            opened.observe([Item(name, name.encode(), 1000, 1) for name in names])
            listed_s = time.monotonic()
            pending = opened.pending(chunk, first)
            hashes = [os.urandom(16) for _ in pending]
            drawn_s = time.monotonic()
            shard = write_shard(opened.shard_path(), emb_nd, np.array([row.id for row in pending]), hashes, {})
            written_s = time.monotonic()
            opened.commit_chunk(shard, [Outcome(p.id, "embedded", h) for p, h in zip(pending, hashes, strict=True)])
            seconds["listing"] += listed_s - start_s
            seconds["shards"] += written_s - drawn_s
            seconds["commit"] += time.monotonic() - written_s
    return {"shards": rows / seconds["shards"], "with_manifest": rows / sum(seconds.values())}


# ---- all ---------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["race", "memory", "store"])
    parser.add_argument("--pictures", type=Path, help="race, memory: folder of JPEG photos")
    parser.add_argument("--model", help="race, memory: model folder whose engines are built")
    parser.add_argument("--images", type=int, nargs="+", default=[128], help="race: N; memory: every count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fastembed-python", default=sys.executable, help="race: an environment that has fastembed")
    parser.add_argument("--out", type=Path, required=True, help="folder of result files")
    args = parser.parse_args(argv)
    measure: dict[str, Callable[[], dict[str, Any]]] = {
        "race": lambda: race(args.pictures, args.model, args.images[0], args.rounds, args.fastembed_python),
        "memory": lambda: memory(args.pictures, args.model, args.images),
        "store": lambda: store(131_072, 512, args.rounds),
    }
    result = {
        "command": f"python -m pipeline.bench {args.what}",
        "date": time.strftime("%Y-%m-%d"),
        "host": host_id(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        **measure[args.what](),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.what}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
