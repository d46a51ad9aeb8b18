"""`python -m pipeline.bench.service`: the service under load, every answer compared with what it has to be.

First one query after another over HTTP, in turns with the same questions to `pipeline.search.Index` in this process:
rows and cosines alone, and then all that HTTP's answer tells, too: relevance, keys, marks and metadata.
Then many clients at a time on the loopback of this host: searches by words and pictures, thumbnails, embeddings, broken
and oversized uploads, clients that leave in the middle, while the shown generation of a copy of the index is switched
all the time. Every answer says which generation it is from, and must be that generation's. 503 is the one 5xx allowed.

    python -m pipeline.bench.service --index demo-out/index --clients 200 --seconds 300 --out docs/benchmarks/HOST
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import psutil

from engines.hardware import host_id
from pipeline.bench.service_clients import QUERIES, Client, K, Load, truth_of
from pipeline.generations import kept_generations
from pipeline.search import Index
from pipeline.store import show_generation

LATENCY_QUERIES = 300
SWITCH_S = 1.5
RSS_GROWTH_MAX = 0.05


async def latency(load: Load, index: Index) -> dict[str, float]:
    """The same questions in turns, one at a time: over HTTP, with all that describes an answer, and asked of the index
    of this process: embedding and search alone (so `ratio` is an upper bound of what HTTP costs), and with the same
    description, which the service remembers of rows it has answered before.
    """
    client, http_s, alone_s, same_s = Client(load.host, load.port), [], [], []
    for number in range(LATENCY_QUERIES):
        words = f"{QUERIES[number % len(QUERIES)]} {number}"
        start_s = time.perf_counter()
        reply = await client.ask("GET", f"/api/search?q={quote(words)}&k={K}")
        middle_s = time.perf_counter()
        assert reply.status == 200, reply
        found = index.search(words, K)
        alone_s.append(time.perf_counter() - middle_s)
        assert len(found.relevance) == len(found.keys) == len(found.marks) == len(found.metadata)
        same_s.append(time.perf_counter() - middle_s)
        http_s.append(middle_s - start_s)
    client.close()
    http_ms, alone_ms, same_ms = (1000 * statistics.median(seconds) for seconds in (http_s, alone_s, same_s))
    return {
        "http_p50_ms": round(http_ms, 2), "http_p99_ms": round(1000 * float(np.quantile(http_s, 0.99)), 2),
        "model_and_search_p50_ms": round(alone_ms, 2), "ratio": round(http_ms / alone_ms, 2),
        "same_answer_p50_ms": round(same_ms, 2), "ratio_to_same_answer": round(http_ms / same_ms, 2),
    }  # fmt: skip


async def switch(index: Path, generations: list[int], done: list[int], until_s: float) -> None:
    while time.monotonic() < until_s:
        await asyncio.sleep(SWITCH_S)
        number = generations[(len(done) + 1) % len(generations)]
        await asyncio.to_thread(show_generation, index, number)
        done.append(number)


async def watch(pid: int, rss_mb: list[float], until_s: float) -> None:
    """Of the service and its decoders, once a second."""
    while time.monotonic() < until_s:
        processes = [psutil.Process(pid), *psutil.Process(pid).children()]
        sizes = []
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                sizes.append(process.memory_info().rss)
        rss_mb.append(sum(sizes) / 1e6)
        await asyncio.sleep(1)


def growth(rss_mb: list[float]) -> float:
    """Of the last fifth over the second fifth, as a share: the first one warms up."""
    fifth = max(1, len(rss_mb) // 5)
    return statistics.median(rss_mb[-fifth:]) / statistics.median(rss_mb[fifth : 2 * fifth]) - 1


async def measure(folder: Path, clients: int, seconds: float) -> dict[str, Any]:
    """`folder` is a copy of an index, whose shown generation is switched."""
    generations = [one.number for one in kept_generations(folder)]
    truths = {}
    for number in generations:
        show_generation(folder, number)
        with Index.open(folder) as index:
            truths[number] = truth_of(index)
    command = [sys.executable, "-m", "pipeline.serve", "--out", str(folder), "--port", "0", "--rate", "1000000"]
    with subprocess.Popen([*command, "--queue", str(max(8, clients * 3 // 4))], stdout=subprocess.PIPE) as service:
        try:
            assert service.stdout is not None
            address = urlsplit(json.loads(service.stdout.readline())["address"])
            load = Load(address.hostname or "", address.port or 0, truths)
            with Index.open(folder) as index:
                alone = await latency(load, index)
            rss_mb: list[float] = []
            switched: list[int] = []
            until_s = time.monotonic() + seconds
            others = (switch(folder, generations, switched, until_s), watch(service.pid, rss_mb, until_s))
            await asyncio.gather(*(load.client(seed, until_s) for seed in range(clients)), *others)
        finally:
            service.terminate()
    total = sum(load.counts.values())
    return {
        "alone": alone, "clients": clients, "seconds": seconds, "requests": total, "per_s": round(total / seconds, 1),
        "counts": dict(sorted(load.counts.items())), "wrong": len(load.wrong), "first_wrong": load.wrong[:5],
        "search_ms": {
            name: round(1000 * float(np.quantile(load.search_s, share)), 1)
            for name, share in (("p50", 0.5), ("p99", 0.99))
        },
        "switches": len(switched), "generations": generations, "rss_mb": [round(one) for one in rss_mb],
        "rss_growth": round(growth(rss_mb), 4), "exit": service.returncode,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.bench.service",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--index", type=Path, required=True, help="with some kept generations; a copy of it is served")
    parser.add_argument("--clients", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=300, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder of result files")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "index"
        shutil.copytree(args.index, folder, symlinks=True)
        measured = asyncio.run(measure(folder, args.clients, args.seconds))
    result = {
        "command": f"python -m pipeline.bench.service --clients {args.clients} --seconds {args.seconds:g}",
        "date": time.strftime("%Y-%m-%d"), "host": host_id(), "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(), **measured,
    }  # fmt: skip
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "serve.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "rss_mb"}))
    bad = measured["wrong"] or measured["exit"] or measured["rss_growth"] > RSS_GROWTH_MAX
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
