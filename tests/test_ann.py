"""Search answers with what is published, nothing else: exactly, or by graphs that are in step with every generation."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from store_model import DIM, PHOTOS, SPACE, embed, item, run, some, vector_of
from test_store_crash import die_at, in_fork, in_fresh_process

from pipeline.run_record import Clock
from pipeline.search.index import Index
from pipeline.store import Block, Generation, Store, StoreDamaged, Turn, ann, fold, manifest, show_generation
from pipeline.store.check import Health, check_data, open_readonly
from pipeline.store.check_shown import check_generations
from pipeline.store.drop import drop_broken, drop_generations
from pipeline.store.graphs import Graphs
from pipeline.store.scan import Scan, score

QUERIES = np.stack([vector_of(b"question %d" % number) for number in range(40)])


def small_thresholds() -> None:
    """Graphs for indexes of some hundred rows: 20 rows may stay outside, 200 are one graph."""
    ann.VECTOR_BYTES_MIN, ann.TAIL_BYTES_MAX, ann.GRAPH_ROWS, ann.ADD_ROWS = 1, 20 * 2 * DIM, 200, 64


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VECTOR_BYTES_MIN", "TAIL_BYTES_MAX", "GRAPH_ROWS", "ADD_ROWS"):
        monkeypatch.setattr(ann, name, getattr(ann, name))
    small_thresholds()


@contextlib.contextmanager
def opened(out: Path) -> Iterator[Index]:
    """An index that asks its graphs, however fast exact search is on some hundred rows."""
    with Index.open(out) as index:
        index._ann_pays = True
        yield index


def content(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "current" / "generation.json").read_text())
    return loaded


def graph_names(out: Path) -> list[str]:
    return [file["graph"]["name"] for file in (content(out)["ann"] or {"graphs": []})["graphs"]]


def best(out: Path, query: npt.NDArray[np.float16], k: int, allowed: npt.NDArray[np.bool_] | None = None) -> list[int]:
    """By brute force over what any h5py user sees."""
    with h5py.File(out / "index.h5", "r", locking=False) as file:
        scores = score(file["embeddings"][:], query)
    rows = np.arange(len(scores)) if allowed is None else np.flatnonzero(allowed)
    return rows[np.lexsort((rows, -scores[rows]))][:k].tolist()


def assert_graphs_answer(out: Path, recall_min: float = 0.97) -> None:
    """Their scores are those of exact search, every row is one of the generation, and few neighbours are missing."""
    found = 0
    with opened(out) as index, h5py.File(out / "index.h5", "r", locking=False) as file:
        emb_nd = file["embeddings"][:]
        for query in QUERIES:
            answer = index.search(query, 10)
            assert len(answer) == min(10, len(emb_nd)) == len(set(answer.rows.tolist()))
            assert np.array_equal(answer.scores, score(emb_nd[answer.rows], query))
            exact = index.search(query, 10, exact=True)
            assert exact.exact
            assert exact.rows.tolist() == best(out, query, 10)
            found += np.count_nonzero(answer.scores >= exact.scores[-1])
            assert not answer.exact
    assert found >= recall_min * 10 * len(QUERIES), f"{found} of {10 * len(QUERIES)} neighbours"


# ---- exact search ------------------------------------------------------------------------------------------------


def test_exact_search_is_brute_force_whatever_died_repeats_or_is_not_allowed(tmp_path: Path) -> None:
    run(tmp_path, some(120), chunk=20)
    twins = {f"twin/{number}": b"picture 60" for number in range(12)}
    run(tmp_path, {**some(70, start=25), **twins}, chunk=20)  # 25 rows died, 12 rows repeat one
    chance = np.random.default_rng(0)
    with Index.open(tmp_path) as index:
        assert index.generation.ann is None, "small indexes have no graphs"
        rows = index.generation.rows
        for query in [*QUERIES[:10], vector_of(b"picture 60")]:
            for k in (1, 9, 500):
                found = index.search(query, k)
                assert found.rows.tolist() == best(tmp_path, query, k)
                assert len(found.keys) == len(found.marks) == len(found.metadata) == len(found) == min(k, rows)
            for share in (0.0, 0.1, 0.9):
                allowed = chance.random(rows) < share
                assert index.search(query, 9, allowed=allowed).rows.tolist() == best(tmp_path, query, 9, allowed)
        assert sorted(index.search(vector_of(b"picture 60"), 13).keys) == sorted([*twins, "dir/00060.jpg"])


def test_wrong_questions_are_named(tmp_path: Path) -> None:
    run(tmp_path, some(5))
    with Index.open(tmp_path) as index:
        with pytest.raises(ValueError, match=r"the query is float16 \(7,\), the index holds float16 vectors of \(8,\)"):
            index.search(np.zeros(7, np.float16))
        with pytest.raises(ValueError, match="the query is float32"):
            index.search(np.zeros(8, np.float32))
        with pytest.raises(ValueError, match=r"allowed is bool \(4,\), expected bool \(5,\)"):
            index.search(QUERIES[0], allowed=np.ones(4, np.bool_))
        with pytest.raises(ValueError, match="k is 0"):
            index.search(QUERIES[0], 0)


# ---- graphs in step ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("graphs")
def test_graphs_keep_step_with_every_night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "SMALL_MAX", 4)  # so that vectors move between files, and graphs do not care
    run(tmp_path, some(500), chunk=60)
    first = graph_names(tmp_path)
    assert len(first) == 3
    assert_graphs_answer(tmp_path)

    run(tmp_path, {**some(490), **some(10, start=500)}, chunk=60)  # few: nothing is built
    assert graph_names(tmp_path) == first
    assert sum(count for _, count in content(tmp_path)["ann"]["tail"]) == 10
    assert_graphs_answer(tmp_path)

    run(tmp_path, {**some(490), **some(60, start=500)}, chunk=60)  # more: the smallest graph is copied and grows
    assert graph_names(tmp_path)[:2] == first[:2]
    assert len(graph_names(tmp_path)) == 3
    assert content(tmp_path)["ann"]["tail"] == []
    assert_graphs_answer(tmp_path)

    renamed = {f"moved/{key}": picture for key, picture in some(300, start=250).items()}
    twins = {f"twin/{number}": b"picture 300" for number in range(30)}
    run(tmp_path, {**renamed, **twins}, chunk=60)  # mostly dead: what lives is inserted anew
    assert first[0] not in graph_names(tmp_path)
    assert_graphs_answer(tmp_path)
    with opened(tmp_path) as index:
        all_twins = index.search(vector_of(b"picture 300"), 31)
        assert sorted(all_twins.keys) == sorted([*twins, "moved/dir/00300.jpg"])

    run(tmp_path, {**renamed, **some(20)}, chunk=60)  # pictures that were gone and came back
    assert_graphs_answer(tmp_path)
    entry = content(tmp_path)["ann"]
    assert entry["recall"] >= ann.RECALL_MIN
    assert (entry["recall_k"], entry["queries"]) == (10, ann.QUERIES)
    kept = {name for path in tmp_path.glob("generations/*/generation.json")
            for name in ann.names_of(json.loads(path.read_text())["ann"])}  # fmt: skip
    assert {f"ann/{path.name}" for path in (tmp_path / "ann").iterdir()} == kept, "no graph outlives its generations"


@pytest.mark.usefixtures("graphs")
def test_where_all_neighbours_died_the_next_ones_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ann, "GRAPH_ROWS", 1000)
    monkeypatch.setattr(ann, "DEAD_SHARE_MAX", 1.0)
    pictures = some(900)
    run(tmp_path, pictures, chunk=300)
    query = QUERIES[0]
    near = sorted(pictures, key=lambda key: -float(vector_of(pictures[key]).astype(np.float32) @ query))
    for dead in (50, 600):
        run(tmp_path, {key: pictures[key] for key in near[dead:]})
        assert len(graph_names(tmp_path)) == 1
        with opened(tmp_path) as index:
            assert index.search(query, 9).keys == near[dead : dead + 9]


def test_what_no_link_of_a_graph_leads_to_is_found_all_the_same(tmp_path: Path) -> None:
    """USearch drops links between vectors that are nearly the same until nothing leads to some of them any more."""
    from pipeline.store.usearch_lib import Index as Graph

    dim, rows, unreached = 64, 60, 0
    for seed in range(200):
        chance = np.random.default_rng(seed)
        wide = chance.standard_normal(dim) + 0.02 * chance.standard_normal((rows, dim))
        emb_nd = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)
        graph = Graph(ndim=dim, metric="ip", dtype="f16", connectivity=ann.CONNECTIVITY,
                      expansion_add=ann.EXPANSION_ADD, enable_key_lookups=False)  # fmt: skip
        keys = np.arange(rows, dtype=np.uint64)
        graph.add(keys, emb_nd, threads=1)
        found = graph.search(emb_nd[0], rows)
        if np.count_nonzero(~np.isnan(found.distances)) == rows:
            continue
        unreached += 1
        np.save(tmp_path / "vectors.npy", emb_nd)
        mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
        scan = Scan([Block("vectors.npy", mapped, 0, np.array([[0, rows]]))])
        graphs = Graphs([graph], np.stack([keys, keys]), np.empty(0, np.int64), scan, 512)
        assert graphs.nearest(emb_nd[0], 10) is None, "an exact search is asked for"
        graphs.close()
        scan.close()
    assert unreached, "no graph of 200 had such a row"


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("looks", [0, 3])
def test_what_time_does_not_allow_is_searched_exactly(tmp_path: Path, looks: int) -> None:
    left, clock = looks, Clock()

    def out_of_time() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    pictures = some(400)
    with Store.open(tmp_path, SPACE, DIM) as index:
        index.begin_run(PHOTOS)
        index.observe([item(key, picture) for key, picture in pictures.items()])
        index.finish_listing()
        embed(index, pictures)
        with clock.phase("publishing"):
            time.sleep(0.01)
            index.publish({}, {}, turn=Turn(out_of_time, clock.phase))
    assert list(clock.phases_s) == ["ann", "publishing"]
    if looks == 0:
        assert content(tmp_path)["ann"] is None
    else:
        assert 0 < content(tmp_path)["ann"]["graphs"][0]["rows"] < 200
        assert_graphs_answer(tmp_path)
    run(tmp_path, {**pictures, "one": b"more"})  # the next night goes on
    assert sum(count for _, count in content(tmp_path)["ann"]["tail"]) <= 20
    assert_graphs_answer(tmp_path)


def test_a_phase_within_another_counts_once() -> None:
    clock, start_s = Clock(), time.monotonic()
    with clock.phase("outer"):
        time.sleep(0.02)
        for _ in range(2):
            with clock.phase("inner"):
                time.sleep(0.03)
    assert clock.phases_s["inner"] >= 0.06
    assert clock.phases_s["outer"] < clock.phases_s["inner"]
    assert sum(clock.phases_s.values()) <= time.monotonic() - start_s + 0.002


@pytest.mark.usefixtures("graphs")
def test_generations_roll_back_with_their_graphs_and_models_have_their_own(tmp_path: Path) -> None:
    run(tmp_path, some(100))
    first = graph_names(tmp_path)
    run(tmp_path, some(300))
    assert graph_names(tmp_path) != first
    show_generation(tmp_path, 1)
    assert graph_names(tmp_path) == first
    assert_graphs_answer(tmp_path)
    show_generation(tmp_path, None)
    run(tmp_path, some(300), space="space-b")
    assert content(tmp_path)["space"] == "space-b"
    assert not set(graph_names(tmp_path)) & set(first)
    assert_graphs_answer(tmp_path)


@pytest.mark.usefixtures("graphs")
def test_an_open_index_outlives_its_files(tmp_path: Path) -> None:
    run(tmp_path, some(300))
    names = graph_names(tmp_path)
    with opened(tmp_path) as index:
        before = [index.search(query, 9).rows.tolist() for query in QUERIES]
        for night in range(1, 5):
            run(tmp_path, some(300, start=300 * night))
        assert not any((tmp_path / name).exists() for name in names)
        assert not (tmp_path / "generations" / "1").exists()
        assert [index.search(query, 9).rows.tolist() for query in QUERIES] == before
        assert index.search(QUERIES[0], 9).keys


@pytest.mark.usefixtures("graphs")
def test_a_generation_of_an_earlier_version_answers(tmp_path: Path) -> None:
    run(tmp_path, some(100))
    path = tmp_path / "current" / "generation.json"
    old = json.loads(path.read_text())
    del old["ann"]
    path.write_text(json.dumps(old))
    shutil.rmtree(tmp_path / "ann")
    with Index.open(tmp_path) as index:
        assert index.search(QUERIES[0], 9).rows.tolist() == best(tmp_path, QUERIES[0], 9)
    run(tmp_path, some(130))
    assert_graphs_answer(tmp_path)


# ---- damage ------------------------------------------------------------------------------------------------------


def check(out: Path) -> Health:
    health = Health()
    with contextlib.closing(open_readonly(out)) as db:
        check_generations(out, db, check_data(out, db, health), health)
    return health


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 4
    path.write_bytes(raw)


def sign(out: Path, name: str) -> None:
    """The digest of a changed file, put right: what it says must be found wrong."""
    listing = out / "current" / "generation.json"
    loaded = json.loads(listing.read_text())
    entry = loaded["ann"]
    for own in [entry["map"], *(graph[kind] for graph in entry["graphs"] for kind in ("graph", "keys"))]:
        if own["name"] == name:
            own.update(ann.asdict(ann.OwnFile(name, (out / name).stat().st_size, ann.digest_file(out / name))))
    listing.write_text(json.dumps(loaded))


def other_keys(out: Path, name: str) -> None:
    keys = np.fromfile(out / name, "<u8")
    keys[-1] += np.uint64(1)
    keys.tofile(out / name)
    sign(out, name)


def other_rows(out: Path, name: str) -> None:
    map_2n = np.load(out / name)
    map_2n[1, :2] = map_2n[1, 1::-1]
    np.save(out / name, map_2n)
    sign(out, name)


HARMS: dict[str, tuple[str, Callable[[Path, str], None]]] = {
    "missing graph": ("graph", lambda out, name: (out / name).unlink()),
    "truncated graph": ("graph", lambda out, name: os.truncate(out / name, 1000)),
    "flipped graph": ("graph", lambda out, name: flip(out / name)),
    "missing keys": ("keys", lambda out, name: (out / name).unlink()),
    "flipped keys": ("keys", lambda out, name: flip(out / name)),
    "other keys": ("keys", other_keys),
    "missing map": ("map", lambda out, name: (out / name).unlink()),
    "flipped map": ("map", lambda out, name: flip(out / name)),
    "other rows": ("map", other_rows),
}


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("harm", HARMS)
def test_graphs_out_of_step_are_named_and_repaired(tmp_path: Path, harm: str) -> None:
    pictures = some(250)
    run(tmp_path, pictures)
    assert not check(tmp_path).findings
    kind, damage = HARMS[harm]
    entry = content(tmp_path)["ann"]
    damage(tmp_path, (entry["map"] if kind == "map" else entry["graphs"][0][kind])["name"])
    if kind != "keys" and not harm.startswith("other"):
        with pytest.raises(StoreDamaged, match="--exact answers without it"):
            Index.open(tmp_path)
    with Index.open(tmp_path, exact=True) as index:
        assert index.search(QUERIES[0], 9).rows.tolist() == best(tmp_path, QUERIES[0], 9)
    health = check(tmp_path)
    assert {finding.what for finding in health.findings} == {"ann out of step"}
    assert health.broken.republish
    with contextlib.closing(manifest.connect(tmp_path / "manifest.sqlite")) as db:
        drop_broken(tmp_path, db, health.broken)
    run(tmp_path, pictures)
    with contextlib.closing(manifest.connect(tmp_path / "manifest.sqlite")) as db:
        drop_generations(tmp_path, db, health.broken)
    assert not check(tmp_path).findings
    assert_graphs_answer(tmp_path)


def kill_at_every_step(folder: Path) -> None:
    """As test_store_crash does, with graphs: each run dies one step later than the one before it."""
    small_thresholds()
    base = folder / "base"
    run(base, some(90))
    after = some(120, start=30)

    for step in range(1, 1000, 4):
        out = folder / f"step{step}"
        shutil.copytree(base, out, symlinks=True)
        status = in_fork(die_at(step, partial(run, out, after)))
        with Generation.open(out) as generation:
            seen = set(generation.keys(np.arange(generation.rows)))
        assert seen in (set(some(90)), set(after))
        assert_graphs_answer(out, 0.9)
        run(out, after)
        assert_graphs_answer(out, 0.9)
        db = sqlite3.connect(out / "manifest.sqlite")
        named = {name for (files,) in db.execute("SELECT files FROM generation") for name in json.loads(files)}
        db.close()
        assert {f"ann/{path.name}" for path in (out / "ann").iterdir()} <= named, "a killed run leaves nothing behind"
        assert not check(out).findings
        shutil.rmtree(out)
        if status == 0:
            assert step > 40, f"only {step} steps were seen: the hook does not see the store's work"
            return
        assert status == -signal.SIGKILL
    raise AssertionError("the run never came to its end")


def test_killed_at_every_step_graphs_are_in_step(tmp_path: Path) -> None:
    in_fresh_process(kill_at_every_step, tmp_path)


@pytest.mark.usefixtures("graphs")
def test_a_full_disk_is_told_and_leaves_the_last_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, some(60))

    def full(_: Path) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(ann, "commit_file", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path, some(200))
    assert_graphs_answer(tmp_path)
    assert content(tmp_path)["number"] == 1
    assert list((tmp_path / "ann").glob("*.tmp"))
    with Store.open(tmp_path, SPACE, DIM):
        assert {path.name for path in (tmp_path / "ann").iterdir()} == {"000001-000001.usearch", "000001-000001.keys"}
    run(tmp_path, some(200))
    assert_graphs_answer(tmp_path)


def test_graphs_and_engines_live_in_one_process() -> None:
    code = "import pipeline.store.usearch_lib, onnxruntime; onnxruntime.SessionOptions(); print('both')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "both\n", f"exit code {done.returncode}: {done.stderr}"
