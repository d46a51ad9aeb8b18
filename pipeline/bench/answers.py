"""`python -m pipeline.bench.answers`: what an answer costs, exactly and by lists, and what lists cost at night.

    exact     GB/s of a whole exact top 9, in turns with what this host's memory gives to a plain read of the same bytes
    lists     milliseconds and recall@10 (by distance, ties count) against exact search, and time to make them
    add       1 % more rows: seconds for lists, against making all of them
    first     seconds from a cold process to its first answer

Vectors are made up: clusters of unequal size, 64 directions within each, noise on top; questions come from the same
mixture and are not in the index. With `--index DIR`, questions of an index that is there, answered from its own vectors
(texts with `--texts FILE`, one a line). A million rows of d = 512 take 3 GB of disk and some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from engines.hardware import host_id
from pipeline.batch import Item
from pipeline.run_record import Clock
from pipeline.search.index import Index
from pipeline.store import Outcome, Scope, Store, Turn, write_shard
from pipeline.store.scan import CORES, Query

SPACE, SCOPE = "bench", Scope("folder", "/bench")
CHUNK_ROWS = 4096
CLUSTERS, DIRECTIONS = 2_000, 64
QUERIES, ROUNDS = 500, 5
K, RECALL_K = 9, 10

Vectors = npt.NDArray[np.float16]


class Mixture:
    """Clustered unit vectors, the same for the same seed."""

    def __init__(self, dim: int) -> None:
        rng = np.random.default_rng(0)
        self._centres = rng.standard_normal((CLUSTERS, dim), dtype=np.float32)
        self._directions = rng.standard_normal((DIRECTIONS, dim), dtype=np.float32) / np.sqrt(DIRECTIONS)
        shares = rng.random(CLUSTERS) ** 3 + 0.01
        self._shares = shares / shares.sum()

    def draw(self, rows: int, seed: int) -> Vectors:
        rng = np.random.default_rng((1, seed))
        wide = self._centres[rng.choice(CLUSTERS, rows, p=self._shares)]
        wide += rng.standard_normal((rows, DIRECTIONS), dtype=np.float32) @ self._directions
        wide += 0.3 * rng.standard_normal(wide.shape, dtype=np.float32)
        unit: Vectors = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)
        return unit


def night(out: Path, dim: int, rows: int) -> dict[str, float]:
    """One run after which the index holds `rows` rows; seconds of its phases."""
    clock, mixture = Clock(), Mixture(dim)
    with Store.open(out, SPACE, dim) as store:
        store.begin_run(SCOPE)
        with clock.phase("listing"):
            for first in range(0, rows, CHUNK_ROWS):
                names = (f"{number:09d}" for number in range(first, min(first + CHUNK_ROWS, rows)))
                store.observe([Item(name, name.encode(), 1) for name in names])
            store.finish_listing()
        with clock.phase("embedding"):
            while todo := store.pending(CHUNK_ROWS):
                contents = [blake3(row.key.encode()).digest(length=16) for row in todo]
                done = [Outcome(row.id, "embedded", content) for row, content in zip(todo, contents, strict=True)]
                ids = np.array([row.id for row in todo], np.int64)
                emb_nd = mixture.draw(len(todo), int(ids[0]))
                store.commit_chunk(write_shard(store.shard_path(), emb_nd, ids, contents, {"space": SPACE}), done)
        with clock.phase("publishing"):
            store.publish({}, {}, turn=Turn(phase=clock.phase))
    return clock.phases_s


def read_gb_per_s(index: Index) -> float:
    """What memory gives: the largest 64-bit word of the same mapped bytes, which numpy finds in vector registers."""
    pieces = [
        block.emb_nd[first : first + 65_536].view(np.uint64)
        for block in index.generation.blocks()
        for first in range(0, len(block.emb_nd), 65_536)
    ]
    with ThreadPoolExecutor(CORES) as pool:
        start_s = time.perf_counter()
        list(pool.map(np.max, pieces))
        return sum(piece.nbytes for piece in pieces) / (time.perf_counter() - start_s) / 1e9


def exact(index: Index, queries: Vectors) -> dict[str, Any]:
    size = sum(block.emb_nd.nbytes for block in index.generation.blocks())
    read, scanned = [], []
    for query in queries[:ROUNDS]:
        read.append(read_gb_per_s(index))
        start_s = time.perf_counter()
        index.search(query, K, exact=True)
        scanned.append(size / (time.perf_counter() - start_s) / 1e9)
    return {
        "bytes": size, "memory_gb_per_s": _round(read), "exact_gb_per_s": _round(scanned),
        "share": round(float(np.median(np.array(scanned) / np.array(read))), 3),
    }  # fmt: skip


def lists(index: Index, queries: Vectors) -> dict[str, Any]:
    """Latency of an answer as `search` gives it, and what share of the exact answer it has."""
    took_ms, found, exactly = [], [], 0
    for query in queries:
        start_s = time.perf_counter()
        answer = index.search(query, RECALL_K)
        took_ms.append(1000 * (time.perf_counter() - start_s))
        exactly += answer.exact
        worst = index.search(query, RECALL_K, exact=True).scores[-1]
        found.append(np.count_nonzero(answer.scores >= worst) / RECALL_K)
    entry = index.generation.ann or {}
    told = {name: entry[name] for name in ("probed", "recall", "ann_ms", "exact_ms") if name in entry}
    return {
        "queries": len(queries), "p50_ms": round(float(np.percentile(took_ms, 50)), 3),
        "p99_ms": round(float(np.percentile(took_ms, 99)), 3), f"recall@{RECALL_K}": round(float(np.mean(found)), 4),
        "answered_exactly": exactly, "files": len(entry.get("lists", [])), "published": told,
    }  # fmt: skip


def first_answer(out: Path, query: Query) -> dict[str, float]:
    start_s = time.perf_counter()
    with Index.open(out) as index:
        opened_s = time.perf_counter() - start_s
        found = index.search(query, K)
        assert len(found.keys) == K
    return {"open_s": round(opened_s, 3), "open_to_first_answer_s": round(time.perf_counter() - start_s, 3)}


def alone(work: Callable[..., Any], *args: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


def measure(folder: Path, rows: int, dim: int) -> Iterator[tuple[str, Any]]:
    out, queries = folder / "index", Mixture(dim).draw(QUERIES, seed=1 << 40)
    built = night(out, dim, rows)
    yield "built", built
    yield "first", alone(first_answer, out, queries[0])
    with Index.open(out) as index:
        yield "exact", exact(index, queries)
        yield "lists", lists(index, queries)
    added = night(out, dim, rows + rows // 100)
    yield (
        "added",
        {**added, "share_of_build": round(added.get("ann", 0.0) / built["ann"], 4) if "ann" in built else None},
    )
    with Index.open(out) as index:
        yield "lists_after", lists(index, queries)


def measure_index(out: Path, texts: Path | None) -> Iterator[tuple[str, Any]]:
    with Index.open(out) as index:
        if texts is not None:
            queries = np.stack([index.embed(line) for line in texts.read_text().splitlines() if line])
        else:
            rows = np.random.default_rng(0).choice(index.generation.rows, min(QUERIES, index.generation.rows), False)
            queries = index.vectors(rows)
        yield "exact", exact(index, queries)
        yield "lists", lists(index, queries)


def _round(values: list[float]) -> list[float]:
    return [round(value, 2) for value in values]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.bench.answers", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="default: 1,000,000")
    parser.add_argument("--dim", type=int, default=512, help="default: 512")
    parser.add_argument("--index", type=Path, metavar="DIR", help="an index that is there, instead of made-up vectors")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="questions to --index, one a line")
    parser.add_argument("--out", type=Path, required=True, help="folder of result files")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        found = {}
        steps = measure_index(args.index, args.texts) if args.index else measure(Path(temporary), args.rows, args.dim)
        for name, result in steps:
            print(json.dumps({name: result}), flush=True)
            found[name] = result
    name = f"search-{args.index.name}" if args.index else f"search-{args.rows}-{args.dim}"
    result = {
        "command": f"python -m pipeline.bench.answers --rows {args.rows} --dim {args.dim}" if not args.index
        else f"python -m pipeline.bench.answers --index {args.index.name}{' --texts ...' if args.texts else ''}",
        "date": time.strftime("%Y-%m-%d"),
        "host": host_id(),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(value, 1) for value in os.getloadavg()],
        "python": platform.python_version(),
        **found,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
