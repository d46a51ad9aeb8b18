"""Damage is named, never read as zeros; what is not ours is left alone; what is not understood is refused."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import h5py
import numpy as np
import pytest
from store_model import DIM, PHOTOS, SPACE, item, run, shown_by_h5py, some

from pipeline.store import (
    Generation,
    Locked,
    Store,
    StoreDamaged,
    StoreError,
    fold,
)

REPO = Path(__file__).resolve().parents[1]


def test_a_second_writer_is_told(tmp_path: Path) -> None:
    with Store.open(tmp_path, SPACE, DIM):
        with pytest.raises(Locked, match="another run writes to"):
            Store.open(tmp_path, SPACE, DIM)
        code = (
            f"from pathlib import Path; from pipeline.store import Store; Store.open(Path({str(tmp_path)!r}), 's', 8)"
        )
        other = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
        assert "Locked: another run writes to" in other.stderr
    run(tmp_path, some(3))


@pytest.mark.parametrize("name", ["shards/000001-000002.h5", "generations/1/index.h5"])
@pytest.mark.parametrize("harm", ["removed", "shortened", "flipped"])
def test_a_damaged_file_is_named_and_never_read_as_zeros(tmp_path: Path, name: str, harm: str) -> None:
    run(tmp_path, some(60), chunk=20)
    path = tmp_path / name
    if harm == "removed":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content if harm == "flipped" else content[:-1])
    with pytest.raises(StoreDamaged, match=name) as told:
        Generation.open(tmp_path, check="digest" if harm == "flipped" else "size")
    assert told.value.path == path
    assert "python -m pipeline.verify --repair" in str(told.value)
    if harm == "removed" and name.startswith("shards"):  # what plain h5py gives is not a number, never zeros
        values = np.stack(list(shown_by_h5py(tmp_path / "index.h5").values()))
        assert np.isnan(values).all(axis=1).sum() == 20
        assert not np.isnan(values).any(axis=1)[[*range(20), *range(40, 60)]].any()


@pytest.mark.parametrize("harm", ["removed", "altered"])
def test_a_damaged_shard_stops_folding_and_keeps_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    run(tmp_path, some(60), chunk=20)
    path = tmp_path / "shards" / "000001-000002.h5"
    if harm == "removed":
        path.unlink()
    else:
        with h5py.File(path, "r+") as file:
            file["content_hash"][3] = 0
    monkeypatch.setattr(fold, "SMALL_MAX", 0)
    with pytest.raises(StoreDamaged, match="000001-000002"):
        run(tmp_path, some(61))
    assert os.readlink(tmp_path / "current") == "generations/1"
    with Store.open(tmp_path, SPACE, DIM):
        assert not list((tmp_path / "segments").iterdir())
        assert len(list((tmp_path / "shards").iterdir())) == (3 if harm == "removed" else 4)


def test_only_our_own_garbage_is_swept(tmp_path: Path) -> None:
    run(tmp_path, some(5))
    ours = [tmp_path / "shards" / "000009-000001.h5", tmp_path / "segments" / "00000044.h5.tmp"]
    theirs = [tmp_path / "shards" / "notes.txt", tmp_path / "my.h5", tmp_path / "shards" / "keep.h5"]
    for path in [*ours, *theirs]:
        path.write_bytes(b"x")
    (tmp_path / "generations" / "9.tmp").mkdir()
    run(tmp_path, some(5))
    assert [path.exists() for path in [*ours, *theirs]] == [False, False, True, True, True]
    assert sorted(path.name for path in (tmp_path / "generations").iterdir()) == ["1"]


def test_what_cannot_be_understood_is_refused(tmp_path: Path) -> None:
    run(tmp_path, some(5))
    db = sqlite3.connect(tmp_path / "manifest.sqlite")
    db.execute("UPDATE meta SET value = 99 WHERE key = 'schema'")
    db.commit()
    db.close()
    with pytest.raises(StoreError, match="schema 99, this version of nightjar reads 2"):
        Store.open(tmp_path, SPACE, DIM)
    (tmp_path / "manifest.sqlite").unlink()
    with pytest.raises(StoreDamaged, match=r"manifest.sqlite: expected the manifest of shards/000001-000001.h5"):
        Store.open(tmp_path, SPACE, DIM)
    assert list((tmp_path / "shards").iterdir()), "without a manifest nothing is swept"


def test_a_link_that_leads_to_no_generation_is_named(tmp_path: Path) -> None:
    run(tmp_path, some(5))
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("elsewhere")
    with pytest.raises(StoreError, match=r"'elsewhere', expected .*generations/<number>; .*verify --repair"):
        run(tmp_path, some(6))


def test_what_the_disk_refuses_the_manifest_is_said_with_its_name(tmp_path: Path) -> None:
    """Also to those who only know SQLite's own errors."""
    with Store.open(tmp_path, SPACE, DIM) as store:
        store.begin_run(PHOTOS)
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        items = [item(key, content) for key, content in some(2000).items()]
        with pytest.raises(sqlite3.OperationalError, match=r"manifest.sqlite: .*full.*make room, and run the same"):
            store.observe(items)
        store._db.execute("PRAGMA max_page_count = 1000000")
        store._db.execute("PRAGMA busy_timeout = 0")
        with closing(sqlite3.connect(tmp_path / "manifest.sqlite", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match=r"manifest.sqlite: database is locked .*another program holds it"):
                store.observe(items)
        assert store.observe(items).new == 2000
        with pytest.raises(sqlite3.OperationalError, match="no such table: nowhere") as raised:
            store._db.execute("SELECT * FROM nowhere")
        assert not isinstance(raised.value, StoreError), "a fault of ours keeps its name"
