"""The diff of a listing against the manifest: nothing is lost, computed twice, or deleted outside its scope."""

from __future__ import annotations

import dataclasses
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from store_model import (
    DIM,
    PHOTOS,
    SPACE,
    assert_shows,
    embed,
    item,
    run,
    some,
    vector_of,
)

from pipeline.batch import Item
from pipeline.store import (
    Generation,
    Outcome,
    Scope,
    Store,
    StoreDamaged,
    StoreError,
    content_hash,
    manifest,
    write_shard,
)


def test_observe_tells_new_changed_relabelled_and_unchanged(tmp_path: Path) -> None:
    pictures = {**some(10), "bad": b"bad bytes"}
    run(tmp_path, pictures)
    with Store.open(tmp_path, SPACE, DIM) as store:
        store.begin_run(PHOTOS)
        listed = [item(key, content) for key, content in pictures.items()]
        assert store.observe(listed) == (0, 0, 0, 11, 0)
        assert store.observe(listed[:2]).repeated == 2
        assert (store.finish_listing(), store.pending(99)) == (0, [])

        store.begin_run(PHOTOS)
        listed[0] = replace(listed[0], size_bytes=1)
        listed[1] = replace(listed[1], mtime_ns=1)
        listed[2] = replace(listed[2], etag="e")
        listed[3] = replace(listed[3], metadata={"licence": "cc0"})
        listed[4] = replace(listed[4], locator=b"moved")
        del listed[5]
        assert store.observe([*listed, item("new", b"n", mtime_ns=2**70), item("new", b"other")]) == (1, 3, 2, 5, 1)
        assert store.listing_preview() == (1, 11)
        assert store.finish_listing() == 1
        assert [entry.key for entry in store.pending(99)] == ["dir/00000.jpg", "dir/00001.jpg", "dir/00002.jpg", "new"]
        assert [entry.key for entry in store.pending(2, after_id=2)] == ["dir/00002.jpg", "new"]
        counts = store.counts()
        assert (counts.embedded, counts.pending, counts.quarantined, counts.deleted) == (6, 4, 1, 1)
        assert [row[:2] for row in counts.reasons["corrupt"].examples] == [("bad", "no such marker")]


def test_what_came_up_since_does_not_hide_what_is_gone(tmp_path: Path) -> None:
    """Other pictures in the place of ours: also in the night after, and when they had been there, and gone, before."""
    ours, others = some(10), some(42, start=100)
    run(tmp_path, others)
    run(tmp_path, ours)
    with Store.open(tmp_path, SPACE, DIM) as store:
        for _ in range(2):
            store.begin_run(PHOTOS)
            store.observe([item(key, content) for key, content in {**others, "new": b"new"}.items()])
            assert store.listing_preview() == (10, 10)
        store.begin_run(PHOTOS)  # and back: what came up meanwhile was never shown, so nobody has to be asked
        store.observe([item(key, content) for key, content in ours.items()])
        assert store.listing_preview() == (0, 10)
        assert store.finish_listing() == 43
        assert store.counts()[:2] == (10, 0)


def test_a_relabelled_picture_needs_no_vector(tmp_path: Path) -> None:
    run(tmp_path, some(20))
    assert run(tmp_path, some(20), metadata={"dir/00003.jpg": {"licence": "cc0"}}) == 2
    assert_shows(tmp_path, some(20))
    with Generation.open(tmp_path) as generation:
        labels = dict(zip(generation.keys(np.arange(20)), generation.metadata(np.arange(20)), strict=True))
    assert labels["dir/00003.jpg"] == {"licence": "cc0"}
    assert len(list((tmp_path / "shards").iterdir())) == 1


def test_renamed_and_repeated_pictures_are_not_computed_again(tmp_path: Path) -> None:
    pictures = {**some(30), "twin": b"picture 3", "third": b"picture 3", "torn": b"torn"}
    run(tmp_path, pictures)
    assert_shows(tmp_path, pictures)
    renamed = {f"elsewhere/{key}": content for key, content in pictures.items()}
    with Store.open(tmp_path, SPACE, DIM) as store:
        store.begin_run(PHOTOS)
        store.observe([item(key, content) for key, content in renamed.items()])
        assert store.finish_listing() == len(pictures)
        assert [done[:2] for done in embed(store, renamed)] == [(0, len(pictures))]
        store.publish({}, {})
    assert_shows(tmp_path, renamed)
    with Generation.open(tmp_path) as generation:  # the mark belongs to the content
        rows = np.arange(generation.rows)
        marked = [key for key, mark in zip(generation.keys(rows), generation.marks(rows), strict=True) if mark]
    assert marked == ["elsewhere/torn"]


def test_deletion_counts_only_inside_its_own_scope(tmp_path: Path) -> None:
    other, split = Scope("folder", "/other"), Scope("folder", "/photos", {"split": "val"})
    run(tmp_path, some(10))
    run(tmp_path, some(10, start=100), scope=other)
    run(tmp_path, some(10, start=200), scope=split)
    assert_shows(tmp_path, {**some(10), **some(10, start=100), **some(10, start=200)})
    run(tmp_path, {}, scope=other)
    assert_shows(tmp_path, {**some(10), **some(10, start=200)})
    run(tmp_path, some(10, start=100), scope=other)  # and back again
    assert_shows(tmp_path, {**some(10), **some(10, start=100), **some(10, start=200)})


@dataclass(frozen=True)
class Tar:
    uri: str
    size_bytes: int
    etag: str
    key_prefix: str


def test_an_unchanged_container_is_seen_without_its_items(tmp_path: Path) -> None:
    inside = {"a.tar/1": b"1", "a.tar/2": b"2"}
    rest = {"a.tar0": b"3", "b.tar/1": b"4"}
    tars = [Tar(f"/x/{name}", 9, "e1", f"{name}/") for name in ("a.tar", "b.tar")]
    pictures = {**inside, **rest}

    def night(tars: list[Tar], items: dict[str, bytes], finish: bool = True) -> None:
        with Store.open(tmp_path, SPACE, DIM) as store:
            store.begin_run(PHOTOS)
            assert not store.container_unchanged("/x/never.tar", 9, "e1")
            store.observe([item(key, content) for key, content in items.items()])
            for tar in tars:
                store.container_seen(tar)
            if finish:
                store.finish_listing()
                embed(store, pictures)
                store.publish({}, {})

    night(tars, pictures)
    with Store.open(tmp_path, SPACE, DIM) as store:
        store.begin_run(PHOTOS)
        assert store.container_unchanged("/x/a.tar", 9, "e1")
        assert not store.container_unchanged("/x/a.tar", 9, "e2")
    night(tars, {"a.tar0": b"3"})
    assert_shows(tmp_path, pictures)
    # The new a.tar lost a picture, and the run that saw it first is cut off before its listing ends.
    newer = [dataclasses.replace(tars[0], etag="e2"), tars[1]]
    night(newer, {"a.tar/1": b"1", "a.tar0": b"3"}, finish=False)
    with Store.open(tmp_path, SPACE, DIM) as store:
        store.begin_run(PHOTOS)
        assert not store.container_unchanged("/x/a.tar", 9, "e2")
    night(newer, {"a.tar/1": b"1", "a.tar0": b"3"})
    assert_shows(tmp_path, {"a.tar/1": b"1", **rest})
    # A container that went and came back is listed again: its pictures are gone from the manifest's point of view.
    night(newer[:1], {"a.tar0": b"3"})
    assert_shows(tmp_path, {"a.tar/1": b"1", "a.tar0": b"3"})
    with Store.open(tmp_path, SPACE, DIM) as store:
        store.begin_run(PHOTOS)
        assert not store.container_unchanged("/x/b.tar", 9, "e1")
        store.keep("")  # nothing could be listed: nothing is deleted
        assert store.finish_listing() == 0


def test_quarantine_is_remembered_and_heals(tmp_path: Path) -> None:
    pictures = {**some(3), "bad": b"bad bytes"}
    run(tmp_path, pictures)
    with Store.open(tmp_path, SPACE, DIM) as store:
        store.begin_run(PHOTOS)
        store.observe([item(key, content) for key, content in {**pictures, "dir/00001.jpg": b"changed"}.items()])
        store.finish_listing()
        (entry,) = store.pending(9)  # the bad one is known, and not read again
        unread = Outcome(entry.id, "quarantined", None, "read_error", words="what a decoder says \udcff\0")
        assert store.commit_chunk(None, [unread])[2:4] == (1, 1)
        assert store.publish({}, {}) == 1, "what readers see has not changed"
        assert_shows(tmp_path, pictures)  # the last readable version is still there
        store.begin_run(PHOTOS)
        assert [again.key for again in store.pending(9)] == [entry.key], "a read error is tried in every run"
        assert store.commit_chunk(None, [unread])[2:4] == (1, 0), "but it is new only once"
        store.observe([item("other", b"o")])
        embed(store, {"other": b"o"})
        assert store.publish({}, {}) == 2
    assert_shows(tmp_path, {**pictures, "other": b"o"})
    healed = {**pictures, "bad": b"good bytes", "dir/00001.jpg": b"changed"}
    run(tmp_path, healed)
    assert_shows(tmp_path, healed)
    run(tmp_path, {**healed, "dir/00002.jpg": b"bad now"})
    assert_shows(tmp_path, {**healed, "dir/00002.jpg": b"bad now"})


def test_a_chunk_must_match_its_shard(tmp_path: Path) -> None:
    with Store.open(tmp_path, SPACE, DIM) as store:
        store.begin_run(PHOTOS)
        store.observe([item("a", b"a"), item("b", b"b"), item("c", b"c")])
        first, second, third = store.pending(9)
        hashes = [content_hash(b"a"), content_hash(b"b")]
        vectors = np.stack([vector_of(b"a"), vector_of(b"b")])
        shard = write_shard(store.shard_path(), vectors, np.array([first.id, second.id]), hashes, {})
        done = [Outcome(first.id, "embedded", hashes[0]), Outcome(second.id, "embedded", hashes[1])]
        with pytest.raises(StoreDamaged, match="in row 0"):
            store.commit_chunk(shard, done[::-1])
        with pytest.raises(ValueError, match="2 rows, the chunk 1"):
            store.commit_chunk(shard, done[:1])
        assert len(store.pending(9)) == 3
        waiting = Outcome(third.id, "copied", content_hash(b"somewhere else"))
        assert store.commit_chunk(shard, [*done, waiting]) == (2, 0, 0, 0, 1)
        assert [entry.key for entry in store.pending(9)] == ["c"]
        assert store.has_vectors([*hashes, content_hash(b"c")]) == [True, True, False]
        # Deleted while it was being computed: its vector is kept, the input stays deleted.
        store.begin_run(PHOTOS)
        assert store.finish_listing() == 3
        late = write_shard(store.shard_path(), vectors[:1], np.array([third.id]), [content_hash(b"c")], {})
        assert store.commit_chunk(late, [Outcome(third.id, "embedded", content_hash(b"c"))]).embedded == 0
        assert store.counts().deleted == 3


@pytest.mark.parametrize("count", [1, manifest.INSERT_ROWS, 2 * manifest.INSERT_ROWS + 1])
def test_however_many_are_new_every_one_is_there_as_it_was_listed(tmp_path: Path, count: int) -> None:
    items = [
        Item(f"{number:04d}'\"%?", b"at \xff%d" % number, number, 7 * number, f"e{number}", {"n": number % 3})
        for number in range(count)
    ]
    with Store.open(tmp_path, SPACE, DIM) as store:
        run_number = store.begin_run(PHOTOS)
        assert store.observe(items) == (count, 0, 0, 0, 0)
        with closing(sqlite3.connect(tmp_path / "manifest.sqlite")) as db:
            rows = db.execute(
                "SELECT id, scope, key, locator, size, mtime_ns, etag, json, status, first_seen, last_seen "
                "FROM input JOIN metadata USING(meta_hash) ORDER BY id"
            ).fetchall()
        assert rows == [
            (number, 1, one.key, one.locator, one.size_bytes, one.mtime_ns, one.etag, f'{{"n":{one.metadata["n"]}}}',
             "pending", run_number, run_number)
            for number, one in enumerate(items, 1)
        ]  # fmt: skip
        assert [(one.id, one.key, one.locator, one.size_bytes) for one in store.pending(count + 1)] == [
            (row[0], *row[2:5]) for row in rows
        ]
        assert store.observe(items) == (0, 0, 0, 0, count), "listed twice"


def test_two_spaces_share_an_index(tmp_path: Path) -> None:
    pictures = {**some(40), "bad": b"bad"}
    run(tmp_path, pictures)
    with Store.open(tmp_path, "space-b", DIM) as store:
        store.begin_run(PHOTOS)
        assert store.observe([item(key, content) for key, content in pictures.items()]).unchanged == 41
        store.finish_listing()
        assert store.counts()[:3] == (0, 40, 1)
        embed(store, pictures, "space-b", chunk=30)
        assert_shows(tmp_path, pictures)  # still the first
    more = {**pictures, **some(5, start=100)}
    assert run(tmp_path, more) == 2
    assert_shows(tmp_path, more)
    assert run(tmp_path, more, space="space-b") == 3
    assert_shows(tmp_path, more, "space-b")
    # Changed while the first was in use: the second, which has a vector of the old bytes, must read it again too.
    more["dir/00000.jpg"] = b"changed"
    with Store.open(tmp_path, SPACE, DIM) as store:
        store.begin_run(PHOTOS)
        assert store.observe([item(key, content) for key, content in more.items()]).changed == 1
        store.begin_run(PHOTOS)
    run(tmp_path, more, space="space-b")
    assert_shows(tmp_path, more, "space-b")
    with pytest.raises(StoreError, match="8 components"):
        Store.open(tmp_path, SPACE, 16)
