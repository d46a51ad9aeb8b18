"""A folder without a generation says what it is: nothing, a first run that goes on, one that ended too soon, damage."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from runs import run_module
from store_model import DIM, PHOTOS, SPACE, embed, item
from store_model import run as store_run

from pipeline.search import Index
from pipeline.store import NoIndex, Store

PICTURES = {f"{number}.jpg": b"bad" * (number == 3) + b"%d" % number for number in range(20)}


def why(path: Path | str) -> str:
    with pytest.raises(NoIndex) as caught:
        Index.open(path)
    return str(caught.value)


def test_a_first_run_that_goes_on_is_told_from_one_that_ended_too_soon(tmp_path: Path) -> None:
    out = tmp_path / "the index"
    with Store.open(out, SPACE, DIM) as store:
        words = why(out)
        assert f"no index in {out} yet: its first run goes on (process {os.getpid()}); ask again" in words
        store.begin_run(PHOTOS)
        assert re.search(r"goes on since \d{4}-\d\d-\d\d \d\d:\d\d \(process", why(out)), "it lists its source"
        store.observe([item(key, content) for key, content in PICTURES.items()])
        store.commit_chunk(None, [])
        assert ", 0 of 20 listed pictures are done (process" in why(out)
        embed(store, PICTURES)
        store.observe([item("late.jpg", b"late")])
        files = sorted(out.rglob("*"))
        words = why(out)
        assert ", 20 of 21 listed pictures are done (process" in words
        assert words.endswith(f"How far it is: python -m pipeline.status --out '{out}'")
        assert sorted(out.rglob("*")) == files, "looking leaves nothing behind"
        for module, args in (("pipeline.search", ["a bird"]), ("pipeline.serve", ["--port", "0"]),
                             ("pipeline.generations", [])):  # fmt: skip
            ran = run_module(module, *args, "--out", out)
            assert (ran.code, "20 of 21 listed pictures are done" in ran.stderr) == (2, True), ran.stderr
        ran = run_module("pipeline.report", "--out", out)
        assert (ran.code, "no run into" in ran.stderr, "make one" in ran.stderr) == (2, True, False), ran.stderr
    words = why(out)
    assert "has not published, and is not seen to go on; the same command goes on there" in words
    assert "make one" not in words


def test_nothing_and_damage_are_told_apart(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for path in (missing, str(missing)):
        assert f"no index in {missing}: expected the --out of a pipeline.index that has published" in why(path)
        assert f"it is no folder; make one: python -m pipeline.index --out {missing} ..." in why(path)
    missing.mkdir()
    assert "and it has none; make one" in why(missing)
    store_run(tmp_path / "index", {"a.jpg": b"a"})
    shutil.rmtree(tmp_path / "index/generations/1")
    words = why(tmp_path / "index")
    assert f"{tmp_path}/index/current is a link to generations/1, which is not there" in words
    assert words.endswith(f"run python -m pipeline.verify --repair --out {tmp_path}/index")


def test_a_first_run_whose_manifest_is_not_ours_to_read_is_told_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pipeline.writing.take_stock", refused)
    with Store.open(tmp_path / "index", SPACE, DIM):
        assert f"its first run goes on (process {os.getpid()})" in why(tmp_path / "index")
