"""The public contract of an index: what was written is what is read, by our reader and by any h5py user."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from store_model import (
    DIM,
    PHOTOS,
    SPACE,
    assert_shows,
    by_key,
    run,
    shown,
    shown_by_h5py,
    some,
    vector_of,
)

from pipeline.store import (
    Generation,
    NoIndex,
    Turn,
    content_hash,
    fold,
    map_embeddings,
    publish,
    table,
    write_shard,
)


def test_a_shard_is_one_plain_byte_range(tmp_path: Path) -> None:
    emb_nd = np.stack([vector_of(b"%d" % row) for row in range(300)])
    hashes = [content_hash(b"%d" % row) for row in range(300)]
    info = write_shard(tmp_path / "shards.h5", emb_nd, np.arange(7, 307), hashes, {"space": "s"})
    mapped = map_embeddings(tmp_path / "shards.h5", info, digest=True)
    assert np.array_equal(mapped, emb_nd)
    with h5py.File(tmp_path / "shards.h5") as file:
        for name, dtype in (("embeddings", "<f2"), ("id", "<i8"), ("content_hash", "u1")):
            assert (file[name].dtype, file[name].chunks, file[name].compression) == (np.dtype(dtype), None, None)
        assert np.array_equal(file["embeddings"], emb_nd)
        assert file["id"][[0, -1]].tolist() == [7, 306]
        assert file["content_hash"][5].tobytes() == hashes[5]
        assert file.attrs["space"] == "s"
    assert [path.name for path in tmp_path.iterdir()] == ["shards.h5"]


@pytest.mark.parametrize("fault", ["nan", "norm", "dtype", "hashes"])
def test_a_shard_refuses_what_breaks_the_contract_and_leaves_nothing(tmp_path: Path, fault: str) -> None:
    emb_nd = np.stack([vector_of(b"%d" % row) for row in range(4)])
    hashes = [bytes(16)] * (3 if fault == "hashes" else 4)
    if fault == "nan":
        emb_nd[2, 1] = np.nan
    elif fault == "norm":
        emb_nd[2] *= np.float16(1.1)
    wrong: Any = emb_nd.astype(np.float32) if fault == "dtype" else emb_nd
    with pytest.raises(ValueError, match=r"row 2 has norm|expected float16|3 hashes"):
        write_shard(tmp_path / "x.h5", wrong, np.arange(4), hashes, {})
    assert not list(tmp_path.iterdir())


def test_any_h5py_user_reads_the_index(tmp_path: Path) -> None:
    pictures = {**some(120), "new\nline": b"1", "emoji \U0001f426": b"2", "ä" * 127: b"3", "torn": b"torn"}
    metadata = {key: {"taxon": f"bird {n}", "year": n, "lat": n / 3} for n, key in enumerate(pictures)}
    del metadata["torn"]["year"], metadata["torn"]["taxon"]
    out = tmp_path / "birds-index"
    run(out, pictures, metadata=metadata, chunk=50)
    assert_shows(out, pictures)
    with h5py.File(out / "index.h5") as file:
        assert {"embeddings", "key", "id", "content_hash", "mark", "metadata"} <= set(file)
        np.testing.assert_allclose(np.linalg.norm(file["embeddings"][:].astype("f4"), axis=1), 1, atol=2e-3)
        keys = list(file["key"].asstr())
        for row, key in enumerate(keys):
            assert file["content_hash"][row].tobytes() == content_hash(pictures[key])
            assert file["mark"].asstr()[row] == ("damaged" if key == "torn" else "")
            assert file["metadata/taxon"].asstr()[row] == metadata[key].get("taxon", "")
            assert file["metadata/lat"][row] == metadata[key]["lat"]
        assert np.flatnonzero(np.isnan(file["metadata/year"])).tolist() == [keys.index("torn")]
    with Generation.open(out, check="digest") as generation:
        rows = np.array([keys.index(key) for key in ("torn", "emoji \U0001f426", "torn")])
        assert generation.keys(rows) == ["torn", "emoji \U0001f426", "torn"]
        assert generation.metadata(rows)[:2] == [{"lat": metadata["torn"]["lat"]}, metadata["emoji \U0001f426"]]
        assert generation.marks(rows) == ["damaged", "", "damaged"]
        assert generation.pictures(rows)[0] == (PHOTOS, b"at:torn", 4)
        assert (generation.space, generation.dim, generation.spec) == (SPACE, DIM, {"tower": "test"})


def test_the_index_can_be_moved_and_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = some(60)
    run(tmp_path / "a" / "b" / "index", pictures)
    # Shards of another index where a relative path could lead to by mistake.
    run(tmp_path / "decoy", {key: content + b"!" for key, content in pictures.items()})
    shutil.copytree(tmp_path / "decoy" / "shards", tmp_path / "a" / "shards")
    shutil.copytree(tmp_path / "decoy" / "shards", tmp_path / "a" / "b" / "shards")
    monkeypatch.chdir(tmp_path / "decoy" / "generations" / "1")
    want = {key: vector_of(content) for key, content in pictures.items()}
    moved = tmp_path / "a" / "b" / "moved"
    for out in (tmp_path / "a" / "b" / "index", moved):
        if out == moved:
            (tmp_path / "a" / "b" / "index").rename(moved)
        for path in (out / "index.h5", out / "current" / "index.h5", out / "generations" / "1" / "index.h5"):
            got = shown_by_h5py(path)
            assert all(np.array_equal(got[key], want[key]) for key in want)
        assert_shows(out, pictures)


def test_metadata_of_any_kind_is_stored(tmp_path: Path) -> None:
    odd: dict[str, Any] = {
        "a/b": 1, "": "empty", ".": 2, "nul\0": "x\0y", "lone": "\ud800", "big": 2**70, "nan": float("nan"),
        "mixed": 3, "flag": True, "%2F": "ä", "line": "a\nb",
    }  # fmt: skip
    run(tmp_path, some(2), metadata={"dir/00000.jpg": odd, "dir/00001.jpg": {"mixed": "text", "a/b": -(2**63)}})
    with Generation.open(tmp_path) as generation:
        got = dict(zip(generation.keys(np.arange(2)), generation.metadata(np.arange(2)), strict=True))
    assert got["dir/00001.jpg"] == {"mixed": "text", "a/b": -(2**63)}
    assert got["dir/00000.jpg"] == {
        "a/b": 1, "": "empty", ".": 2, "nul\ufffd": "x\ufffdy", "lone": "\ufffd", "big": str(2**70),
        "mixed": "3", "flag": 1, "%2F": "ä", "line": "a\nb",
    }  # fmt: skip


def test_records_that_name_their_fields_at_random_do_not_make_a_column_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(table, "COLUMNS_MAX", 4)
    monkeypatch.setattr(table, "NAMES_MAX", 20)
    metadata = {key: {"taxon": "bird", f"field {number}": number} for number, key in enumerate(some(30))}
    for night in (1, 2):
        caplog.clear()
        assert run(tmp_path, some(29 + night), metadata=metadata) == night
        assert "more than 4 names; index.h5 has the 4 most frequent as columns" in caplog.text
        with Generation.open(tmp_path) as generation, h5py.File(tmp_path / "index.h5", locking=False) as file:
            assert len(file["metadata"]) == 4
            assert all(values["taxon"] == "bird" for values in generation.metadata(np.arange(30)))
            assert file["metadata"].attrs["left_out"] > 4


def test_publishing_is_idempotent_and_keeps_three(tmp_path: Path) -> None:
    assert (run(tmp_path, some(10)), run(tmp_path, some(10))) == (1, 1)
    assert [run(tmp_path, some(count)) for count in (11, 12, 13)] == [2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "generations").iterdir()) == ["2", "3", "4"]
    assert os.readlink(tmp_path / "current") == "generations/4"
    assert os.readlink(tmp_path / "index.h5") == "current/index.h5"
    assert run(tmp_path, {}) == 5
    assert_shows(tmp_path, {})


def test_folding_drops_dead_rows_and_bounds_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "SEGMENT_ROWS", 100)
    monkeypatch.setattr(fold, "PIECE_ROWS", 3)
    pictures = {**some(400), "twin": b"picture 7", "last": b"picture 399"}
    run(tmp_path, pictures, chunk=5)
    assert_shows(tmp_path, pictures)
    assert not list((tmp_path / "shards").iterdir())
    assert len(list((tmp_path / "segments").iterdir())) == 4
    thinned = {key: content for n, (key, content) in enumerate(pictures.items()) if n >= 110 or n % 3 == 0}
    run(tmp_path, thinned)
    assert_shows(tmp_path, thinned)
    with Generation.open(tmp_path) as generation:
        sizes = [(len(block.emb_nd), block.live) for block in generation.blocks()]
    assert sum(size for size, _ in sizes) < 400
    assert all(live >= 0.75 * size for size, live in sizes)


def test_a_budget_that_is_spent_puts_folding_off_while_a_generation_can_name_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold, "SEGMENT_ROWS", 100)
    monkeypatch.setattr(publish, "FILES_MAX", 60)
    spent = Turn(lambda: True)
    pictures = some(200)
    run(tmp_path, pictures, chunk=5, turn=spent)
    assert_shows(tmp_path, pictures)
    assert len(list((tmp_path / "shards").iterdir())) == 40, "more than are small, fewer than a generation may name"
    pictures |= {f"more-{key}": b"more " + content for key, content in some(100).items()}
    run(tmp_path, pictures, chunk=5, turn=spent)
    assert_shows(tmp_path, pictures)
    with Generation.open(tmp_path) as generation:
        assert len(list(generation.blocks())) < 60
    run(tmp_path, pictures | {"one-more": b"one more"}, chunk=5)
    with Generation.open(tmp_path) as generation:
        assert len(list(generation.blocks())) <= 4


def test_scattered_deletions_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = some(2000)
    run(tmp_path, pictures, chunk=1000)
    holes = {key: content for n, (key, content) in enumerate(pictures.items()) if n % 5 or n >= 1000}
    run(tmp_path, holes)  # 200 stretches of live rows in the first file: more than one mapping
    assert_shows(tmp_path, holes)
    monkeypatch.setattr(fold, "RUNS_MAX", 100)
    holes.popitem()
    run(tmp_path, holes)
    assert_shows(tmp_path, holes)
    with Generation.open(tmp_path) as generation:
        assert sum(len(block.runs) for block in generation.blocks()) == 2


def test_a_reader_keeps_its_generation_through_folding_and_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = some(100)
    run(tmp_path, pictures, chunk=20)
    with Generation.open(tmp_path) as generation:
        monkeypatch.setattr(fold, "SMALL_MAX", 0)
        for count in (60, 50, 40, 30):
            run(tmp_path, some(count), chunk=20)
        assert not (tmp_path / "generations" / "1").exists()
        assert not list((tmp_path / "shards").iterdir())
        assert len(list((tmp_path / "segments").iterdir())) <= 4
        old = by_key(generation)
    assert old.keys() == pictures.keys()
    assert all(np.array_equal(old[key], vector_of(content)) for key, content in pictures.items())
    assert shown(tmp_path).keys() == some(30).keys()


def test_any_history_ends_in_the_right_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "SEGMENT_ROWS", 40)
    monkeypatch.setattr(fold, "SMALL_MAX", 3)
    rng = np.random.default_rng(0)
    pictures: dict[str, bytes] = {}
    for _ in range(25):
        for _ in range(int(rng.integers(1, 40))):
            what, key = rng.integers(5), f"key {rng.integers(120)}"
            if what == 0:
                pictures.pop(key, None)
            elif what == 1 and pictures:
                pictures[key] = pictures.pop(list(pictures)[int(rng.integers(len(pictures)))])
            else:
                pictures[key] = b"%s %d" % (b"bad" if rng.random() < 0.1 else b"good", rng.integers(150))
        run(tmp_path, pictures, chunk=int(rng.integers(1, 20)))
        assert_shows(tmp_path, pictures)


def test_no_index_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NoIndex, match=r"python -m pipeline.index --out"):
        Generation.open(tmp_path)
