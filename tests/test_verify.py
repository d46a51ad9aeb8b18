"""`pipeline.verify` names every kind of damage, finds none where there is none, and repairs exactly what is broken."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from pictures import noisy_jpeg, write_folder
from runs import index, run_module, vectors_by_key

from pipeline.store import Generation
from pipeline.store.check import Finding, Health
from pipeline.store.files import digest_file
from pipeline.verify.command import DAMAGED, DONE, LOCKED, USAGE, Verdict, main, show
from pipeline.verify.config import parse

ROWS = 24


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nights of twelve, and a copy: two shards, and a vector that two keys show."""
    return tmp_path_factory.mktemp("photos") / "photos"


@pytest.fixture(scope="module")
def sound(photos: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    out = tmp_path_factory.mktemp("sound") / "index"
    for night in range(2):
        write_folder(photos / f"night {night}", ROWS // 2, first_seed=100 * night)
        if night:
            shutil.copyfile(photos / "night 0" / "even" / "00000.jpg", photos / "copy.jpg")
        ran = index(photos, out, "--model", tiny_model)
        assert ran.code == 0, ran.stderr
    return out


@pytest.fixture
def out(sound: Path, tmp_path: Path) -> Path:
    """A copy to be damaged. Both stand two folders deep, so links stay right."""
    shutil.copytree(sound, tmp_path / "index", symlinks=True)
    return tmp_path / "index"


def verify(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict[str, Any]]:
    code = main([*map(str, args), "--json"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert report["exit"] == code
    return code, report


def whats(report: dict[str, Any]) -> set[str]:
    return {finding["what"] for finding in report["findings"]}


def shards(out: Path) -> list[Path]:
    return sorted((out / "shards").glob("*.h5"))


def sql(out: Path, statement: str, *args: object) -> None:
    db = sqlite3.connect(out / "manifest.sqlite")
    assert db.execute(statement, args).rowcount, "the test changed nothing"
    db.commit()
    db.close()


def sign(out: Path, path: Path) -> None:
    """Whoever damages a file may know how to fix its digest: in the manifest and in every generation."""
    name, digest, size = str(path.relative_to(out)), digest_file(path), path.stat().st_size
    if path.name != "index.h5":
        sql(out, "UPDATE shard SET digest = ?, bytes = ? WHERE name = ?", digest, size, name)
    for listing in out.glob("generations/*/generation.json"):
        content = json.loads(listing.read_text())
        for entry in [*content["files"], content["index"]]:
            if entry["name"] == name:
                entry.update(digest=digest, bytes=size)
        listing.write_text(json.dumps(content))


def edit(path: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def swap(file: h5py.File, *names: str) -> None:
    for name in names:
        file[name][[1, 2]] = file[name][[1, 2]][::-1]


def flip(out: Path) -> None:
    content = bytearray(shards(out)[0].read_bytes())
    content[-200] ^= 1
    shards(out)[0].write_bytes(content)


def truncate(out: Path) -> None:
    os.truncate(shards(out)[0], shards(out)[0].stat().st_size - 1)


def scale(out: Path) -> None:
    def change(file: h5py.File) -> None:
        file["embeddings"][3] *= np.float16(1.01)

    edit(shards(out)[0], change)
    sign(out, shards(out)[0])


def not_a_number(out: Path) -> None:
    def change(file: h5py.File) -> None:
        file["embeddings"][3, 0] = np.nan

    edit(shards(out)[0], change)
    sign(out, shards(out)[0])


def swap_hashes(out: Path) -> None:
    edit(shards(out)[0], lambda file: swap(file, "content_hash"))
    sign(out, shards(out)[0])


def repeat_id(out: Path) -> None:
    def change(file: h5py.File) -> None:
        file["id"][4] = file["id"][3]

    edit(shards(out)[0], change)
    sign(out, shards(out)[0])


def unknown_id(out: Path) -> None:
    def change(file: h5py.File) -> None:
        file["id"][4] = 10**6

    edit(shards(out)[0], change)
    sign(out, shards(out)[0])


def other_space(out: Path) -> None:
    edit(shards(out)[0], lambda file: file.attrs.update(space="another-model"))
    sign(out, shards(out)[0])


def move_key(out: Path) -> None:
    table = next(iter((out / "current").resolve().glob("index.h5")))

    def change(file: h5py.File) -> None:
        file["key"][0] = "somebody/else.jpg"

    edit(table, change)
    sign(out, table)


def swap_rows_of_index(out: Path) -> None:
    table = next(iter((out / "current").resolve().glob("index.h5")))
    edit(table, lambda file: swap(file, "id", "key", "content_hash"))
    sign(out, table)


def other_copy(out: Path) -> None:
    table = (out / "index.h5").resolve()

    def change(file: h5py.File) -> None:
        file["repeated"][0] = file["repeated"][0][::-1]

    edit(table, change)
    sign(out, table)


def other_spec(out: Path) -> None:
    listing = (out / "current" / "generation.json").resolve()
    content = json.loads(listing.read_text())
    content["spec"]["weights_digest"] = "0" * 64
    listing.write_text(json.dumps(content))


def point_elsewhere(out: Path) -> None:
    (out / "current").unlink()
    (out / "current").symlink_to("generations/77")


# harm, what is found, where, how many pictures a repair embeds again
HARMS: dict[str, tuple[Callable[[Path], object], set[str], str, int]] = {
    "bit flipped": (flip, {"damaged file"}, "shards/", 12),
    "truncated": (truncate, {"truncated file"}, "shards/", 12),
    "removed": (lambda out: shards(out)[0].unlink(), {"missing file"}, "shards/", 12),
    "vector scaled": (scale, {"norm"}, "shards/", 1),
    "not a number": (not_a_number, {"norm"}, "shards/", 1),
    "hashes swapped": (swap_hashes, {"manifest row without shard row", "index out of step"}, "shards/", 2),
    "id twice": (repeat_id, {"duplicate id"}, "shards/", 1),
    "id of nobody": (unknown_id, {"shard row without manifest row"}, "shards/", 1),
    "another model's": (other_space, {"wrong space"}, "shards/", 12),
    "manifest lost a row": (
        lambda out: sql(out, "DELETE FROM vector WHERE shard = 1 AND row = 3"),
        {"shard row without manifest row", "index out of step"}, "manifest.sqlite", 1,
    ),
    "manifest points at nothing": (
        lambda out: sql(out, "UPDATE vector SET row = 99 WHERE shard = 1 AND row = 3"),
        {"manifest row without shard row"}, "manifest.sqlite", 1,
    ),
    "two contents in a row": (
        lambda out: sql(out, "UPDATE vector SET row = 4 WHERE shard = 1 AND row = 3"),
        {"manifest row without shard row"}, "manifest.sqlite", 2,
    ),
    "input of unknown content": (
        lambda out: sql(out, "UPDATE input SET content_hash = zeroblob(16) WHERE id = 5"),
        {"input without vector", "index out of step"}, "manifest.sqlite", 0,
    ),
    "key moved": (move_key, {"index out of step"}, "index.h5", 0),
    "rows of index.h5 swapped": (swap_rows_of_index, {"index out of step"}, "index.h5", 0),
    "vector of a copy": (other_copy, {"index out of step"}, "index.h5", 0),
    "index.h5 removed": (
        lambda out: (out / "current").resolve().joinpath("index.h5").unlink(), {"missing file"}, "index.h5", 0,
    ),
    "generation.json removed": (
        lambda out: (out / "current").resolve().joinpath("generation.json").unlink(), {"generation"}, "json", 0,
    ),
    "another spec": (other_spec, {"wrong space"}, "generation.json", 0),
    "old index.h5 removed": (
        lambda out: (out / "generations" / "1" / "index.h5").unlink(), {"missing file"}, "generations/1/", 0,
    ),
    "current elsewhere": (point_elsewhere, {"wrong link"}, "current", 0),
    "index.h5 is no link": (lambda out: (out / "index.h5").unlink(), {"wrong link"}, "index.h5", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMS)
def test_damage_is_named_and_repaired(
    name: str, out: Path, sound: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, what, where, embedded = HARMS[name]
    assert verify(capsys, "--out", out)[0] == DONE
    harm(out)
    code, report = verify(capsys, "--out", out)
    assert code == DAMAGED
    assert what <= whats(report), report["findings"]
    assert any(where in finding["where"] for finding in report["findings"]), report["findings"]
    assert all(all(finding.values()) for finding in report["findings"]), "every finding says all it has to say"
    code, report = verify(capsys, "--repair", "--out", out)
    assert (code, report["findings"]) == (DONE, [])
    assert report["embedded"] == embedded
    assert vectors_by_key(out) == vectors_by_key(sound)
    assert verify(capsys, "sample", "--rows", 99, "--out", out)[0] == DONE


HARMS_UNSEEN: dict[str, tuple[Callable[[Path], object], int]] = {  # harm, exit code of an index with nothing to do
    "generation.json garbage": (lambda out: (out / "current/generation.json").write_text("garbage"), DONE),
    "index.h5 cut": (lambda out: os.truncate((out / "index.h5").resolve(), 1000), DAMAGED),
    "shard removed": (lambda out: shards(out)[0].unlink(), DAMAGED),
    "current removed": (lambda out: (out / "current").unlink(), DONE),
}


@pytest.mark.parametrize("name", HARMS_UNSEEN)
def test_a_run_with_nothing_to_do_is_done_only_if_readers_can_open_what_they_see(
    name: str, out: Path, sound: Path, photos: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, expected = HARMS_UNSEEN[name]
    harm(out)
    ran = index(photos, out, "--model", tiny_model)
    assert ran.code == expected, ran.stderr
    if expected == DAMAGED:
        assert f"readers cannot open what they see: {out}" in ran.report["error"]
        assert ran.report["error"].endswith(f"Run: python -m pipeline.verify --repair --out {out}")
        assert json.loads((out / "runs/3.json").read_text())["exit"] == DAMAGED
        asked = run_module("pipeline.search", "a bird", "--out", out)
        assert (asked.code, "python -m pipeline.verify --repair" in asked.stderr) == (1, True), asked.stderr
        assert verify(capsys, "--repair", "--out", out)[0] == DONE
    Generation.open(out, "digest").close()
    assert vectors_by_key(out) == vectors_by_key(sound)


def test_a_vector_that_is_not_its_pictures_is_found_by_embedding_again(
    out: Path, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two vectors change places and every digest is put right: only the pictures can tell."""
    edit(shards(out)[0], lambda file: swap(file, "embeddings"))
    sign(out, shards(out)[0])
    assert verify(capsys, "quick", "--out", out)[0] == DONE
    code, report = verify(capsys, "full", "--out", out)
    assert code == DAMAGED
    assert len([finding for finding in report["findings"] if finding["what"] == "vector"]) == 2
    assert report["sample"]["rows"] == ROWS + 1
    assert report["sample"]["same_bits"] == ROWS - 1
    code, report = verify(capsys, "full", "--repair", "--out", out)
    assert (code, report["embedded"]) == (DONE, 2)
    assert vectors_by_key(out) == vectors_by_key(sound)


def test_a_sample_of_a_sound_index_has_the_same_bits(
    out: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("pipeline.progress.LinePace.due", lambda _: True)
    code, report = verify(capsys, "sample", "--rows", 10, "--seed", 3, "--out", out)
    sample = report["sample"]
    assert (code, sample["rows"], sample["compared"], sample["same_bits"]) == (DONE, 10, 10, 10)
    assert "embedded again: 10 of 10 rows" in caplog.messages


def test_pictures_that_changed_since_are_no_damage(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_folder(tmp_path / "photos", 6)
    index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model)
    paths[0].write_bytes(noisy_jpeg(77))
    paths[1].unlink()
    code, report = verify(capsys, "full", "--out", tmp_path / "index")
    sample = report["sample"]
    assert (code, sample["changed"], sample["unreadable"], sample["compared"]) == (DONE, 1, 1, 4)
    for path in paths[2:4]:
        path.unlink()
    code, report = verify(capsys, "full", "--out", tmp_path / "index")
    assert (code, report["findings"]) == (USAGE, []), "what could not be checked is neither damaged nor right"
    assert "2 of 6 pictures could be compared, 1 have changed, 3 cannot be read" in report["unchecked"]
    ran = run_module("pipeline.verify", "full", "--out", tmp_path / "index")
    told = [words in ran.stdout for words in ("nothing is wrong", "too little could be checked")]
    assert (ran.code, told) == (USAGE, [False, True])


def test_a_source_that_is_away_takes_out_its_own_pictures_alone(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in {"a": 6, "b": 3}.items():
        write_folder(tmp_path / name, count, first_seed=10 * count)
        index(tmp_path / name, tmp_path / "index", "--model", tiny_model)
    for away, code, rows in (("b", DONE, 6), ("a", USAGE, 0)):
        shutil.move(tmp_path / away, tmp_path / f"{away} away")
        for level in ("sample", "full"):
            found, report = verify(capsys, level, "--out", tmp_path / "index")
            sample = report["sample"]
            assert (found, sample["compared"], sample["away"]) == (code, rows, 9 - rows), report
    assert "0 of 0 pictures could be compared" in report["unchecked"]


def test_what_nobody_has_seen_yet_is_embedded_again_too(
    out: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An index that was never published."""
    for path in ("current", "index.h5"):
        (out / path).unlink()
    sql(out, "DELETE FROM generation")
    code, report = verify(capsys, "full", "--out", out)
    assert (code, report["generation"], report["sample"]["compared"]) == (DONE, None, ROWS + 1), report
    edit(shards(out)[1], lambda file: swap(file, "embeddings"))
    sign(out, shards(out)[1])
    code, report = verify(capsys, "full", "--model", tiny_model, "--out", out)
    assert (code, report["sample"]["off"]) == (DAMAGED, 2)
    assert "shards/000002-000001.h5, row " in report["findings"][0]["where"]
    assert "full --repair" in report["findings"][0]["remedy"]


def test_a_run_is_neither_judged_nor_kept_out(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (out / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for args in ((), ("--repair",)):
            code, report = verify(capsys, *args, "--out", out)
            assert code == LOCKED
            assert "run writes to" in report["error"]
    with (out / "lock").open("rb") as lock:  # nothing is left of a verification
        assert verify(capsys, "--out", out)[0] == DONE
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_run_that_begins_meanwhile_spoils_the_verdict(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.verify import command as module

    check_data = module.check_data

    def with_a_run(*args: Any) -> Any:
        sql(out, "INSERT INTO run(scope, space, started_s) VALUES (1, 1, 0)")
        return check_data(*args)

    monkeypatch.setattr(module, "check_data", with_a_run)
    code, report = verify(capsys, "--out", out)
    assert code == LOCKED
    assert "a run began" in report["error"]


def test_an_index_that_is_behind_is_not_damaged(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run was killed after it had committed, or between writing a generation and showing it."""
    sql(out, "UPDATE meta SET value = value + 1 WHERE key = 'state'")
    code, report = verify(capsys, "--out", out)
    assert code == DONE
    assert "older than the manifest" in report["behind"]
    sql(out, "UPDATE meta SET value = value - 1 WHERE key = 'state'")
    number = int(os.readlink(out / "current").rpartition("/")[2])
    (out / "current").unlink()
    (out / "current").symlink_to(f"generations/{number - 1}")
    code, report = verify(capsys, "--out", out)
    assert code == DONE
    assert f"generation {number} is written" in report["behind"]


def test_a_damaged_manifest_is_named(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((out / "manifest.sqlite").read_bytes())
    content[4096 : 4 * 4096] = bytes(3 * 4096)
    (out / "manifest.sqlite").write_bytes(content)
    code, report = verify(capsys, "--out", out)
    assert (code, whats(report)) == (DAMAGED, {"manifest"})
    for content in (b"no database at all" * 100, None):
        (out / "manifest.sqlite").unlink()
        if content:
            (out / "manifest.sqlite").write_bytes(content)
        for args in ((), ("--repair",)):
            code, report = verify(capsys, *args, "--out", out)
            assert (code, whats(report)) == (DAMAGED, {"manifest"}), report
            assert str(out) not in report["findings"][0]["found"], "one message, not one inside another"
            assert "Restore manifest.sqlite from a backup" in report["findings"][0]["remedy"]


def test_a_manifest_of_another_version_is_refused_with_what_helps(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for schema, words in ((1, "any run of pipeline.index or pipeline.nightly into this index brings it up to date"),
                          (99, "use the version that wrote it")):  # fmt: skip
        with closing(sqlite3.connect(out / "manifest.sqlite")) as db, db:
            db.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (schema,))
        code, report = verify(capsys, "--out", out)
        assert (code, words in report["error"]) == (1, True), report


@pytest.mark.parametrize("module", ["pipeline.verify", "pipeline.report"])
def test_a_reader_that_leaves_early_is_no_error(module: str, out: Path) -> None:
    """As `| head -c 80` does."""
    unread, stdout = os.pipe()
    os.close(unread)
    command = [sys.executable, "-m", module, "--out", str(out)]
    ran = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    os.close(stdout)
    assert (ran.returncode, "rror" in ran.stderr) == (DONE, False), ran.stderr


def test_for_people_and_for_wrong_usage(out: Path, tmp_path: Path) -> None:
    assert "example" in run_module("pipeline.verify", "--help").stdout
    ran = run_module("pipeline.verify", "--out", out)
    assert (ran.code, ran.stdout.splitlines()[-1]) == (0, "nothing is wrong")
    shards(out)[0].unlink()
    ran = run_module("pipeline.verify", "--out", out)
    assert ran.code == 7
    rows = [line.split("\t") for line in ran.stdout.splitlines()]
    (found,) = [row for row in rows if row[0] == "missing file"]
    assert found[1] == "shards/000001-000001.h5"
    assert found[2].startswith("a file of ")
    assert found[3] == "no file"
    assert "--repair" in found[4]
    for args, words in (
        (("--out", tmp_path), "no manifest in"),
        (("--out", out, "--rows", 0), "at least 1"),
        (("--out", out, "--repair", "--model", "no/model"), "make engines MODEL=no/model"),
    ):
        ran = run_module("pipeline.verify", *args)
        assert ran.code == 2
        assert words in ran.stderr
        assert "Traceback" not in ran.stderr


def test_findings_name_files_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    health = Health(findings=[Finding("damaged file", "a[/b].h5", "[red]1", "\x1b]0;owned\x07", "none")])
    show(parse(["--out", str(tmp_path / "[/x]\n")]), Verdict(health, None, None, 0.1, DAMAGED))
    shown = capsys.readouterr().out
    for words in ("a[/b].h5", "[red]1", r"\x1b]0;owned\x07", r"[/x]\n: nothing published"):
        assert words in shown
    assert "\x07" not in shown
