"""`bench store`: rows/s through each step of the store, listing, shard and commit, and through all of them."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.batch import Item
from pipeline.store import Outcome, Scope, Store, write_shard


def store(rows: int, dim: int, rounds: int) -> dict[str, Any]:
    """Rows/s of `rounds` rounds, and their medians."""
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
    return {**{step: rows / spent_s for step, spent_s in seconds.items()}, "all": rows / sum(seconds.values())}
