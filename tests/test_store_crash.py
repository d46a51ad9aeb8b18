"""The store under violence: killed at every step, out of disk, out of descriptors.

What has to fork, or to change the limits of its process, runs in an interpreter of its own: `in_fresh_process`.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
from store_model import DIM, PHOTOS, SPACE, assert_shows, by_key, embed, item, run, some, vector_of
from test_store_amend import assert_same_as_whole, written_whole

from pipeline.store import (
    Generation,
    Store,
    amend,
    content_hash,
    files,
    fold,
    manifest,
    store,
)

REPO = Path(__file__).resolve().parents[1]


def in_fresh_process(function: Callable[[Path], None], path: Path) -> None:
    code = f"import sys, pathlib, {function.__module__} as tests; tests.{function.__name__}(pathlib.Path(sys.argv[1]))"
    env = {**os.environ, "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def in_fork(work: Callable[[], None], seconds: float | None = None) -> int:
    """Run `work` in a fork, SIGKILL it after `seconds`. Returns its exit status, -9 when it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(int(sys.exc_info()[0] is not None))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_whole(out: Path, contents: set[bytes]) -> None:
    """Opens; SQLite finds no fault; every vector is where the manifest says; nothing lies about."""
    with Store.open(out, SPACE, DIM):
        pass
    vector_by_hash = {content_hash(content): vector_of(content) for content in contents}
    db = sqlite3.connect(out / "manifest.sqlite")
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    orphans = "SELECT count(*) FROM vector WHERE shard NOT IN (SELECT id FROM shard)"
    assert db.execute(orphans).fetchone() == (0,)
    lost = "SELECT key FROM input WHERE status = 'embedded' AND content_hash NOT IN (SELECT content_hash FROM vector)"
    assert db.execute(lost).fetchall() == []
    named = set()
    for number, name, rows, size, digest in db.execute("SELECT id, name, rows, bytes, digest FROM shard").fetchall():
        named.add(name)
        assert ((out / name).stat().st_size, files.digest_file(out / name)) == (size, digest)
        with h5py.File(out / name) as file:
            emb_nd, hashes = file["embeddings"][:], file["content_hash"][:]
        assert len(emb_nd) == rows
        for content, row in db.execute("SELECT content_hash, row FROM vector WHERE shard = ?", (number,)):
            assert hashes[row].tobytes() == content
            assert np.array_equal(emb_nd[row], vector_by_hash[content])
    for number, listed in db.execute("SELECT number, files FROM generation").fetchall():
        assert (out / "generations" / str(number) / "index.h5").is_file()
        named |= set(json.loads(listed))
    db.close()
    assert {f"{kind}/{path.name}" for kind in ("shards", "segments") for path in (out / kind).iterdir()} == named


BEFORE = {**some(24), "twin": b"picture 3", "bad": b"bad"}
AFTER = {**some(20, start=8), "renamed": b"picture 1", "third": b"picture 9", "bad": b"healed"}


STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "BEGIN IMMEDIATE", "COMMIT"}


def die_at(step: int, work: Callable[[], object]) -> Callable[[], None]:
    """Every change to a folder raises an audit event, transactions are traced; `work` dies at its `step`-th step."""

    def dies() -> None:
        left = step

        def hook(event: str, _: object = None) -> None:
            nonlocal left
            if event in STEPS:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        def connect(path: Path) -> sqlite3.Connection:
            db = manifest.connect(path)
            db.set_trace_callback(hook)
            return db

        sys.addaudithook(hook)
        store.connect = connect
        work()

    return dies


def kill_at_every_step(folder: Path) -> None:
    """The k-th run dies at its k-th step."""
    fold.SMALL_MAX, fold.SEGMENT_ROWS = 3, 10
    amend.TOUCHED_SHARE_MAX = 1.0  # the last table is amended, not written whole
    base = folder / "base"
    for count in (6, 12, 24):
        run(base, dict(list(BEFORE.items())[:count]), chunk=5)
    run(base, BEFORE, chunk=5)

    amended = 0
    for step in range(1, 1000):
        out = folder / f"step{step}"
        shutil.copytree(base, out, symlinks=True)
        status = in_fork(die_at(step, partial(run, out, AFTER, chunk=5)))
        contents = {*BEFORE.values(), *AFTER.values()}
        with Generation.open(out, check="digest") as generation:
            keys = by_key(generation).keys()
        assert keys in (BEFORE.keys() - {"bad"}, AFTER.keys()), "readers see the old night or the new one"
        assert_whole(out, contents)
        number = run(out, AFTER, chunk=5)
        assert_shows(out, AFTER)
        assert_whole(out, contents)
        if step % 3 == 0:
            assert_same_as_whole(out, number, SPACE)
        amended += written_whole(out) < number
        shutil.rmtree(out)
        if status == 0:
            assert amended > step / 2, f"only {amended} of {step} generations were amended"
            assert step > 40, f"only {step} steps were seen: the hook does not see the store's work"
            return
        assert status == -signal.SIGKILL
    raise AssertionError("the run never came to its end")


def test_killed_at_every_step_it_opens_and_resumes(tmp_path: Path) -> None:
    in_fresh_process(kill_at_every_step, tmp_path)


def kill_at_random(out: Path) -> None:
    fold.SMALL_MAX, fold.SEGMENT_ROWS = 3, 60
    chance = random.Random(0)
    nights = [some(chance.randrange(20, 90), start=chance.randrange(90)) for _ in range(12)]
    contents = {content for night in nights for content in night.values()}

    def work() -> None:
        while True:
            run(out, chance.choice(nights), chunk=7)

    for _ in range(12):
        assert in_fork(work, seconds=chance.uniform(0.02, 0.5)) == -signal.SIGKILL
        chance.random()  # the next child makes another choice
        assert_whole(out, contents)
    run(out, nights[0])
    assert_shows(out, nights[0])


def test_killed_at_random_it_opens_and_resumes(tmp_path: Path) -> None:
    in_fresh_process(kill_at_random, tmp_path)


def few_descriptors(out: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    pictures = some(320)
    run(out, pictures, chunk=1)  # 320 shards, folded when published
    assert_shows(out, pictures)
    fold.SMALL_MAX = 200
    more = {**pictures, **some(180, start=1000)}
    run(out, more, chunk=1)  # 181 data files, all open at once in either reader
    with Generation.open(out) as generation:
        assert len(list(generation.blocks())) == 181
    assert_shows(out, more)


def test_few_descriptors_are_enough(tmp_path: Path) -> None:
    in_fresh_process(few_descriptors, tmp_path)


def full_disk(out: Path) -> None:
    """A limit on file size fails the same write calls as a full disk does, inside HDF5 and inside SQLite."""
    pictures = some(20)
    run(out, pictures)
    more = {**pictures, **some(3000, start=100)}

    def fails(limit: int, work: Callable[[], object]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises((OSError, sqlite3.Error)):
            work()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    with Store.open(out, SPACE, DIM) as index:
        index.begin_run(PHOTOS)
        index.observe([item(key, content) for key, content in more.items()])
        index.finish_listing()
        for limit in (4096, 20_000, 130_000):  # the head of the shard, its vectors, the manifest
            fails(limit, lambda: embed(index, more, chunk=3000))
            assert not list((out / "shards").glob("*.tmp"))
            assert index.counts().pending == 3000
        embed(index, more, chunk=1000)
        for limit in (4096, 30_000, 200_000):
            fails(limit, lambda: index.publish({}, {}))
            assert_shows(out, pictures)
    assert_whole(out, set(more.values()))
    run(out, more)
    assert_shows(out, more)


def test_a_full_disk_leaves_no_half_state(tmp_path: Path) -> None:
    in_fresh_process(full_disk, tmp_path)


def test_no_space_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pictures = some(10)
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path, pictures)
    assert not list((tmp_path / "shards").iterdir())
    run(tmp_path, pictures)
    assert_shows(tmp_path, pictures)
