"""`bench memory`: peak RSS of lane and coordinator by number of pictures; a tiny model shows the pipeline's."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from pipeline.bench.pictures import jpegs_below, unique_copies
from pipeline.bench.processes import index_command


def memory(pictures: Path, model: str, counts: list[int]) -> dict[str, Any]:
    """Peak RSS in MB of coordinator and lane by number of pictures; flat means bounded."""
    jpegs = jpegs_below(pictures)
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
