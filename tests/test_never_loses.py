"""Nothing is lost and nothing is done twice: kill -9, Ctrl-C, bad pictures, crashing and hanging decoders, renames."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest
from pictures import noisy_jpeg, write_folder
from runs import Ran, index, quarantine, run_module, vectors_by_key

KILLS = 20


def assert_adds_up(ran: Ran) -> None:
    report = ran.report
    states = ("unchanged", "embedded", "copied", "quarantined", "pending")
    assert report["inputs"] == sum(report[state] for state in states), report


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    paths = write_folder(folder, 150)
    shutil.copyfile(paths[3], folder / "copy of 3.jpg")
    (folder / "truncated.jpg").write_bytes(paths[5].read_bytes()[:-900])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "words.jpg").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "index"
    ran = index(photos, out, "--model", tiny_model)
    assert ran.code == 0, ran.stderr
    assert_adds_up(ran)
    assert (ran.report["embedded"], ran.report["copied"], ran.report["quarantined"]) == (150, 1, 3)
    return out


def test_second_run_does_nothing_and_says_so(undisturbed: Path, photos: Path, tiny_model: Path) -> None:
    before = vectors_by_key(undisturbed)
    generation = os.readlink(undisturbed / "current")
    ran = index(photos, undisturbed, "--model", tiny_model)
    assert ran.code == 0, ran.stderr
    assert_adds_up(ran)
    assert (ran.report["embedded"], ran.report["unchanged"], ran.report["quarantined_new"]) == (0, 151, 0)
    assert "nothing to embed" in ran.stderr
    assert os.readlink(undisturbed / "current") == generation
    assert vectors_by_key(undisturbed) == before


def start(root: Path, out: Path, *args: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    words = ["-m", "pipeline.index", "--source", "folder", "--root", str(root), "--out", str(out), *map(str, args)]
    pipe, env = subprocess.PIPE, {**os.environ, **(env or {})}
    return subprocess.Popen([sys.executable, *words], stdout=pipe, stderr=pipe, text=True, env=env)


def wait_for_words(child: subprocess.Popen[str], words: str) -> None:
    assert child.stderr
    for line in child.stderr:
        if words in line:
            return


def test_killed_anywhere_and_resumed_equals_undisturbed(tmp_path: Path, tiny_model: Path) -> None:
    """Twenty nights of a hundred new pictures, each killed: half of them at any moment, half while vectors are made."""
    photos, out, moments = tmp_path / "photos", tmp_path / "index", random.Random(20)
    for night in range(KILLS):
        write_folder(photos / f"night {night}", 100, first_seed=100 * night)
        child = start(photos, out, "--model", tiny_model)
        if night % 2:
            wait_for_words(child, "runs ort-cpu")
            time.sleep(moments.uniform(0.0, 0.5))
        else:
            time.sleep(moments.uniform(0.1, 4.0))
        child.kill()
        child.communicate()
    ran = index(photos, out, "--model", tiny_model)
    assert ran.code == 0, ran.stderr
    assert_adds_up(ran)
    whole = index(photos, tmp_path / "whole", "--model", tiny_model)
    assert whole.report["embedded"] == 100 * KILLS
    assert vectors_by_key(out) == vectors_by_key(tmp_path / "whole")
    assert not list(out.rglob("*.tmp*"))


def test_interrupted_politely_keeps_what_is_done(photos: Path, tmp_path: Path, tiny_model: Path) -> None:
    child = start(photos, tmp_path / "index", "--model", tiny_model)
    wait_for_words(child, "pictures to embed")
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=60)
    ran = Ran(child.returncode, stdout, stderr)
    assert ran.code == 130, stderr
    assert_adds_up(ran)
    assert ran.report["generation"] is None
    left = f"{ran.report['pending']:,} pictures are known to be left"
    assert f"interrupted: what is done is kept, {left}; the same command goes on there" in stderr
    resumed = index(photos, tmp_path / "index", "--model", tiny_model)
    assert resumed.code == 0
    assert resumed.report["inputs"] == ran.report["inputs"]


def test_two_runs_at_once_are_refused(photos: Path, tmp_path: Path, tiny_model: Path) -> None:
    child = start(photos, tmp_path / "index", "--model", tiny_model)
    wait_for_words(child, "pictures to embed")
    child.send_signal(signal.SIGSTOP)  # else it may have ended before the second one asks for the lock
    assert index(photos, tmp_path / "index", "--model", tiny_model).code == 4
    child.kill()
    child.communicate()
    assert index(photos, tmp_path / "index", "--model", tiny_model).code == 0, "a killed run leaves no stale lock"


def test_a_decoder_that_dies_or_hangs_costs_one_picture(tmp_path: Path, tiny_model: Path) -> None:
    """The decoder is made to crash and to hang on two marked pictures; 40 others go through, and both are named."""
    photos = tmp_path / "photos"
    paths = write_folder(photos, 42)
    paths[7].write_bytes(noisy_jpeg(7) + b"CRASH-HERE")
    paths[30].write_bytes(noisy_jpeg(30) + b"HANG-HERE")
    broken_decoder = {"PYTHONPATH": str(Path(__file__).parent / "broken_decoder")}
    ran = index(photos, tmp_path / "index", "--model", tiny_model, env=broken_decoder)
    assert ran.code == 0, ran.stderr
    assert (ran.report["embedded"], ran.report["quarantined"]) == (40, 2)
    assert quarantine(tmp_path / "index") == {"odd/00007.jpg": "decoder_crash", "even/00030.jpg": "timeout"}


def test_rename_copies_and_changes(tmp_path: Path, tiny_model: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "index"
    paths = write_folder(photos, 12)
    index(photos, out, "--model", tiny_model)
    before = vectors_by_key(out)
    paths[0].rename(photos / "renamed.jpg")
    paths[1].write_bytes(noisy_jpeg(999))
    paths[2].unlink()
    ran = index(photos, out, "--model", tiny_model)
    assert ran.code == 0, ran.stderr
    assert_adds_up(ran)
    assert [ran.report[state] for state in ("inputs", "embedded", "copied", "deleted")] == [11, 1, 1, 2]
    after = vectors_by_key(out)
    assert after["renamed.jpg"] == before["even/00000.jpg"]
    assert after["odd/00001.jpg"] != before["odd/00001.jpg"]
    assert "even/00002.jpg" not in after


def test_a_source_that_looks_empty_stops_the_run(tmp_path: Path, tiny_model: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "index"
    write_folder(photos, 10)
    index(photos, out, "--model", tiny_model)
    before = vectors_by_key(out)
    shutil.rmtree(photos / "even")
    ran = index(photos, out, "--model", tiny_model)
    assert ran.code == 6
    assert "5 of 10" in ran.report["error"]
    assert vectors_by_key(out) == before
    write_folder(photos / "new", 42, first_seed=100)  # another disk: what is new hides nothing
    shutil.rmtree(photos / "odd")
    for _ in range(2):
        ran = index(photos, out, "--model", tiny_model)
        assert (ran.code, vectors_by_key(out)) == (6, before), ran.stderr
        assert "10 of 10 known pictures are gone" in ran.report["error"]
        assert "Nothing of it was deleted or embedded" in ran.report["error"]
    assert index(photos, out, "--model", tiny_model, "--max-deleted", 100).report["deleted"] == 10


def test_a_first_run_that_finds_no_picture_is_no_success(tmp_path: Path, tiny_model: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "index"
    photos.mkdir()
    (photos / "notes.txt").write_text("the disk is not mounted here")
    for _ in range(2):
        ran = index(photos, out, "--model", tiny_model)
        assert (ran.code, ran.report["exit"], (out / "current").exists()) == (2, 2, False)
        assert f"no picture below {photos}: is it mounted" in ran.report["error"]
    (photos / "cut.tar").write_bytes(b"no tar at all")
    ran = index(photos, out, "--model", tiny_model, source="tar")
    assert ran.code == 2
    assert "1 part of the source could not be listed, such as cut.tar/: " in ran.report["error"]
    write_folder(photos, 2)
    assert index(photos, out, "--model", tiny_model).code == 0
    shutil.rmtree(photos)
    photos.mkdir()
    for _ in range(2):  # emptied on purpose, and known to be: no error
        assert index(photos, out, "--model", tiny_model, "--max-deleted", 100).code == 0


def test_two_roots_share_an_index(tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "index"
    for name, seed in (("a", 0), ("b", 50)):
        write_folder(tmp_path / name, 6, first_seed=seed)
        assert index(tmp_path / name, out, "--model", tiny_model).report["deleted"] == 0
    with h5py.File(out / "index.h5") as file:
        assert len(file["key"]) == 12


def test_a_shard_removed_by_hand_is_an_error_never_zeros(tmp_path: Path, tiny_model: Path) -> None:
    write_folder(tmp_path / "photos", 6)
    index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model)
    (shard,) = (tmp_path / "index" / "shards").glob("*.h5")
    shard.unlink()
    ran = run_module("pipeline.search", "anything", "--out", tmp_path / "index")
    assert ran.code == 1
    assert shard.name in ran.stderr
