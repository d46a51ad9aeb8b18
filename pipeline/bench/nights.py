"""`python -m pipeline.bench.nights`: what a night costs by the size of the index, with pictures that are names alone.

    diff      listing N known keys, nothing changed (a manifest alone, made by SQL, so that 10 M keys are soon there)
    rename    100 k of N files have another name: what has to be read, and that nothing is embedded
    add       1,000 new pictures in an index of N, against an empty one: listing, commit, publishing; no model
    verify    `pipeline.verify quick`

An index of a million rows of d = 512 is made first: 1 GB of vectors, some minutes. Seconds of CPU time are there
because neighbours on a shared host disturb them less; the made-up listing itself costs 3 to 4 us a key of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from engines.hardware import host_id
from pipeline.batch import Item
from pipeline.shares import CHUNK_ROWS_MAX
from pipeline.store import Outcome, Scope, Store, Turn, write_shard
from pipeline.store.manifest import connect, transaction

SPACE, SCOPE = "bench", Scope("folder", "/bench")
OBSERVE_ROWS = 2000  # as pipeline.index
RENAMED = 100_000
ADDED = 1_000


def key_of(number: int) -> str:
    return f"{number // 1000:06d}/{number:09d}.jpg"


def hash_of(number: int) -> bytes:
    return blake3(number.to_bytes(8, "little")).digest(length=16)


def listing(first: int, stop: int, prefix: str = "") -> Iterator[Item]:
    for number in range(first, stop):
        key = prefix + key_of(number)
        yield Item(key, key.encode(), 100_000 + number % 1000, 1_700_000_000_000_000_000 + number)


def observe(store: Store, items: Iterator[Item]) -> None:
    part: list[Item] = []
    for item in items:
        part.append(item)
        if len(part) == OBSERVE_ROWS:
            store.observe(part)
            part = []
    store.observe(part)


def embed(store: Store, emb_nd: npt.NDArray[np.float16]) -> dict[str, int]:
    """What lanes and coordinator do, with the file's number in place of its bytes."""
    done = {"embedded": 0, "copied": 0}
    while rows := store.pending(CHUNK_ROWS_MAX):
        hashes = [hash_of(int(row.key[-13:-4])) for row in rows]
        known = store.has_vectors(hashes)
        new = [Outcome(row.id, "embedded", h) for row, h, has in zip(rows, hashes, known, strict=True) if not has]
        old = [Outcome(row.id, "copied", h) for row, h, has in zip(rows, hashes, known, strict=True) if has]
        shard = None
        if new:
            ids, contents = np.array([out.id for out in new], np.int64), [out.content_hash or b"" for out in new]
            shard = write_shard(store.shard_path(), emb_nd[: len(new)], ids, contents, {"space": SPACE})
        committed = store.commit_chunk(shard, [*new, *old])
        done["embedded"] += committed.embedded
        done["copied"] += committed.copied
    return done


# The rows that `listing` names, known and embedded.
_KNOWN = """
    WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?),
    named(i, name) AS (SELECT i, printf('%06d/%09d.jpg', i / 1000, i) FROM n)
    INSERT INTO input(scope, key, locator, size, mtime_ns, etag, content_hash, status, first_seen, last_seen)
    SELECT ?, name, CAST(name AS BLOB), 100000 + i % 1000, 1700000000000000000 + i, '', randomblob(16), 'embedded', 1, 1
    FROM named"""


def make_manifest(out: Path, keys: int) -> dict[str, Any]:
    with Store.open(out, SPACE, 8) as store:
        store.begin_run(SCOPE)
    with contextlib.closing(connect(out / "manifest.sqlite")) as db, transaction(db):
        db.execute(_KNOWN, (keys, db.execute("SELECT id FROM source").fetchone()[0]))
    return {"keys": keys}


def quiet_night(out: Path, keys: int) -> dict[str, Any]:
    """A listing in which nothing changed."""
    start_s = time.monotonic()
    with Store.open(out, SPACE, 8) as store:
        store.begin_run(SCOPE)
        observe(store, listing(0, keys))
        assert store.listing_preview().gone == store.finish_listing() == store.counts().pending == 0
    return {"seconds": {"listing": round(time.monotonic() - start_s, 3)}}


def night(out: Path, dim: int, known: int, added: int, renamed: int) -> dict[str, Any]:
    """One run over `known` pictures of which the first `renamed` have another name, and `added` new ones."""
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((CHUNK_ROWS_MAX, dim)).astype(np.float32)
    emb_nd = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)
    start_s, seconds = time.monotonic(), {}
    with Store.open(out, SPACE, dim) as store:
        store.begin_run(SCOPE)
        if renamed:
            observe(store, listing(0, renamed, prefix="renamed/"))
        observe(store, listing(renamed, known + added))
        gone = store.finish_listing()
        seconds["listing"] = time.monotonic() - start_s
        done = embed(store, emb_nd)
        seconds["embedding"] = time.monotonic() - start_s - sum(seconds.values())
        store.publish({}, {}, turn=Turn(lambda: True))  # no lists: bench.answers tells what they cost
        seconds["publishing"] = time.monotonic() - start_s - sum(seconds.values())
    return {**done, "gone": gone, "seconds": {name: round(value, 3) for name, value in seconds.items()}}


def verify_quick(out: Path) -> dict[str, Any]:
    from pipeline.verify.command import check  # brings engines and decoders, which would count as memory of the others
    from pipeline.verify.config import VerifyConfig

    start_s = time.monotonic()
    health, _, _ = check(VerifyConfig(out))
    real = [finding for finding in health.findings if "spec" not in finding.expected]  # there is no model
    assert not real, real[:3]
    return {"rows": health.vectors, "mb": round(health.bytes / 1e6), "seconds": {"all": time.monotonic() - start_s}}


def _with_peak(work: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> dict[str, Any]:
    start_s = time.process_time()
    done = work(*args)
    peak_mb = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return {**done, "cpu_s": round(time.process_time() - start_s, 3), "peak_rss_mb": peak_mb}


def alone(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """In a new process, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_with_peak, (work, args))


def measure(what: str, keys: int, dim: int, rounds: int, folder: Path) -> dict[str, Any]:
    base = folder / (f"manifest-{keys}" if what == "diff" else f"index-{keys}-{dim}")
    if not base.exists():
        made = alone(make_manifest, base, keys) if what == "diff" else alone(night, base, dim, 0, keys, 0)
        print(json.dumps({"made": made}), flush=True)
    found: list[dict[str, Any]] = []
    for _ in range(rounds):
        if what == "diff":
            found.append(alone(quiet_night, base, keys))
        elif what == "verify":
            found.append(alone(verify_quick, base))
        else:
            changes = (ADDED, 0) if what == "add" else (0, min(RENAMED, keys))
            copy, empty = folder / "copy", folder / "empty"
            shutil.copytree(base, copy, symlinks=True)
            found.append({"night": alone(night, copy, dim, keys, *changes)})
            shutil.rmtree(copy)
            if what == "add":
                found[-1]["into_empty"] = alone(night, empty, dim, 0, ADDED, 0)
                shutil.rmtree(empty)
        print(json.dumps(found[-1]), flush=True)
    return {"keys": keys, "dim": dim, "rounds": found}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.bench.nights", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["diff", "rename", "add", "verify"])
    parser.add_argument("--keys", type=int, default=1_000_000, metavar="N", help="default: 1,000,000")
    parser.add_argument("--dim", type=int, default=512, help="default: 512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="keeps the index that was made (default: a temporary folder)")
    parser.add_argument("--out", type=Path, required=True, help="folder of result files")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        measured = measure(args.what, args.keys, args.dim, args.rounds, args.work or Path(temporary))
    result = {
        "command": f"python -m pipeline.bench.nights {args.what} --keys {args.keys} --dim {args.dim}",
        "date": time.strftime("%Y-%m-%d"),
        "host": host_id(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **measured,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"store-{args.what}-{args.keys}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
