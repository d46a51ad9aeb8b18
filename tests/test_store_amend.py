"""Promise: a generation made from the last one and what changed since is the one that the whole manifest would give."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from store_model import DIM, PHOTOS, SPACE, assert_shows, embed, item, run, some

from pipeline.batch import Item
from pipeline.store import Generation, Outcome, Scope, ShardInfo, Store, amend, content_hash, files, fold, table
from pipeline.store.check import Broken, Health, check_data
from pipeline.store.check_shown import check_generations
from pipeline.store.drop import drop_broken
from pipeline.store.manifest import bump_state, connect, forget_basis, transaction

BIRDS = Scope("folder", "/birds")
COLUMNS = ("id", "mark", "source", "size_bytes", "content_hash", "locator", "embeddings")
Picture: TypeAlias = tuple[bytes, dict[str, Any], bytes]  # content, metadata, place
OTHER = "space-b"
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a history is some hundred commits
NAMES = 12  # keys of each source: few, so that they come and go again


def everything(out: Path, number: int) -> tuple[dict[Any, Any], dict[str, Any]]:
    """All that a reader sees: (source, key) -> its row, and the columns of metadata."""
    path = out / f"generations/{number}/index.h5"
    with Generation.at(out, number, "digest") as generation, h5py.File(path, locking=False) as file:
        rows = np.arange(generation.rows)
        columns = [file[name][:].tolist() for name in COLUMNS]
        columns += [[repr(value) for value in dataset[:]] for dataset in file["metadata"].values()]
        columns += [[vector.tobytes() for vector in generation.vectors(rows)], generation.metadata(rows)]
        names = [
            (picture.source.root, key)
            for picture, key in zip(generation.pictures(rows), generation.keys(rows), strict=True)
        ]
        found = dict(zip(names, zip(*columns, strict=True), strict=True))
        kinds = {
            path: (dataset.attrs["name"], dataset.attrs["kind"], dataset.dtype.str, list(dataset.attrs["values"]))
            for path, dataset in file["metadata"].items()
        }
        assert len(found) == len(file["key"]) == generation.rows
        return found, kinds


def written_whole(out: Path) -> int:
    """The generation whose table the newest one goes back to."""
    newest = max((int(home.name) for home in (out / "generations").iterdir() if home.name.isdigit()), default=0)
    content = json.loads((out / f"generations/{newest}/generation.json").read_text())
    return int(content["table"]["number"])


def assert_same_as_whole(out: Path, number: int, space: str) -> None:
    with tempfile.TemporaryDirectory(prefix="twin", dir=out.parent) as folder:
        twin = Path(folder) / "index"
        shutil.copytree(out, twin, symlinks=True)
        with Store.open(twin, space, DIM) as store:
            with transaction(store._db):
                forget_basis(store._db)
                bump_state(store._db)
            whole = store.publish({}, {})
        assert whole is not None
        assert written_whole(twin) == whole
        assert everything(out, number) == everything(twin, whole)
    health = Health()
    with closing(sqlite3.connect(out / "manifest.sqlite")) as db:
        check_generations(out, db, check_data(out, db, health), health)
    assert not health.findings, health.findings


@contextmanager
def small_parts() -> Iterator[None]:
    """So small that every border is met; and no waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda _: None)
        patch.setattr(fold, "SEGMENT_ROWS", 16)
        patch.setattr(fold, "SMALL_MAX", 4)
        patch.setattr(table, "CHUNK_ROWS_MIN", 4)
        patch.setattr(table, "CHUNK_ROWS_MAX", 4)
        patch.setattr(table, "PIECE_ROWS", 5)
        patch.setattr(amend, "TOUCHED_SHARE_MAX", 1.0)
        patch.setattr(amend, "ID_PIECE", 3)
        yield


class World:
    """Two sources in one index, and what may happen to them between two generations."""

    def __init__(self, out: Path) -> None:
        self.out, self.space, self.published = out, SPACE, 0
        self.pictures: dict[str, dict[str, Picture]] = {PHOTOS.root: {}, BIRDS.root: {}}
        self.unreadable: set[str] = set()

    def change(self, what: str, scope: Scope, number: int) -> None:
        mine, key = self.pictures[scope.root], f"key {number % NAMES}"
        content, metadata, place = mine.get(key, (b"picture %d" % number, {}, b"at"))
        match what:
            case "add":
                mine[key] = content, metadata, place
            case "change":
                mine[key] = b"changed %d" % number, metadata, place
            case "bad" | "torn":
                mine[key] = b"%s %d" % (what.encode(), number), metadata, place
            case "twin":
                mine[key] = b"same %d" % (number % 3), metadata, place
            case "gone":
                mine.pop(key, None)
            case "rename":
                mine[f"key {(number + 5) % NAMES}"] = mine.pop(key, (content, metadata, place))
            case "whole number" | "fraction" | "word" | "label":
                value = {"whole number": number, "fraction": number / 7, "word": f"w{number}", "label": "l"}[what]
                mine[key] = content, {**metadata, what if what == "label" else f"f{number % 2}": value}, place
            case "no metadata":
                mine[key] = content, {}, place
            case "moved":
                mine[key] = content, metadata, b"at %d" % number
            case "unreadable":
                self.unreadable ^= {key}

    def night(self, scope: Scope, ends: str, drop: int) -> None:
        if ends == "dropped":
            self.drop(drop)
        with Store.open(self.out, self.space, DIM) as store:
            store.begin_run(scope)
            store.retry(["corrupt"])
            store.observe([self.item(key, *rest) for key, rest in self.pictures[scope.root].items()])
            if ends != "listing":
                store.finish_listing()
                self.embed(store, scope, 1 if ends == "budget" else 99)
            number = store.publish({}, {})
        if number is not None and number != self.published:
            assert_same_as_whole(self.out, number, self.space)
            self.published = number

    def item(self, key: str, content: bytes, metadata: dict[str, Any], place: bytes) -> Item:
        return replace(item(key, content, metadata=metadata), locator=place + key.encode())

    def embed(self, store: Store, scope: Scope, chunks: int) -> None:
        readable = {key: content for key, (content, _, _) in self.pictures[scope.root].items()}
        for _ in range(chunks):
            todo = store.pending(3)
            if not todo:
                return
            bad = [Outcome(one.id, "quarantined", None, "read_error") for one in todo if one.key in self.unreadable]
            if bad:
                store.commit_chunk(None, bad)
            else:
                embed(store, readable, self.space, chunk=3)

    def drop(self, number: int) -> None:
        """What `verify --repair` does to a vector that is broken."""
        if not (self.out / "manifest.sqlite").exists():
            return
        with closing(connect(self.out / "manifest.sqlite")) as db:
            rows = db.execute("SELECT shard, row FROM vector").fetchall()
            if rows:
                drop_broken(self.out, db, Broken(rows={rows[number % len(rows)]}))


CHANGES = (
    "add", "add", "add", "change", "bad", "torn", "twin", "gone", "rename", "whole number", "fraction", "word", "label",
    "no metadata", "moved", "unreadable",
)  # fmt: skip
scopes = st.sampled_from([PHOTOS, PHOTOS, BIRDS])
changes = st.lists(st.tuples(st.sampled_from(CHANGES), scopes, st.integers(0, 99)), max_size=9)
ends = st.sampled_from(["whole"] * 5 + ["budget", "budget", "listing", "listing", "dropped", "other model"])
nights = st.lists(st.tuples(changes, scopes, ends, st.integers(0, 99)), min_size=2, max_size=8)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(history=nights)
def test_any_history_gives_what_the_whole_manifest_gives(history: list[Any]) -> None:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder, small_parts():
        world = World(Path(folder) / "index")
        for what in ("add", "label", "twin"):  # something to begin with
            for number in range(4):
                world.change(what, (PHOTOS, BIRDS)[number % 2], 4 * len(what) + number)
        for scope in (PHOTOS, BIRDS):
            world.night(scope, "whole", 0)
        for happened, scope, end, number in history:
            for what, where, which in happened:
                world.change(what, where, which)
            if end == "other model":
                world.space = OTHER if world.space == SPACE else SPACE
            world.night(scope, end, number)


PLAIN = {f"key {number}": b"picture %d" % number for number in range(40)}
YEARS = {key: {"year": 2000 + number} for number, key in enumerate(PLAIN)}


@pytest.mark.parametrize(
    ("change", "amended"),
    [
        (lambda pictures, metadata: pictures.update(some(9)), True),
        (lambda pictures, metadata: [pictures.pop(key) for key in ("key 0", "key 17", "key 39")], True),
        (lambda pictures, metadata: pictures.update({"key 3": b"other", "key 20": b"picture 4"}), True),
        (lambda pictures, metadata: pictures.update({"renamed": pictures.pop("key 5")}), True),
        (lambda pictures, metadata: metadata.update({"key 7": {"year": 1}, "key 8": {"year": 1, "more": "x"}}), True),
        (lambda pictures, metadata: metadata.update({"key 7": {"year": "unknown"}}), False),
        (lambda pictures, metadata: metadata.pop("key 7"), False),  # whole numbers are floats where one is missing
        (lambda pictures, metadata: pictures.update({key: b"!" + key.encode() for key in list(pictures)[:30]}), False),
    ],
    ids=["added", "gone", "changed", "renamed", "relabelled", "wider column", "gap in a column", "most rows"],
)  # fmt: skip
def test_a_few_changes_do_not_rewrite_the_table(
    tmp_path: Path, change: Callable[[dict[str, bytes], dict[str, Any]], object], amended: bool
) -> None:
    out, pictures, metadata = tmp_path / "index", dict(PLAIN), dict(YEARS)
    run(out, pictures, metadata=metadata)
    change(pictures, metadata)
    for key in pictures.keys() - metadata.keys() if amended else ():
        metadata[key] = {"year": 1}
    assert run(out, pictures, metadata=metadata) == 2
    assert written_whole(out) == (1 if amended else 2)
    assert_same_as_whole(out, 2, SPACE)


def test_a_vector_that_comes_with_another_picture_shows_all_that_waited_for_it(tmp_path: Path) -> None:
    """Its vector was broken and dropped, its source is not indexed again, and another source has the same picture."""
    out = tmp_path / "index"
    run(out, {**PLAIN, "waits": b"shared"})
    with closing(connect(out / "manifest.sqlite")) as db:
        where = db.execute(
            "SELECT shard, row FROM vector WHERE content_hash = ?", (content_hash(b"shared"),)
        ).fetchone()
        drop_broken(out, db, Broken(rows={where}))
    birds = {"bird": b"bird"}
    run(out, birds, scope=BIRDS)
    assert_shows(out, {**PLAIN, **birds})
    birds["twin"] = b"shared"
    assert run(out, birds, scope=BIRDS) == 3
    assert written_whole(out) == 2
    assert_shows(out, {**PLAIN, **birds, "waits": b"shared"})
    assert_same_as_whole(out, 3, SPACE)


def test_a_table_full_of_what_is_gone_is_written_whole(tmp_path: Path) -> None:
    """Each night a fifth has another name: the old strings stay in the copied file, but not for ever."""
    out, pictures = tmp_path / "index", some(900)
    whole = []
    for night in range(1, 9):
        pictures = {(f"{night}{key}" if n % 5 == 0 else key): one for n, (key, one) in enumerate(pictures.items())}
        assert run(out, pictures) == night
        whole.append(written_whole(out))
    assert whole[1] == 1
    assert whole[-1] > 1
    assert_same_as_whole(out, 8, SPACE)


def test_nothing_is_taken_over_from_a_table_that_is_not_what_was_written(tmp_path: Path) -> None:
    out = tmp_path / "index"
    run(out, some(50))
    path = out / "generations/1/index.h5"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    assert run(out, some(51)) == 2
    assert written_whole(out) == 2
    assert_shows(out, some(51))


def test_an_index_of_the_first_schema_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "index"
    run(out, some(50))
    with closing(sqlite3.connect(out / "manifest.sqlite")) as db:
        db.executescript(
            "DROP TRIGGER input_touched; DROP TABLE touched; ALTER TABLE shard DROP COLUMN engine;"
            "DELETE FROM meta WHERE key = 'basis'; UPDATE meta SET value = 1 WHERE key = 'schema';"
        )
    assert run(out, some(60)) == 2
    assert run(out, some(61)) == 3
    assert written_whole(out) == 2
    assert_same_as_whole(out, 3, SPACE)


def test_files_say_which_engine_made_their_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, the manifest's part of generation.json, and a segment that was folded of several."""
    out, seen = tmp_path / "index", []
    for count, engine in ((10, "ort-cpu fp32 aa"), (20, "aoti-cpu int8 bb"), (30, "aoti-cpu int8 bb"), (40, "")):
        if count == 30:
            monkeypatch.setattr(fold, "SMALL_MAX", 2)
        number = run(out, some(count), engine=engine)
        content = json.loads((out / f"generations/{number}/generation.json").read_text())
        seen.append([file["engine"] for file in content["files"]])
        for file in content["files"]:
            with h5py.File(out / file["name"]) as stored:
                assert stored.attrs["engine"] == file["engine"]
    both = "aoti-cpu int8 bb, ort-cpu fp32 aa"
    assert seen == [["ort-cpu fp32 aa"], ["ort-cpu fp32 aa", "aoti-cpu int8 bb"], [both], [both, ""]]
    assert fold.engines_of([ShardInfo("", 0, 0, 0, "", 0, engine) for engine in (both, "")]) == f"{both}, unknown"
