"""`python docs/benchmarks/million.py`: the whole job over very many real files, with the demo model.

    made      little JPEGs of the demo's shapes, no two alike
    first     `pipeline.index` over all of them
    again     the same command: nothing is to be done
    added     1 % more files
    answers   texts asked of that index: exactly, and as `search` answers

A million take about 4 GB of disk and three quarters of an hour on two cores.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engines.hardware import host_id, physical_cores
from export.demo_captions import full_query
from export.demo_pictures import make_picture, random_attributes
from pipeline.bench.answers import QUERIES, exact, lists
from pipeline.bench.processes import Limit, index_command, run_measured
from pipeline.run_reports import recent_reports
from pipeline.search.index import Index

FOLDER_FILES = 1000
EDGE = 64  # pixels of the short edge, what the demo model takes
LIMIT_S = 4 * 3600


def write_folder(folder: Path, first: int) -> None:
    folder.mkdir(parents=True)
    for number in range(first, first + FOLDER_FILES):
        encoded = io.BytesIO()
        make_picture(np.random.default_rng([11, number]), short_edge=EDGE).image.save(encoded, "JPEG", quality=90)
        (folder / f"{number:09d}.jpg").write_bytes(encoded.getvalue())


def write_folders(root: Path, folders: range) -> None:
    with multiprocessing.get_context("spawn").Pool(physical_cores()) as pool:
        todo = [(root / f"{folder:06d}", folder * FOLDER_FILES) for folder in folders]
        pool.starmap(write_folder, todo, chunksize=1)


def index(root: Path, out: Path, model: str) -> dict[str, Any]:
    done = run_measured(index_command(root, out, model), Limit(LIMIT_S))
    (record,) = recent_reports(out, 1)
    told = {name: done.result[name] for name in ("embedded", "quarantined", "images_per_s")}
    return {
        **told, "wall_s": round(done.wall_s, 1), "cpu_s": round(done.cpu_s), "peak_rss_mb": round(done.peak_rss_mb),
        "phases_s": record["phases_s"],
    }  # fmt: skip


def measure(work: Path, folders: int, model: str) -> Iterator[tuple[str, Any]]:
    root, out = work / "pictures", work / "index"
    start_s = time.monotonic()
    write_folders(root, range(folders))
    yield "made", {"files": folders * FOLDER_FILES, "seconds": round(time.monotonic() - start_s, 1)}
    yield "first", index(root, out, model)
    yield "again", index(root, out, model)
    write_folders(root, range(folders, folders + max(1, folders // 100)))
    yield "added", index(root, out, model)
    rng = np.random.default_rng(0)
    texts = sorted({full_query(random_attributes(rng), rng).text for _ in range(2 * QUERIES)})[:QUERIES]
    with Index.open(out) as shown:
        queries = np.stack([shown.embed(text) for text in texts])
        yield "exact", exact(shown, queries)
        yield "lists", lists(shown, queries)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python docs/benchmarks/million.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--thousands", type=int, default=1000, metavar="N", help="of pictures; default: 1000")
    parser.add_argument("--model", default="export/demo", help="an artifact's model; default: %(default)s")
    parser.add_argument("--work", type=Path, help="an empty folder that is kept; default: a temporary one")
    parser.add_argument("--out", type=Path, required=True, help="folder of result files")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {
        "command": f"python docs/benchmarks/million.py --thousands {args.thousands}", "date": time.strftime("%Y-%m-%d"),
        "host": host_id(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name, result in measure(args.work or Path(temporary), args.thousands, args.model):
            found[name] = {**result, "load": round(os.getloadavg()[0], 1)}
            print(json.dumps({name: found[name]}), flush=True)
            (args.out / "million.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
