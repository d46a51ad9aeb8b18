"""What an index could not take in is never out of sight: the ledger, the way back, and a look that disturbs nobody."""

from __future__ import annotations

import json
import shlex
import shutil
import sqlite3
from pathlib import Path

import pytest
from pictures import noisy_jpeg, write_folder
from runs import Ran, index, run_module, vectors_by_key
from store_model import DIM, PHOTOS, SPACE, embed, item
from store_model import run as store_run

from pipeline.config import index_parser
from pipeline.status import printable, status
from pipeline.store import Outcome, Store, show_generation
from pipeline.store.ledger import PAGE_ROWS, quarantine_ledger, take_stock
from pipeline.writing import writer


def look(out: Path, *args: str) -> Ran:
    return run_module("pipeline.status", "--out", out, *args)


def test_the_ledger_and_the_way_back(tmp_path: Path, tiny_model: Path) -> None:
    """Bad files are named with reason, words and hash; tried again on demand; and heal by themselves when replaced."""
    photos, out = tmp_path / "photos", tmp_path / "index"
    paths = write_folder(photos, 8)
    (photos / "cut.jpg").write_bytes(noisy_jpeg(70)[:-900])
    (photos / "cut too.jpg").write_bytes(noisy_jpeg(71)[:-700])
    (photos / "empty.jpg").write_bytes(b"")
    ran = index(photos, out, "--model", tiny_model)
    assert ran.code == 0
    assert f"3 pictures are quarantined; what and why: python -m pipeline.status --out {out}" in ran.stderr

    files = sorted(out.rglob("*"))
    found = json.loads(look(out, "--json").stdout)
    assert sorted(out.rglob("*")) == files, "looking leaves nothing behind"
    (source,) = found["sources"]
    assert [source[state] for state in ("embedded", "pending", "quarantined", "deleted")] == [8, 0, 3, 0]
    assert {reason: told["count"] for reason, told in source["reasons"].items()} == {"truncated": 2, "empty": 1}
    assert (found["generation"]["rows"], found["generation"]["number"], found["running"]) == (8, 1, None)
    assert found["bytes"]["shards"] == sum(path.stat().st_size for path in (out / "shards").iterdir())
    (run,) = found["runs"]
    assert (run["exit"], run["embedded"], run["quarantined_new"]) == (0, 8, 3)
    ledger = [json.loads(line) for line in look(out, "--ledger").stdout.splitlines()]
    assert {(entry["key"], entry["reason"], entry["attempts"]) for entry in ledger} == {
        ("cut.jpg", "truncated", 1), ("cut too.jpg", "truncated", 1), ("empty.jpg", "empty", 1),
    }  # fmt: skip
    assert all(entry["words"] and len(entry["content_hash"]) == 32 and entry["first_seen"] for entry in ledger)
    table = look(out)
    assert (table.code, "truncated 2 of" in table.stdout) == (0, True), table.stderr

    # The command that it shows is one that works.
    words = shlex.split(source["reasons"]["truncated"]["retry"])
    assert words[:3] == ["python", "-m", "pipeline.index"]
    assert index_parser().parse_args(words[3:]).retry == "truncated"
    (photos / "cut too.jpg").write_bytes(noisy_jpeg(71))
    again = run_module("pipeline.index", *words[3:])
    assert again.code == 0, again.stderr
    assert [again.report[name] for name in ("embedded", "quarantined", "quarantined_new")] == [1, 2, 0]
    tried = {entry.key: entry.attempts for entry in quarantine_ledger(out)}
    assert tried == {"cut.jpg": 2, "empty.jpg": 1}, "the one was tried again, the other was not asked for"

    (photos / "cut.jpg").write_bytes(noisy_jpeg(70))
    (photos / "empty.jpg").write_bytes(paths[0].read_bytes())
    healed = index(photos, out, "--model", tiny_model)
    assert [healed.report[name] for name in ("embedded", "copied", "quarantined")] == [1, 1, 0]
    assert list(quarantine_ledger(out)) == []
    assert {"cut.jpg", "cut too.jpg", "empty.jpg"} <= vectors_by_key(out).keys()


def test_an_unknown_reason_is_exit_2_with_the_valid_ones(tmp_path: Path, tiny_model: Path) -> None:
    write_folder(tmp_path / "photos", 1)
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, "--retry", "truncated,blurry")
    assert ran.code == 2
    assert "'blurry'" in ran.report["error"]
    assert "truncated, corrupt" in ran.report["error"]


def test_what_is_tried_again_in_vain_is_no_news_and_no_generation(tmp_path: Path) -> None:
    pictures = {"good": b"g", "bad": b"bad bytes", "worse": b"bad and worse"}
    store_run(tmp_path, pictures)
    with Store.open(tmp_path, SPACE, DIM) as store:
        store.begin_run(PHOTOS)
        assert store.retry(["truncated"]) == 0
        assert store.retry(["corrupt", "timeout", "corrupt"]) == 2
        assert [entry.key for entry in store.pending(9)] == ["bad", "worse"]
        (committed,) = embed(store, pictures)
        assert (committed.quarantined, committed.quarantined_new) == (2, 0)
        assert store.publish({"tower": "test"}, {}) == 1
    assert {entry.attempts for entry in quarantine_ledger(tmp_path)} == {2}


def test_it_fits_every_width_and_says_what_readers_do_not_see_yet(tmp_path: Path) -> None:
    out = tmp_path / ("a long name " * 12)
    for number in range(2):
        store_run(out, {f"{name}": b"%d" % name for name in range(3 + number)})
    assert "is newer" not in look(out).stdout
    show_generation(out, 1)
    lines = look(out).stdout.splitlines()
    show_it = f"python -m pipeline.generations --out '{out}' --show newest"
    assert f"  generation 2 is newer, and not seen by readers; to show it: {show_it}" in lines
    assert "folder /photos: 4 embedded, 0 pending, 0 quarantined, 0 deleted" in lines


def test_a_look_while_a_run_writes_disturbs_nobody(tmp_path: Path) -> None:
    pictures = {f"{number}": b"%d" % number for number in range(20)}
    with Store.open(tmp_path, SPACE, DIM) as store:
        store.begin_run(PHOTOS)
        store.observe([item(key, content) for key, content in pictures.items()])
        embed(store, pictures)
        store.publish({"model": "test"}, {})
        store.begin_run(PHOTOS)
        store.observe([item("new", b"new")])
        store._db.execute("BEGIN IMMEDIATE")
        store._db.execute("UPDATE input SET status = 'deleted'")  # not committed yet
        found = status(tmp_path)
        assert found["running"] == writer(tmp_path) is not None
        assert [found["sources"][0][state] for state in ("embedded", "pending", "deleted")] == [20, 1, 0]
        assert [run["exit"] for run in found["runs"]] == [None, None], "these runs left no report"
        store._db.execute("ROLLBACK")
        # The state that a killed run leaves: its log is still there, and nobody holds the lock.
        killed = tmp_path.with_name("killed")
        shutil.copytree(tmp_path, killed, symlinks=True)
    assert take_stock(killed, examples=1, runs=1).sources[0].pending == 1
    assert writer(killed) is None
    assert writer(tmp_path) is None


def test_a_long_ledger_is_read_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = {f"{number:03}": b"bad %d" % number for number in range(25)}
    store_run(tmp_path, pictures)
    whole = [entry.key for entry in quarantine_ledger(tmp_path)]
    monkeypatch.setattr("pipeline.store.ledger.PAGE_ROWS", 4)
    assert [entry.key for entry in quarantine_ledger(tmp_path)] == whole == sorted(pictures)
    assert PAGE_ROWS > 4


def test_an_index_that_cannot_be_looked_at_says_why(tmp_path: Path) -> None:
    assert look(tmp_path / "nowhere").code == 2
    assert "python -m pipeline.index" in look(tmp_path / "nowhere").stderr
    (tmp_path / "manifest.sqlite").write_bytes(b"")  # all that the first run could write before its disk was full
    ran = look(tmp_path)
    assert (ran.code, "ended before it knew a picture" in ran.stderr) == (2, True), ran.stderr
    (tmp_path / "manifest.sqlite").unlink()
    store_run(tmp_path, {"a": b"a picture"})
    for content in (b"no database at all" * 100, None):
        (tmp_path / "manifest.sqlite").unlink()
        if content:
            (tmp_path / "manifest.sqlite").write_bytes(content)
        ran = look(tmp_path)
        assert (ran.code, "Traceback" in ran.stderr) == (1, False), ran.stderr
        assert "Restore manifest.sqlite from a backup" in ran.stderr
        assert "make one" not in ran.stderr, "an index of this folder would be refused"


def test_names_do_not_speak_to_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07[bold]evil[/bold]\u202egpj.exe"
    with Store.open(tmp_path, SPACE, DIM) as store:
        store.begin_run(PHOTOS)
        store.observe([item(evil, b"bad")])
        (entry,) = store.pending(1)
        store.commit_chunk(None, [Outcome(entry.id, "quarantined", b"h" * 16, "corrupt", words="a\x1b[2J\nb")])
    ran = look(tmp_path)
    assert ran.code == 0, ran.stderr
    assert not set(ran.stdout) & {"\x1b", "\x07", "\u202e"}
    assert "[bold]evil[/bold]" in ran.stdout
    assert printable("a\u202eb\n") == "a\\u202eb\\n"
    assert json.loads(look(tmp_path, "--ledger").stdout)["key"] == evil


def test_the_manifest_is_opened_read_only(tmp_path: Path) -> None:
    store_run(tmp_path, {"a": b"a"})

    def change(db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM input")

    from pipeline.store.ledger import _read

    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        _read(tmp_path, change)
    with Store.open(tmp_path, SPACE, DIM), pytest.raises(sqlite3.OperationalError, match="readonly"):
        _read(tmp_path, change)
