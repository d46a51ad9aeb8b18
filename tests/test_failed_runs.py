"""A run that began leaves a record whatever ended it, and the morning's page and `status` say first what failed."""

from __future__ import annotations

import errno
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pictures import write_folder
from runs import index, run_module, vectors_by_key
from test_nightly import config, configure, night

from pipeline import failures
from pipeline import index as indexing
from pipeline.exits import FAILED, MANY_DELETED
from pipeline.index import run
from pipeline.nightly import night as nightly
from pipeline.report.page import PARTS, write_report
from pipeline.scheduler import LaneFailed, Sharing
from pipeline.status import status
from pipeline.stop import Stop
from pipeline.store import StoreError


def record(out: Path, number: int) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((out / f"runs/{number}.json").read_text())
    assert told["inputs"] == sum(told[part] for part in PARTS)
    return told


def page(out: Path, number: int) -> str:
    return write_report(out, number).read_text()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """photos/ and an index of them."""
    folder = tmp_path_factory.mktemp("sound")
    write_folder(folder / "photos", 12)
    ran = index(folder / "photos", folder / "index", "--model", tiny_model)
    assert ran.code == 0, ran.stderr
    return folder


@pytest.fixture
def there(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "there", symlinks=True)
    return tmp_path / "there"


def test_too_many_deletions_are_told_in_the_morning(there: Path, tiny_model: Path) -> None:
    photos, out = there / "photos", there / "index"
    shutil.rmtree(photos / "odd")
    # The copy of the index knows the pictures of another root: its own first run takes them over.
    assert index(photos, out, "--model", tiny_model).code == 0
    shutil.rmtree(photos / "even")
    ran = index(photos, out, "--model", tiny_model)
    assert ran.code == MANY_DELETED
    told = record(out, 3)
    assert (told["exit"], told["inputs"], told["deleted"]) == (MANY_DELETED, 6, 0)
    assert told["error"] == ran.report["error"]
    assert "Failed: 6 of 6 known pictures are gone" in page(out, 3)
    again = shlex.split(ran.report["error"].partition("if this is right, once: ")[2])
    assert run_module("pipeline.index", *again[3:], "--keep", 7).report["deleted"] == 6, "as it is told"
    newest = status(out)["runs"][1]
    assert (newest["run"], newest["exit"], newest["never_ended"]) == (3, MANY_DELETED, False)
    assert "exit 6, 0 embedded" in (shown := run_module("pipeline.status", "--out", out).stdout)
    assert "6 of 6 known pictures are gone" in shown


FAULTS = [
    (LaneFailed("no lane is left"), FAILED, "no lane is left"),
    (MemoryError(), FAILED, "ran out of memory; what is done is committed. Raise"),
    (KeyError("a bug of ours"), FAILED, "KeyError: 'a bug of ours'"),
    (OSError(28, "No space left on device"), FAILED, "No space left"),
]


@pytest.mark.parametrize(("error", "code", "words"), FAULTS, ids=lambda value: type(value).__name__)
def test_a_run_that_fails_while_it_embeds(
    there: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str
) -> None:
    """The sums are those of the moment: what was committed before it failed is counted as done."""
    real = Sharing.run

    def fail_at_the_end(sharing: Sharing) -> None:
        real(sharing)
        raise error

    out = there / "index"
    write_folder(there / "photos" / "new", 5, first_seed=500)
    monkeypatch.setattr(Sharing, "run", fail_at_the_end)
    with pytest.raises(type(error)):
        run(config(there / "photos", out, tiny_model), Stop())
    told = record(out, 2)
    assert (told["exit"], told["embedded"], told["copied"], told["generation"]) == (code, 5, 12, None)
    assert words in told["error"]
    assert words in page(out, 2).replace("&#39;", "'")
    assert len(vectors_by_key(out)) == 12, "readers still see the last generation"


def test_a_memory_error_is_one_line_with_a_remedy(
    there: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(indexing, "observe", no_memory)
    args = ["--source", "folder", "--root", there / "photos", "--out", there / "index", "--model", tiny_model, "--json"]
    assert indexing.main([str(word) for word in args]) == FAILED
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert "ran out of memory" in last["error"]
    assert "Raise its limit" in last["error"]
    assert failures.words(MemoryError("Unable to allocate 3 GiB")).count("3 GiB") == 1


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")  # of a write, Python tells no more


def test_a_night_whose_disk_is_full_says_where_and_what_to_do(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """What it did is told, although none of its records can be written."""
    write_folder(tmp_path / "a", 4)
    write_folder(tmp_path / "b", 4, first_seed=50)
    configure(tmp_path, tiny_model, ["a", "b"])
    toml, out = tmp_path / "nightly.toml", tmp_path / "index"
    toml.write_text(toml.read_text().replace("page = false", ""))
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "write_text", full)
        assert nightly.main(["--config", str(toml)]) == FAILED
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [told["embedded"], told["generation"], [one["exit"] for one in told["sources"]]] == [8, 1, [1, 1]]
    for number in (1, 2):
        assert f"{out}/runs/{number}.json cannot be written: No space left on device; what is done" in told["words"]
    assert "Make room" in told["words"]
    assert "no page of" not in caplog.text, "that follows"
    assert status(out)["generation"]["rows"] == 8

    write_folder(tmp_path / "a/more", 2, first_seed=90)
    monkeypatch.setattr("pipeline.store.publish.write_generation", full)
    assert nightly.main(["--config", str(toml)]) == FAILED
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert told["words"].startswith(f"{out} could not be published: [Errno 28] No space left on device; what is emb")
    assert "Make room" in told["words"]
    assert status(out)["generation"]["rows"] == 8


def test_a_run_that_was_killed_is_told_by_the_next_and_by_status(there: Path, tiny_model: Path) -> None:
    out = there / "index"
    code = (
        "import os, sys; import pipeline.index as i; i.observe = lambda *a: os.kill(os.getpid(), 9);"
        "i.main(sys.argv[1:])"
    )
    args = ["--source", "folder", "--root", there / "photos", "--out", out, "--model", tiny_model, "--json"]
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, *map(str, args)], check=False).returncode == -9
    runs = {one["run"]: one["never_ended"] for one in status(out)["runs"]}
    assert runs == {3: True, 2: True, 1: False}
    assert "run 3" in (shown := run_module("pipeline.status", "--out", out).stdout)
    assert "never ended: it was killed, its machine went down, or its disk was full" in shown
    ran = index(there / "photos", out, "--model", tiny_model)
    assert ran.code == 0
    assert "run 3 never ended" in ran.stderr
    assert "run 2 never ended" in ran.stderr
    assert "run 1 never" not in ran.stderr
    assert "Run 3 never ended." in page(out, 4)
    assert "never ended" not in index(there / "photos", out, "--model", tiny_model).stderr


def test_a_run_that_is_going_on_has_not_ended_badly(there: Path, tiny_model: Path) -> None:
    out = there / "index"
    code = "import sys, time; import pipeline.index as i; i.observe = lambda *a: time.sleep(60); i.main(sys.argv[1:])"
    args = ["--source", "folder", "--root", there / "photos", "--out", out, "--model", tiny_model, "--json"]
    with subprocess.Popen([sys.executable, "-c", code, *map(str, args)]) as going:
        try:
            deadline_s = time.monotonic() + 30
            while len(runs := status(out)["runs"]) < 2 and time.monotonic() < deadline_s:
                time.sleep(0.05)
            assert (runs[0]["run"], runs[0]["exit"], runs[0]["never_ended"]) == (2, None, False)
            assert "run 2" in (shown := run_module("pipeline.status", "--out", out).stdout)
            assert "going on" in shown
        finally:
            going.kill()
            going.wait()
    assert status(out)["runs"][0]["never_ended"]


def test_every_source_of_a_failed_night_has_its_page(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "a", 4)
    write_folder(tmp_path / "b", 4, first_seed=50)
    configure(tmp_path, tiny_model, ["a", "b"])
    toml = tmp_path / "nightly.toml"
    toml.write_text(toml.read_text().replace("page = false", ""))
    out = tmp_path / "index"
    assert night(tmp_path).code == 0

    # One source fails: its page says so, and the other's page too.
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "b").mkdir()
    assert night(tmp_path).code == MANY_DELETED
    assert record(out, 3)["also_failed"] == [f"folder {tmp_path}/b: {record(out, 4)['error']}"]
    assert "Other sources failed:" in (out / "runs/3.html").read_text()
    assert "Failed: 4 of 4 known pictures are gone" in (out / "runs/4.html").read_text()

    # The night itself fails, after both were embedded.
    def full(*args: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(nightly, "publish", full)
    assert nightly.main(["--config", str(toml)]) == FAILED
    assert [record(out, number)["error"] for number in (5, 6)] == ["the disk is full", record(out, 4)["error"]]
    assert "Failed: the disk is full" in (out / "runs/5.html").read_text()
    assert status(out)["last_night"]["words"] == "the disk is full"

    # Nothing can even be begun.
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    assert night(tmp_path).code == 2
    last = status(out)["last_night"]
    assert last["exit"] == 2
    assert f"{tmp_path}/a" in last["words"]
    assert "last night that ended, begun 2" in run_module("pipeline.status", "--out", out).stdout
    assert status(out)["runs"][0]["run"] == 6
