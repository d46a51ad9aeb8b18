"""`bench startup`: what a run pays once, what its commits take meanwhile, and what it pays for nothing to do.

Imports and engines are timed in fresh processes; the phases of a whole run come from its own record. A second run over
10,000 unchanged pictures should take less than NOTHING_TO_DO_S.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines import device_of
from engines.hardware import host_id
from engines.spec import find_artifact
from pipeline.bench.ladder import lane_time
from pipeline.bench.null_engine import little_pictures, null_command
from pipeline.bench.pictures import Corpus, jpegs_below
from pipeline.bench.processes import Limit, OutOfTime, index_command, run_measured

NOTHING_TO_DO_S = 1.5
IMAGES, TIMES = 96, 3
IMPORTS = {
    "python": "pass",
    "import of pipeline.index": "import pipeline.index",
    "import of a lane": "import pipeline.lane_process",
    "import of torch": "import torch",
    "libtorch for an engine": "from engines.aoti import open_libtorch; open_libtorch()",
    "import of onnxruntime": "import onnxruntime",
}
# Seconds to open, of the first batch, of one in steady state, and of a last batch with one row.
ENGINE = """
import json, statistics, sys, time
from pathlib import Path
from engines import load_engine
from engines.spec import Artifact
from engines.hardware import physical_cores
artifact = Artifact.open(Path(sys.argv[1]))
path, card = next((path, card) for path, card in artifact.cards() if str(path) == sys.argv[2])
def timed(call):
    start_s = time.perf_counter(); call(); return time.perf_counter() - start_s
def batch(rows):
    engine.launch(0, rows); engine.result(0)
start_s = time.perf_counter()
engine = load_engine(path, card, physical_cores(), None)
opened_s = time.perf_counter() - start_s
full_s = [timed(lambda: batch(engine.card.batch)) for _ in range(4)]
found = {"open": opened_s, "first batch": full_s[0], "steady batch": statistics.median(full_s[1:])}
print(json.dumps({**found, "tail of one row": timed(lambda: batch(1))}))
"""


def startup(model: str, pictures: Path, limit: Limit, work: Path) -> Iterator[dict[str, Any]]:
    artifact = find_artifact(model)
    whole: dict[str, Any] = {
        "model": artifact.spec.model,
        "imports_s": {},
        "engines_s": [],
        "runs_s": [],
        "nothing_to_do_s": [],
    }
    try:
        for name, code in IMPORTS.items():
            command = [sys.executable, "-c", f"{code}; print(0)"]
            whole["imports_s"][name] = statistics.median(run_measured(command, limit).wall_s for _ in range(TIMES))
        for path, card in artifact.cards():
            if card.host == host_id() and device_of(card.runtime) == "cpu":
                seconds = run_measured([sys.executable, "-c", ENGINE, artifact.path, path], limit).result
                whole["engines_s"].append(
                    {"engine": f"{card.tower} {card.runtime} {card.precision}", "rows": card.batch, **seconds}
                )
                yield whole
        whole["runs_s"] = list(_whole_runs(artifact.spec.model, pictures, limit, work))
        for count in (1000, 10_000):
            whole["nothing_to_do_s"].append(_nothing_to_do(count, model, limit, work))
            yield whole
    except OutOfTime as error:
        whole["note"] = str(error)
    yield whole


def _whole_runs(model: str, pictures: Path, limit: Limit, work: Path) -> Iterator[dict[str, Any]]:
    """The first run into an empty index, and one more that adds as much."""
    corpus, out = Corpus(jpegs_below(pictures), work, IMAGES // 2), work / "startup-index"
    (work / "growing").mkdir()
    for run in (1, 2):
        for path in sorted(corpus.folder(run * IMAGES).iterdir()):
            target = work / "growing" / path.name
            if not target.exists():
                target.hardlink_to(path)
        done = run_measured(index_command(work / "growing", out, model), limit)
        record = json.loads((out / "runs" / f"{run}.json").read_text())
        lanes, phases = lane_time(record), record["phases_s"]
        yield {
            "run": run, "images": record["embedded"], "wall": done.wall_s, "imports": done.wall_s - record["seconds"],
            "listing": phases["listing"], "lane start": phases["embedding"] - lanes.get("seconds", 0.0),
            "lane work": lanes.get("seconds"), "commits": record["commits"]["seconds"],
            "publishing": phases["publishing"],
        }  # fmt: skip


def _nothing_to_do(count: int, model: str, limit: Limit, work: Path) -> dict[str, Any]:
    """An index filled by an engine that does nothing, then the real command over the same pictures."""
    folder, out = work / f"little-{count}", work / f"little-{count}-index"
    little_pictures(folder, count)
    run_measured(null_command(folder, out, model), limit)
    ran = [run_measured([*index_command(folder, out, model), "--devices", "cpu"], limit) for _ in range(TIMES)]
    assert all(one.result["unchanged"] == count for one in ran), ran[0].result
    wall_s = statistics.median(one.wall_s for one in ran)
    cpu_s = statistics.median(one.cpu_s for one in ran)
    row = {"images": count, "wall": wall_s, "in the run": statistics.median(one.result["seconds"] for one in ran)}
    return {**row, "cpu": cpu_s, "allowed": NOTHING_TO_DO_S if count == 10_000 else None}
