"""Search answers with what is published, nothing else: exactly, or by lists that are in step with every generation."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict
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
from pipeline.store import (
    Block,
    Generation,
    Store,
    StoreDamaged,
    Turn,
    ann,
    centroids,
    content_hash,
    contents,
    fold,
    list_files,
    manifest,
    recall,
    show_generation,
)
from pipeline.store import lists as store_lists
from pipeline.store import scan as store_scan
from pipeline.store.centroids import nearest_centroid, sizes, train, two_lists
from pipeline.store.check import Health, check_data, open_readonly
from pipeline.store.check_shown import check_generations
from pipeline.store.drop import drop_broken, drop_generations
from pipeline.store.files import digest_file
from pipeline.store.generation import Distrusted
from pipeline.store.lists import Lists, Lookup, OwnFile, content_keys, key_of, read_centroids, read_map
from pipeline.store.scan import Scan, score
from pipeline.store.shards import ShardInfo

QUERIES = np.stack([vector_of(b"question %d" % number) for number in range(40)])


def small_thresholds() -> None:
    """Lists for indexes of some hundred rows: 20 rows may stay outside, 400 entries are one file."""
    ann.VECTOR_BYTES_MIN, ann.TAIL_BYTES_MAX, ann.FILE_BYTES, ann.ASSIGN_ROWS = 1, 20 * 2 * DIM, 400 * DIM, 64
    recall.PROBED = 32
    recall._pays = lambda *_: True  # on some hundred rows exact search is always faster


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VECTOR_BYTES_MIN", "TAIL_BYTES_MAX", "FILE_BYTES", "ASSIGN_ROWS"):
        monkeypatch.setattr(ann, name, getattr(ann, name))
    for name in ("PROBED", "_pays"):
        monkeypatch.setattr(recall, name, getattr(recall, name))
    small_thresholds()


@contextlib.contextmanager
def opened(out: Path) -> Iterator[Index]:
    """An index that asks its lists, however fast exact search is on some hundred rows."""
    with Index.open(out) as index:
        index._ann_pays = True
        yield index


def content(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "current" / "generation.json").read_text())
    return loaded


def list_names(out: Path) -> list[str]:
    return [file["file"]["name"] for file in (content(out)["ann"] or {"lists": []})["lists"]]


def lists_of(out: Path, name: str) -> Lists:
    return Lists.open(out / name, read_centroids(out / content(out)["ann"]["centroids"]["name"], DIM).shape)


def best(out: Path, query: npt.NDArray[np.float16], k: int, allowed: npt.NDArray[np.bool_] | None = None) -> list[int]:
    """By brute force over what any h5py user sees."""
    with h5py.File(out / "index.h5", "r", locking=False) as file:
        scores = score(file["embeddings"][:], query)
    rows = np.arange(len(scores)) if allowed is None else np.flatnonzero(allowed)
    return rows[np.lexsort((rows, -scores[rows]))][:k].tolist()


def assert_lists_answer(out: Path, recall_min: float = 0.97) -> None:
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


@pytest.mark.parametrize("joined_bytes", [0, 4 << 20], ids=["as files", "joined"])
def test_exact_search_is_brute_force_whatever_died_repeats_or_is_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joined_bytes: int
) -> None:
    monkeypatch.setattr("pipeline.store.scan.JOINED_BYTES", joined_bytes)
    run(tmp_path, some(120), chunk=20)
    twins = {f"twin/{number}": b"picture 60" for number in range(12)}
    run(tmp_path, {**some(70, start=25), **twins}, chunk=20)  # 25 rows died, 12 rows repeat one
    chance = np.random.default_rng(0)
    with Index.open(tmp_path) as index:
        assert index.generation.ann is None, "small indexes have no lists"
        assert len(index._scan.blocks) == (1 if joined_bytes else len(list(index.generation.blocks()))) < 9
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


def test_the_kth_scores_of_many_questions_go_through_memory_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_scan, "PIECE_BYTES", 1 << 20)
    scan = scan_of(tmp_path / "vectors.npy", np.random.default_rng(0).standard_normal((50_000, 8)))
    queries = scan.gather(np.arange(48))
    tracemalloc.start()
    kth = scan.kth_scores(queries, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    everything = scan.gather(np.arange(50_000))
    assert np.allclose(kth, [np.sort(score(everything, query))[-10] for query in queries], atol=1e-6)
    assert peak < 2 * store_scan.CORES * store_scan.PIECE_BYTES, f"{peak:,} bytes"
    scan.close()


def test_wrong_questions_are_named(tmp_path: Path) -> None:
    run(tmp_path, some(5))
    with Index.open(tmp_path) as index:
        with pytest.raises(ValueError, match=r"is float16 \(7,\).* float16 .*\(8,\)"):
            index.search(np.zeros(7, np.float16))
        with pytest.raises(ValueError, match="is float32"):
            index.search(np.zeros(8, np.float32))
        with pytest.raises(ValueError, match=r"allowed is bool \(4,\), expected bool \(5,\)"):
            index.search(QUERIES[0], allowed=np.ones(4, np.bool_))
        with pytest.raises(ValueError, match="k is 0"):
            index.search(QUERIES[0], 0)


# ---- lists in step -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("lists")
def test_lists_keep_step_with_every_night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "SMALL_MAX", 4)  # so that vectors move between files, and lists do not care
    run(tmp_path, some(500), chunk=60)
    first = list_names(tmp_path)
    assert len(first) == 3
    assert_lists_answer(tmp_path)

    run(tmp_path, {**some(490), **some(10, start=500)}, chunk=60)  # few: nothing is built
    assert list_names(tmp_path) == first
    assert sum(count for _, count in content(tmp_path)["ann"]["tail"]) == 10
    assert_lists_answer(tmp_path)

    run(tmp_path, {**some(490), **some(60, start=500)}, chunk=60)  # more: they go into a file with the smallest
    assert list_names(tmp_path)[:2] == first[:2]
    assert len(list_names(tmp_path)) == 3
    assert content(tmp_path)["ann"]["tail"] == []
    assert_lists_answer(tmp_path)

    renamed = {f"moved/{key}": picture for key, picture in some(300, start=250).items()}
    twins = {f"twin/{number}": b"picture 300" for number in range(30)}
    run(tmp_path, {**renamed, **twins}, chunk=60)  # mostly dead: what lives goes on without the rest
    assert first[0] not in list_names(tmp_path)
    assert_lists_answer(tmp_path)
    with opened(tmp_path) as index:
        all_twins = index.search(vector_of(b"picture 300"), 31)
        assert sorted(all_twins.keys) == sorted([*twins, "moved/dir/00300.jpg"])

    run(tmp_path, {**renamed, **some(20)}, chunk=60)  # pictures that were gone and came back
    assert_lists_answer(tmp_path)
    entry = content(tmp_path)["ann"]
    assert entry["recall"] >= recall.RECALL_MIN
    assert (entry["recall_k"], entry["queries"]) == (10, recall.QUERIES)
    kept = {name for path in tmp_path.glob("generations/*/generation.json")
            for name in ann.names_of(json.loads(path.read_text())["ann"])}  # fmt: skip
    assert {f"ann/{path.name}" for path in (tmp_path / "ann").iterdir()} == kept, "no file outlives its generations"


@pytest.mark.usefixtures("lists")
def test_where_all_neighbours_died_the_next_ones_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ann, "FILE_BYTES", 2000 * DIM)
    monkeypatch.setattr(ann, "LIVE_MIN", 0.0)
    pictures = some(900)
    run(tmp_path, pictures, chunk=300)
    query = QUERIES[0]
    near = sorted(pictures, key=lambda key: -float(vector_of(pictures[key]).astype(np.float32) @ query))
    for dead in (50, 600):
        run(tmp_path, {key: pictures[key] for key in near[dead:]})
        assert len(list_names(tmp_path)) == 1
        with opened(tmp_path) as index:
            assert index.search(query, 9).keys == near[dead : dead + 9]


@pytest.mark.usefixtures("lists")
def test_nights_of_some_pictures_leave_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ann, "FILE_BYTES", 20_000 * DIM)
    run(tmp_path, some(400), chunk=100)
    counts, written = [], 0
    for night in range(1, 13):
        before = set(list_names(tmp_path))
        run(tmp_path, some(400 + 30 * night), chunk=100)
        counts.append(len(list_names(tmp_path)))
        new = [file["entries"] for file in content(tmp_path)["ann"]["lists"] if file["file"]["name"] not in before]
        assert len(new) == 1
        written += new[0]
    assert max(counts) <= 4
    assert written <= 2 * 5 * 12 * 30, "of what is new, not of all that is there"
    held = np.concatenate([lists_of(tmp_path, name).keys for name in list_names(tmp_path)])
    with h5py.File(tmp_path / "index.h5", "r", locking=False) as file:
        assert sorted(held.tolist()) == sorted(2 * content_keys(file["content_hash"][:]).tolist()), "two lists each"
    assert_lists_answer(tmp_path)
    run(tmp_path, some(2000), chunk=500)  # more than four times what the centroids were made for
    assert content(tmp_path)["ann"]["centroids_rows"] == 2000
    assert len(list_names(tmp_path)) == 1
    assert_lists_answer(tmp_path)


@pytest.mark.usefixtures("lists")
def test_with_every_list_looked_at_the_answer_is_the_exact_one(tmp_path: Path) -> None:
    run(tmp_path, some(390), chunk=100)
    run(tmp_path, {**some(370), **some(12, start=390), **{f"twin/{number}": b"picture 60" for number in range(12)}})
    with opened(tmp_path) as index:
        lookup = index._lookup
        assert lookup is not None
        assert content(tmp_path)["ann"]["tail"]
        lookup.probed = lookup.entries
        for query in [*QUERIES, vector_of(b"picture 60")]:
            for k in (1, 9, 100):
                exact, found = index.search(query, k, exact=True), index.search(query, k)
                assert (exact.exact, found.exact) == (True, False)
                assert found.rows.tolist() == exact.rows.tolist()
                assert found.scores.tolist() == exact.scores.tolist()


@pytest.mark.usefixtures("lists")
def test_pages_never_overlap_and_show_everything(tmp_path: Path) -> None:
    run(tmp_path, some(900), chunk=300)
    missed = 0
    with opened(tmp_path) as index:
        assert index._lookup is not None
        index._lookup.probed = 450  # a quarter of the entries: many of the nearest are not found
        for query in QUERIES[:10]:
            everything = index.search(query, 900)
            assert sorted(everything.rows.tolist()) == list(range(900))
            assert not everything.exact
            for k in (7, 20, 150):
                pages = [index.search(query, k, offset=offset).rows for offset in range(0, 500, k)]
                rows = np.concatenate(pages).tolist()
                assert rows == everything.rows[: len(rows)].tolist()
            missed += len(set(best(tmp_path, query, 200)) - set(everything.rows[:200].tolist()))
            grouped = index.search(query, 900, group=True)
            assert grouped.exact
            assert np.all(np.diff(grouped.scores) <= 0), "what is ordered anew comes from an exact search"
    assert missed, "the test needs lists that miss something"


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("cap", [True, False])
def test_many_equal_vectors_cost_no_more_than_an_exact_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cap: bool
) -> None:
    monkeypatch.setattr("store_model.vector_of", lambda content, space=SPACE: vector_of(content.split(b"#")[0], space))
    run(tmp_path, {**some(300), **{f"blank/{number}": b"blank page#%d" % number for number in range(1500)}}, chunk=600)
    gathered, asked = [0], []
    gather, nearest = Scan.gather, Scan.nearest
    monkeypatch.setattr(Scan, "gather", lambda self, rows: gathered.append(len(rows)) or gather(self, rows))
    monkeypatch.setattr(Scan, "nearest", lambda self, *args: asked.append(1) or nearest(self, *args))
    if not cap:
        monkeypatch.setattr(store_lists, "LONG_MAX", 1 << 30)
        monkeypatch.setattr(store_lists, "SCORED_MAX", 100)
    with opened(tmp_path) as index:
        del gathered[:], asked[:]
        wide = vector_of(b"blank page") + 0.1 * QUERIES[0]
        query = (wide / np.linalg.norm(wide)).astype(np.float16)
        found = [index.search(query, 9) for _ in range(2)]
        assert bool(asked) == cap, "exact where lists are very long"
        assert max(gathered, default=0) <= 100, "no more are scored again for being equal"
        assert found[0].rows.tolist() == found[1].rows.tolist()
        assert np.array_equal(found[0].scores, index.search(query, 9, exact=True).scores)


def listed(out: Path, wide_nd: npt.NDArray[np.float64]) -> tuple[Scan, dict[str, Any]]:
    """These vectors as one data file, and the lists of a first generation."""
    rows, dim = wide_nd.shape
    draft = out / "generations" / "1"
    draft.mkdir(parents=True)
    scan = scan_of(out / "vectors.npy", wide_nd)
    write_hashes(draft / "index.h5", np.random.default_rng(0).integers(0, 1 << 63, rows).astype(np.uint64))
    block, size = scan.blocks[0], (out / "vectors.npy").stat().st_size
    info = ShardInfo(block.name, rows, dim, size, "", block.emb_nd.offset)
    entry = ann.update(out, draft, 1, [(out / block.name, info, block.runs)], None, Turn())
    assert entry is not None
    return scan, entry


@pytest.mark.usefixtures("lists")
def test_bursts_of_nearly_equal_pictures_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(centroids, "PER_ROOT", 1)
    monkeypatch.setattr(recall, "PROBED", 1024)
    chance = np.random.default_rng(0)
    scenes, each, dim = 24, 120, 64
    scene_nd = np.repeat(chance.standard_normal((scenes, dim)), each, axis=0)
    scan, entry = listed(tmp_path, scene_nd + 0.02 * chance.standard_normal(scene_nd.shape))
    lookup, gathered = Lookup.open(tmp_path, entry, scan), []
    gather = Scan.gather
    monkeypatch.setattr(Scan, "gather", lambda self, rows: gathered.append(len(rows)) or gather(self, rows))
    found = 0
    for query in gather(scan, np.arange(0, scan.rows, 50)):
        answer = lookup.nearest(query, 10)
        assert answer is not None
        found += np.count_nonzero(answer[1] >= scan.nearest(query, 10)[1][-1] - 1e-5)
    assert found >= 0.99 * 10 * len(gathered), f"{found} of {10 * len(gathered)}"
    assert entry["probed"] == 1024, "nothing is widened in vain"
    assert np.median(gathered) <= 2 * each, "of other scenes few are scored again"
    scan.close()


@pytest.mark.usefixtures("lists")
def test_lists_of_a_quiet_night_cost_few_bytes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(centroids, "PER_ROOT", 0.2)
    monkeypatch.setattr(recall, "QUERIES", 1)
    monkeypatch.setattr(contents, "PIECE", 4096)
    monkeypatch.setattr(store_scan, "PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(ann, "FILE_BYTES", 1 << 30)
    rows = 200_000
    scan, entry = listed(tmp_path, np.random.default_rng(0).standard_normal((rows, DIM)))
    block, size = scan.blocks[0], (tmp_path / "vectors.npy").stat().st_size
    info = ShardInfo(block.name, rows, DIM, size, "", block.emb_nd.offset)
    args = [(tmp_path / block.name, info, block.runs)], {**entry, "distrusted": Distrusted([], [])}, Turn()
    tracemalloc.start()
    again = ann.update(tmp_path, tmp_path / "generations" / "1", 2, *args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert again is not None
    assert again["lists"] == entry["lists"], "nothing new is written"
    assert peak < 24 * rows, f"{peak / rows:.0f} bytes a row"
    scan.close()


@pytest.mark.usefixtures("lists")
def test_a_file_of_lists_costs_one_descriptor_and_their_lack_is_no_damage(tmp_path: Path) -> None:
    run(tmp_path, some(200))
    path = tmp_path / list_names(tmp_path)[0]
    shape_ld = read_centroids(tmp_path / content(tmp_path)["ann"]["centroids"]["name"], DIM).shape
    before = len(os.listdir("/proc/self/fd"))
    held = Lists.open(path, shape_ld)
    assert len(held.keys)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    taken = [os.open(path, os.O_RDONLY) for _ in range(highest)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            Lists.open(path, shape_ld)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in taken:
            os.close(descriptor)


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("kind", ["lists", "centroids"])
def test_a_night_makes_anew_what_cannot_be_read(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, some(250))
    entry = content(tmp_path)["ann"]
    damaged = tmp_path / (entry["lists"][0]["file"] if kind == "lists" else entry["centroids"])["name"]
    damaged.write_bytes(bytes(damaged.stat().st_size))
    run(tmp_path, some(260))
    assert "made anew" in caplog.text
    assert str(damaged.relative_to(tmp_path)) not in ann.names_of(content(tmp_path)["ann"])
    assert_lists_answer(tmp_path)


@pytest.mark.usefixtures("lists")
def test_new_centroids_are_not_trained_in_vain(tmp_path: Path) -> None:
    looks = iter([False])  # then there is no time left
    run(tmp_path, some(400), turn=Turn(lambda: next(looks, True)))
    entry = content(tmp_path)["ann"]
    assert sum(count for _, count in entry["tail"]) == 400 - ann.ASSIGN_ROWS
    assert_lists_answer(tmp_path)


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("looks", [0, 1, 4])
def test_lists_are_finished_though_no_picture_changes(tmp_path: Path, looks: int) -> None:
    left = iter(range(looks))
    run(tmp_path, some(400), turn=Turn(lambda: next(left, None) is None))
    assert run(tmp_path, some(400), turn=Turn(lambda: True)) == 1, "without time another generation shows nothing more"
    assert run(tmp_path, some(400)) == 2
    entry = content(tmp_path)["ann"]
    assert (entry["tail"], entry["complete"]) == ([], True)
    assert run(tmp_path, some(400)) == 2, "nothing is left to do"
    assert_lists_answer(tmp_path)


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("ends", ["k-means", "sorting"])
def test_complete_lists_stay_until_new_ones_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    run(tmp_path, some(400))
    first = list_names(tmp_path)
    steps: list[str] = []

    def during(step: str, work: Callable[..., Any], *args: Any) -> Any:
        steps.append(step)
        return work(*args)

    monkeypatch.setattr(ann, "train", partial(during, "k-means", train))
    monkeypatch.setattr(ann, "two_lists", partial(during, "sorting", two_lists))
    run(tmp_path, some(1700), turn=Turn(lambda: "k-means" in steps and steps[-1] == ends))
    entry = content(tmp_path)["ann"]
    assert steps[-1] == ends
    assert entry["centroids_rows"] == 400
    assert entry["tail"] == [], "the old lists took what is new before time went into others"
    assert set(first) & set(list_names(tmp_path))
    assert {f"ann/{path.name}" for path in (tmp_path / "ann").iterdir()} == {*ann.names_of(entry), *first}
    assert_lists_answer(tmp_path, 0.85)  # how many entries to look at is settled by the next run
    run(tmp_path, some(1700))
    assert content(tmp_path)["ann"]["centroids_rows"] == 1700
    assert_lists_answer(tmp_path)


@pytest.mark.usefixtures("lists")
def test_measuring_ends_with_the_time_and_where_exact_search_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tails = []
    tail = Lookup.tail
    monkeypatch.setattr(Lookup, "tail", lambda *args: tails.append(1) or tail(*args))
    monkeypatch.setattr(recall, "RECALL_MIN", 2.0)  # so that only other reasons end it
    looks = iter([False] * 4)
    run(tmp_path, some(400), turn=Turn(lambda: next(looks, True)))
    entry = content(tmp_path)["ann"]
    assert (entry["probed"], entry["complete"]) == (recall.PROBED, False), "time is over: one round"
    del tails[:]
    run(tmp_path, some(410))
    entry = content(tmp_path)["ann"]
    assert (entry["probed"] > 10 * recall.PROBED, entry["queries"], entry["complete"]) == (True, recall.QUERIES, True)
    assert len(tails) == recall.QUERIES, "once for each question, however often the search is widened"
    monkeypatch.setattr(recall, "_pays", lambda *_: False)
    run(tmp_path, some(450))
    entry = content(tmp_path)["ann"]
    assert (entry["queries"], entry["probed"], entry["complete"]) == (recall.TIMED, recall.PROBED, True)


def test_k_means_ends_with_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = scan_of(tmp_path / "vectors.npy", np.random.default_rng(0).standard_normal((100, 8)))
    rounds, looks = [], iter([False, False])
    monkeypatch.setattr(centroids, "nearest_centroid", lambda *args: rounds.append(1) or nearest_centroid(*args))
    centroids_ld = train(scan.gather(np.arange(100)), 40, np.random.default_rng(0), lambda: next(looks, True))
    assert (len(rounds), len(centroids_ld)) == (2, 40)
    scan.close()


@pytest.mark.usefixtures("lists")
def test_the_tail_is_bounded_in_rows_not_in_contents(tmp_path: Path) -> None:
    run(tmp_path, some(400))
    run(tmp_path, {**some(400), **{f"twin/{number}": b"one picture" for number in range(100)}})
    assert content(tmp_path)["ann"]["tail"] == []
    assert_lists_answer(tmp_path)


def scan_of(path: Path, wide_nd: npt.NDArray[np.float64]) -> Scan:
    np.save(path, (wide_nd / np.linalg.norm(wide_nd, axis=1, keepdims=True)).astype(np.float16))
    return Scan([Block(path.name, np.load(path, mmap_mode="r"), 0, np.array([[0, len(wide_nd)]]))])


def test_centroids_stand_where_the_vectors_are(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    cluster_of = chance.choice(10, 3000, p=np.array([300, 100, 60, 20, 10, 4, 3, 1, 1, 1]) / 500)
    scan = scan_of(
        tmp_path / "vectors.npy", 3 * np.eye(10, 16)[cluster_of] + 0.2 * chance.standard_normal((3000, 16))
    )
    centroids_ld = train(scan.gather(np.arange(3000)), 219, chance, lambda: False)
    assert sizes(3000) == (219, 3000), "four times the root of the rows"
    wide_nd, wide_ld = scan.gather(np.arange(3000)).astype(np.float32), centroids_ld.astype(np.float32)
    assert np.allclose(np.linalg.norm(wide_ld, axis=1), 1, atol=2e-3)
    list_of, second = two_lists(scan.gather(np.arange(3000)), centroids_ld).T
    assert np.array_equal(list_of, nearest_centroid(scan.gather(np.arange(3000)), centroids_ld))
    assert np.array_equal(list_of, np.argmax(wide_nd @ wide_ld.T, axis=1))
    own = np.einsum("nd,nd->n", wide_nd, wide_ld[list_of])
    assert own.min() > 0.8, "no vector is far from its centroid"
    r_nld = wide_nd[:100, None] - wide_ld[None]
    first_nd = np.take_along_axis(r_nld, list_of[:100, None, None], 1)[:, 0]
    first_nd /= np.maximum(np.linalg.norm(first_nd, axis=1, keepdims=True), 1e-30)  # one may be its own centroid
    loss_nl = np.square(r_nld).sum(2) + np.einsum("nld,nd->nl", r_nld, first_nd) ** 2
    loss_nl[np.arange(100), list_of[:100]] = np.inf
    chosen = loss_nl[np.arange(100), second[:100]]
    assert np.allclose(chosen, loss_nl.min(axis=1), atol=1e-3), "SOAR's loss, term by term"
    assert all(len(set(cluster_of[list_of == number])) <= 1 for number in range(219)), "no list mixes clusters"
    scan.close()


@pytest.mark.parametrize("rows", [1, 2, 50])
def test_vectors_that_are_all_the_same_have_centroids(tmp_path: Path, rows: int) -> None:
    scan = scan_of(tmp_path / "vectors.npy", np.ones((rows, 8)))
    centroids_ld = train(scan.gather(np.arange(rows)), sizes(rows)[0], np.random.default_rng(0), lambda: False)
    assert len(centroids_ld) == min(rows, int(4 * rows**0.5))
    assert np.all(np.isfinite(centroids_ld))
    scan.close()


@pytest.mark.usefixtures("lists")
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
        assert 0 < content(tmp_path)["ann"]["lists"][0]["entries"] < 400
        assert_lists_answer(tmp_path)
    run(tmp_path, {**pictures, "one": b"more"})  # the next night goes on
    assert sum(count for _, count in content(tmp_path)["ann"]["tail"]) <= 20
    assert_lists_answer(tmp_path)


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


@pytest.mark.usefixtures("lists")
def test_generations_roll_back_with_their_lists_and_models_have_their_own(tmp_path: Path) -> None:
    run(tmp_path, some(100))
    first = list_names(tmp_path)
    run(tmp_path, some(300))
    assert list_names(tmp_path) != first
    show_generation(tmp_path, 1)
    assert list_names(tmp_path) == first
    assert_lists_answer(tmp_path)
    show_generation(tmp_path, None)
    run(tmp_path, some(300), space="space-b")
    assert content(tmp_path)["space"] == "space-b"
    assert not set(list_names(tmp_path)) & set(first)
    assert_lists_answer(tmp_path)


@pytest.mark.usefixtures("lists")
def test_an_open_index_outlives_its_files(tmp_path: Path) -> None:
    run(tmp_path, some(300))
    names = list_names(tmp_path)
    with opened(tmp_path) as index:
        before = [index.search(query, 9).rows.tolist() for query in QUERIES]
        for night in range(1, 5):
            run(tmp_path, some(300, start=300 * night))
        assert not any((tmp_path / name).exists() for name in names)
        assert not (tmp_path / "generations" / "1").exists()
        assert [index.search(query, 9).rows.tolist() for query in QUERIES] == before
        assert index.search(QUERIES[0], 9).keys


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("graphs", [False, True])
def test_a_generation_of_an_earlier_version_answers(tmp_path: Path, graphs: bool) -> None:
    run(tmp_path, some(100))
    path = tmp_path / "current" / "generation.json"
    old = json.loads(path.read_text())
    shutil.rmtree(tmp_path / "ann")
    (tmp_path / "ann").mkdir()
    del old["ann"]
    names = []
    if graphs:
        names = [f"ann/000001-000001.{kind}" for kind in ("usearch", "keys")]
        old["ann"] = {"graphs": [{kind: {"name": name} for kind, name in zip(("graph", "keys"), names, strict=True)}]}
        for name in names:
            (tmp_path / name).touch()
    with contextlib.closing(manifest.connect(tmp_path / "manifest.sqlite")) as db:
        files = [file["name"] for file in old["files"]]
        db.execute("UPDATE generation SET files = ?", (json.dumps([*files, *names]),))
    path.write_text(json.dumps(old))
    assert not check(tmp_path).findings
    with Index.open(tmp_path) as index:
        assert index.search(QUERIES[0], 9).rows.tolist() == best(tmp_path, QUERIES[0], 9)
    for count in (130, 160, 190, 220, 250):  # until nothing keeps the first one any more
        run(tmp_path, some(count))
        assert_lists_answer(tmp_path, 0.95)
    assert not [path for path in (tmp_path / "ann").iterdir() if path.suffix != ".h5"]


# ---- what there is to be found -----------------------------------------------------------------------------------


def write_hashes(path: Path, keys: npt.NDArray[np.uint64]) -> None:
    with h5py.File(path, "w") as file:
        file["content_hash"] = np.stack([keys, np.zeros_like(keys)], axis=1).view(np.uint8)


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("values", [5, 100, 1 << 62])
def test_contents_are_what_a_plain_look_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, values: int
) -> None:
    monkeypatch.setattr(contents, "PIECE", piece)
    chance = np.random.default_rng(values)
    keys_n = chance.integers(0, values, 200).astype(np.uint64)
    write_hashes(tmp_path / "index.h5", keys_n)
    contents.write_map(tmp_path / "index.h5", tmp_path / "ann.npy")
    map_2n = read_map(tmp_path / "ann.npy", 200)
    assert sorted(zip(keys_n.tolist(), range(200), strict=True)) == list(zip(*map_2n.tolist(), strict=True))
    found = contents.Contents.of(map_2n)
    keys, row_of = np.unique(keys_n, return_index=True)
    assert len(found) == found.new == len(keys)
    assert found.rows_of(np.arange(len(keys))[::-1]).tolist() == row_of[::-1].tolist()
    assert found.tail_rows().tolist() == list(range(200))
    one, two, unknown = keys[: len(keys) // 2], keys[len(keys) // 4 :], np.array([values + 1], np.uint64)
    assert found.cover(np.concatenate([one, unknown, one])).tolist() == [True] * len(one) + [False] + [True] * len(one)
    assert found.cover(two).tolist() == (~np.isin(two, one)).tolist()
    assert found.tail == found.new == 0
    anew = found.uncovered()
    anew.cover(one)
    outside = np.flatnonzero(~np.isin(keys_n, one))
    assert anew.tail_rows().tolist() == outside.tolist()
    assert anew.tail == len(outside)
    assert anew.rows[anew.todo()].tolist() == sorted(row_of[~np.isin(keys, one)].tolist())


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


def sign(out: Path, name: str, number: int | None = None) -> None:
    """The digest of a changed file, put right: what it says must be found wrong."""
    listing = out / (f"generations/{number}" if number else "current") / "generation.json"
    loaded = json.loads(listing.read_text())
    entry = loaded["ann"]
    for own in [entry["map"], entry["centroids"], *(file["file"] for file in entry["lists"])]:
        if own["name"] == name:
            own.update(asdict(OwnFile(name, (out / name).stat().st_size, digest_file(out / name))))
    listing.write_text(json.dumps(loaded))


def other_keys(out: Path, name: str) -> None:
    with h5py.File(out / name, "r+") as file:
        file["keys"][0] += np.uint64(1)
    sign(out, name)


def other_vectors(out: Path, name: str) -> None:
    with h5py.File(out / name, "r+") as file:
        file["codes"][:] = np.roll(file["codes"][:], len(file["codes"]) // 2, axis=0)
    sign(out, name)


def other_starts(out: Path, name: str) -> None:
    with h5py.File(out / name, "r+") as file:
        file["starts"][-1] -= 1
    sign(out, name)


def fewer_lists(out: Path, name: str) -> None:
    with h5py.File(out / name, "r+") as file:
        starts = file["starts"][:]
        del file["starts"]
        file["starts"] = np.delete(starts, 1)
    sign(out, name)


def shorter(column: str, out: Path, name: str) -> None:
    with h5py.File(out / name, "r+") as file:
        values = file[column][:]
        del file[column]
        file[column] = values[:-1]
    sign(out, name)


def wider(column: str, out: Path, name: str) -> None:
    with h5py.File(out / name, "r+") as file:
        values = file[column][:]
        del file[column]
        file[column] = values.astype(f"{values.dtype.kind}{2 * values.itemsize}" if column != "keys" else "u4")
    sign(out, name)


def other_rows(out: Path, name: str) -> None:
    map_2n = np.load(out / name)
    map_2n[1, :2] = map_2n[1, 1::-1]
    np.save(out / name, map_2n)
    sign(out, name)


HARMS: dict[str, tuple[str, Callable[[Path, str], None]]] = {
    "missing lists": ("lists", lambda out, name: (out / name).unlink()),
    "truncated lists": ("lists", lambda out, name: os.truncate(out / name, 1000)),
    "flipped lists": ("lists", lambda out, name: flip(out / name)),
    "other keys": ("lists", other_keys),
    "other vectors": ("lists", other_vectors),
    "other starts": ("lists", other_starts),
    "fewer lists": ("lists", fewer_lists),
    **{f"shorter {column}": ("lists", partial(shorter, column)) for column in ("codes", "scales", "keys")},
    **{f"other type of {column}": ("lists", partial(wider, column)) for column in ("codes", "scales", "keys")},
    "shorter centroids": ("centroids", partial(shorter, "centroids")),
    "missing centroids": ("centroids", lambda out, name: (out / name).unlink()),
    "flipped centroids": ("centroids", lambda out, name: flip(out / name)),
    "missing map": ("map", lambda out, name: (out / name).unlink()),
    "flipped map": ("map", lambda out, name: flip(out / name)),
    "other rows": ("map", other_rows),
}


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("harm", HARMS)
def test_lists_out_of_step_are_named_and_repaired(tmp_path: Path, harm: str) -> None:
    pictures = some(250)
    run(tmp_path, pictures)
    assert not check(tmp_path).findings
    kind, damage = HARMS[harm]
    entry = content(tmp_path)["ann"]
    name = (entry["lists"][0]["file"] if kind == "lists" else entry[kind])["name"]
    damage(tmp_path, name)
    if harm not in ("other keys", "other vectors", "other rows"):  # which only a comparison can tell
        with pytest.raises(StoreDamaged, match="--exact answers without it"):
            Index.open(tmp_path)
    with Index.open(tmp_path, exact=True) as index:
        assert index.search(QUERIES[0], 9).rows.tolist() == best(tmp_path, QUERIES[0], 9)
    health = check(tmp_path)
    assert {finding.what for finding in health.findings} == {"ann out of step"}
    if harm != "shorter centroids":  # lists are one too many then: either of them may be wrong
        assert name in {finding.where for finding in health.findings}
    assert health.broken.republish
    with contextlib.closing(manifest.connect(tmp_path / "manifest.sqlite")) as db:
        drop_broken(tmp_path, db, health.broken)
    run(tmp_path, pictures)
    with contextlib.closing(manifest.connect(tmp_path / "manifest.sqlite")) as db:
        drop_generations(tmp_path, db, health.broken)
    assert not check(tmp_path).findings
    assert_lists_answer(tmp_path)


def repair(out: Path, health: Health, pictures: dict[str, bytes]) -> None:
    """As `pipeline.verify --repair` does it, once."""
    with contextlib.closing(manifest.connect(out / "manifest.sqlite")) as db:
        drop_broken(out, db, health.broken)
    run(out, pictures)
    with contextlib.closing(manifest.connect(out / "manifest.sqlite")) as db:
        drop_generations(out, db, health.broken)


@pytest.mark.usefixtures("lists")
def test_a_vector_that_is_made_again_has_new_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ann, "FILE_BYTES", 200 * DIM)
    wrong = {b"picture %d" % number for number in range(4)}
    with monkeypatch.context() as patched:
        patched.setattr("store_model.vector_of", lambda it, _=SPACE: vector_of(b"other " + it if it in wrong else it))
        for count in (250, 255, 260):
            run(tmp_path, some(count))
    before, keys = list_names(tmp_path), [key_of(content_hash(content)) for content in wrong]
    stale = {name for name in before if np.isin(keys, lists_of(tmp_path, name).keys).any()}
    assert not check(tmp_path).findings, "lists and vectors are in step: what is wrong is known from the pictures alone"
    health = check(tmp_path)
    health.broken.contents = {(content_hash(content), 1) for content in wrong}
    repair(tmp_path, health, some(260))
    assert not check(tmp_path).findings
    assert 0 < len(stale) < len(before)
    assert not stale & set(list_names(tmp_path))
    assert set(before) - stale <= set(list_names(tmp_path)), "other files are kept"
    assert_lists_answer(tmp_path)


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("apart", ["last bits", "another picture"])
def test_vectors_of_another_engine_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: str) -> None:
    monkeypatch.setattr(ann, "FILE_BYTES", 100_000 * DIM)
    pictures = some(300)
    run(tmp_path, pictures, chunk=30)
    run(tmp_path, some(270, start=30), chunk=30)  # a fold forgets 30 vectors; lists have their codes still

    def other(content: bytes, space: str = SPACE) -> npt.NDArray[np.float16]:
        if apart == "another picture":
            return vector_of(b"other " + content, space)
        vector = vector_of(content, space)
        vector.view(np.uint16)[0] ^= 1
        return vector

    monkeypatch.setattr("store_model.vector_of", other)
    run(tmp_path, pictures, chunk=30)
    findings = check(tmp_path).findings
    assert [finding.expected for finding in findings] == ["the codes of the index's vectors"] * (apart != "last bits")


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("harm", ["other vectors", "flipped lists"])
def test_a_repair_takes_no_lists_from_under_older_generations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setattr(ann, "FILE_BYTES", 100_000 * DIM)
    for count in (250, 255):
        run(tmp_path, some(count))
    show_generation(tmp_path, 1)  # by hand: no repair may take it away
    name = list_names(tmp_path)[0]
    HARMS[harm][1](tmp_path, name)
    if harm == "other vectors":
        for number in (1, 2):
            sign(tmp_path, name, number)
    health = check(tmp_path)
    assert {finding.where for finding in health.findings} == {name}
    with contextlib.closing(manifest.connect(tmp_path / "manifest.sqlite")) as db:
        drop_broken(tmp_path, db, health.broken)
    assert (tmp_path / name).exists()
    with Index.open(tmp_path) as index:  # while pictures are embedded again
        assert index.search(QUERIES[0], 9).rows.tolist() == best(tmp_path, QUERIES[0], 9)
    repair(tmp_path, health, some(255))
    assert not check(tmp_path).findings
    with Index.open(tmp_path) as index:
        assert (index.generation.number, index.generation.ann) == (1, None)
        assert index.search(QUERIES[0], 9).rows.tolist() == best(tmp_path, QUERIES[0], 9)
    show_generation(tmp_path, None)
    assert name not in list_names(tmp_path)
    assert_lists_answer(tmp_path)
    for count in (256, 257, 258):
        run(tmp_path, some(count))
    assert not (tmp_path / name).exists(), "it goes with the last generation that names it"


def kill_at_every_step(folder: Path) -> None:
    """As test_store_crash does, with lists: each run dies one step later than the one before it."""
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
        assert_lists_answer(out, 0.9)
        run(out, after)
        assert_lists_answer(out, 0.9)
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


def test_killed_at_every_step_lists_are_in_step(tmp_path: Path) -> None:
    in_fresh_process(kill_at_every_step, tmp_path)


@pytest.mark.usefixtures("lists")
def test_a_full_disk_is_told_and_leaves_the_last_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, some(60))

    def full(_: Path) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(list_files, "commit_file", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path, some(200))
    assert_lists_answer(tmp_path)
    assert content(tmp_path)["number"] == 1
    assert list((tmp_path / "ann").glob("*.tmp"))
    with Store.open(tmp_path, SPACE, DIM):
        assert {path.name for path in (tmp_path / "ann").iterdir()} == {"000001.h5", "000001-000001.h5"}
    run(tmp_path, some(200))
    assert_lists_answer(tmp_path)


def test_usearch_and_engines_live_in_one_process() -> None:
    code = "import pipeline.search.usearch_lib, onnxruntime; onnxruntime.SessionOptions(); print('both')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "both\n", f"exit code {done.returncode}: {done.stderr}"
