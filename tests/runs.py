"""Running the product as a user does: in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np


@dataclass(frozen=True)
class Ran:
    code: int
    stdout: str
    stderr: str
    peak_rss_mb: float = 0.0  # the largest process: a lane, or the coordinator

    @property
    def report(self) -> dict[str, Any]:
        """The last line of stdout."""
        report: dict[str, Any] = json.loads(self.stdout.strip().splitlines()[-1])
        return report


def make_tiny_model(folder: Path, artifacts: Path, seed: int = 0) -> Path:
    """A model folder of a few thousand random weights, exported to `artifacts`, which NIGHTJAR_ARTIFACTS names from now
    on, with its ONNX Runtime engines built. Their cards tell of a slow host: at 100,000 rows/s a few hundred pictures
    would be one chunk, and a kill between two of them would never be tried.
    """
    from engines.build import main as make_engines
    from engines.spec import find_artifact
    from export.random_model import write_random_model

    os.environ["NIGHTJAR_ARTIFACTS"] = str(artifacts)
    write_random_model(folder, "tiny", seed=seed)
    assert make_engines(["--model", str(folder), "--runtime", "ort-cpu"]) == 0
    for path, card in find_artifact(str(folder)).cards():
        path.write_text(replace(card, rows_per_s=100.0).to_json())
    return folder


# A process inherits the peak RSS of the one it was forked from, and pytest grows to 2 GB: a small one stands between.
STARTER = """
import os, sys
pid = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[2:]], os.environ)
_, status, usage = os.wait4(pid, 0)  # with the lanes that it has waited for
with open(sys.argv[1], "w") as peak:
    peak.write(str(usage.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run_module(module: str, *args: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> Ran:
    with tempfile.NamedTemporaryFile("r") as peak_kb:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", STARTER, peak_kb.name, "-m", module, *map(str, args)],
            capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **(env or {})},
        )  # fmt: skip
        return Ran(done.returncode, done.stdout, done.stderr, int(peak_kb.read()) / 1024)


def index(root: Path, out: Path, *args: object, source: str = "folder", env: dict[str, str] | None = None) -> Ran:
    return run_module("pipeline.index", "--source", source, "--root", root, "--out", out, *args, env=env)


def quarantine(out: Path) -> dict[str, str]:
    """key -> reason, from the manifest (tests may look; readers never do)."""
    # Closed at once: where the folder is replaced, a connection that closes later deletes the new file's journal.
    with contextlib.closing(sqlite3.connect(out / "manifest.sqlite")) as manifest:
        return dict(manifest.execute("SELECT key, reason FROM input WHERE status = 'quarantined'"))


def vectors_by_key(out: Path) -> dict[str, tuple[bytes, bytes]]:
    """key -> (content hash, vector bits): two runs are equal when these maps are."""
    with h5py.File(out / "index.h5") as file:
        emb_nd = file["embeddings"][:]
        assert np.isfinite(emb_nd).all(), "a virtual dataset gives NaN where a data file cannot be read"
        hashes = file["content_hash"][:]
        keys = file["key"].asstr()[:]
    return {key: (hashes[row].tobytes(), emb_nd[row].tobytes()) for row, key in enumerate(keys)}
