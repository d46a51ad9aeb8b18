"""What a user types: the literal commands chain, errors are one line with a remedy, flags change only on purpose."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from pictures import noisy_jpeg, write_folder
from PIL import Image
from runs import index, run_module

from pipeline import progress
from pipeline.batch import Item
from pipeline.config import Config, index_parser
from pipeline.duration import parse_duration, words
from pipeline.index import Indexed, observe
from pipeline.lanes import Lane
from pipeline.messages import Tick
from pipeline.nightly.night import nightly_parser
from pipeline.progress import Display
from pipeline.scheduler import Totals
from pipeline.search.config import search_parser
from pipeline.status import status_parser
from pipeline.stop import Stop
from pipeline.store import Store

ROOT = Path(__file__).resolve().parents[1]


def flags(parser: object) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}  # type: ignore[attr-defined]


def test_flags_change_only_on_purpose() -> None:
    assert flags(index_parser()) == {
        "-h",
        "--help",
        "--source",
        "--root",
        "--split",
        "--download",
        "--model",
        "--out",
        "--devices",
        "--sharing",
        "--runtime",
        "--precision",
        "--max-quarantined",
        "--max-deleted",
        "--retry",
        "--budget",
        "--keep",
        "--json",
    }
    assert flags(search_parser()) == {
        "-h",
        "--help",
        "--image",
        "--like",
        "--template",
        "--out",
        "-k",
        "--offset",
        "--threshold",
        "--mmr",
        "--group",
        "--label",
        "--taxon",
        "--licence",
        "--license",
        "--date",
        "--box",
        "--key",
        "--where",
        "--grid",
        "--json",
        "--model",
        "--exact",
    }
    assert flags(nightly_parser()) == {"-h", "--help", "--config", "--log", "--check"}
    assert flags(status_parser()) == {"-h", "--help", "--out", "--json", "--ledger"}


@pytest.mark.parametrize(
    "module",
    [
        "pipeline.index",
        "pipeline.search",
        "pipeline.nightly",
        "pipeline.status",
        "engines.build",
        "export",
    ],
)
def test_help_has_examples(module: str) -> None:
    ran = run_module(module, "--help")
    assert ran.code == 0
    assert "example" in ran.stdout
    assert "Traceback" not in ran.stderr


def test_make_engines_then_index_then_search(tmp_path: Path) -> None:
    """The user's literal commands, with NIGHTJAR_MODEL set and only the root given."""
    split = tmp_path / "birds" / "train_mini"
    for number, species in enumerate(
        (
            "00001_Animalia_Chordata_Aves_Order_Family_Genus_first",
            "00002_Animalia_Chordata_Aves_Order_Family_Genus_second",
        )
    ):
        (split / species).mkdir(parents=True)
        for row in range(3):
            (split / species / f"{row}.jpg").write_bytes(noisy_jpeg(10 * number + row))
    assert run_module("export", "random", "--arch", "tiny", tmp_path / "model").code == 0
    env = {**os.environ, "NIGHTJAR_MODEL": str(tmp_path / "model"), "NIGHTJAR_ARTIFACTS": str(tmp_path / "artifacts")}
    venv = Path(sys.prefix)  # as it is: a test installs nothing
    make = ["make", "-C", str(ROOT), "-o", f"{venv}/.done", f"VENV={venv}", "RUNTIME=ort-cpu", "engines"]
    made = subprocess.run(make, env=env, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "vision" in made.stdout
    again = subprocess.run(make, env=env, capture_output=True, text=True, check=False)
    assert "nothing changed" in again.stdout + again.stderr
    ran = run_module("pipeline.index", "--source", "inat2021", "--root", tmp_path / "birds", env=env, cwd=tmp_path)
    assert ran.code == 0, ran.stderr
    assert ran.report["embedded"] == 6
    found = run_module("pipeline.search", "a bird", "--grid", tmp_path / "nine.png", "--json", env=env, cwd=tmp_path)
    assert found.code == 0, found.stderr
    hits = json.loads(found.stdout)["hits"]
    assert len(hits) == 6
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    with Image.open(tmp_path / "nine.png") as sheet:
        assert sheet.width > 700


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--source", "folder"], "--root"),
        (["--source", "folder", "--root", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--source", "inat2021", "--root", "/nowhere/at/all"], "--download"),
        (["--source", "folder", "--root", ".", "--model", "no/such-model"], "make engines MODEL=no/such-model"),
        (["--source", "folder", "--root", ".", "--devices", "gpu:0"], "--devices"),
        (["--source", "folder", "--root", ".", "--split", "val"], "--split"),
        (["--source", "folder", "--root", ".", "--max-deleted", "120"], "120"),
        (["--source", "folder", "--root", ".", "--budget", "6 hours"], "write 90m, 6h or 1h30m"),
        (["--source", "folder", "--root", ".", "--keep", "0"], "at least 1"),
        (["--source", "folder", "--root", ".", "--max-quarantined", "-1"], "at least 0"),
        (["--source", "foldr", "--root", "."], "'foldr' (choose from"),
        (["--source", "folder", "--root", ".", "--sauce", "x"], "python -m pipeline.index --help"),
    ],
)
def test_usage_errors_are_one_line_with_the_remedy(
    args: list[str], words: str, tiny_model: Path, tmp_path: Path
) -> None:
    env = {"NIGHTJAR_MODEL": str(tiny_model)}
    ran = run_module("pipeline.index", *args, "--out", tmp_path / "index", env=env)
    assert ran.code == 2
    assert "Traceback" not in ran.stderr
    assert words in ran.report["error"]
    assert "\n" not in ran.report["error"]
    assert not (tmp_path / "index").exists()


def test_where_no_index_can_be_made_is_said_before_anything_is(tiny_model: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", 1)
    (tmp_path / "file").write_bytes(b"")
    for out, told in {
        tmp_path / "file": f"no file can be made in {tmp_path / 'file'}: Not a directory; give",
        tmp_path / "file/below/it": f"no file can be made in {tmp_path / 'file'}: Not a directory; give",
        Path("/proc/foo"): "no file can be made in /proc: No such file or directory; give",
        tmp_path / "photos": "is the root itself; give the index its own folder",
    }.items():
        ran = index(tmp_path / "photos", out, "--model", tiny_model)
        assert (ran.code, "Traceback" in ran.stderr) == (2, False), ran.stderr
        assert told in ran.report["error"]
    assert len(list(tmp_path.rglob("*"))) == 4


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("90m", 5400), ("6h", 21600), ("1h30m", 5400), ("1d", 86400), ("1d2h3m4s", 93784)],
)
def test_durations_are_read_as_people_write_them(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds
    assert parse_duration(words(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "6", "0h", "1.5h", "-1h", "30m1h", "6 h", "6H", "9" * 5000 + "h", "400d", "٦h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write 90m, 6h or 1h30m"):
        parse_duration(text)


def test_a_night_leaves_hundreds_of_lines_and_each_says_how_long_it_takes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: clock[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    caplog.set_level("INFO")
    hours = 3600.0
    display = Display("/photos\x1b", 6 * 3600 * 100, 5 * hours, quiet=False)
    lanes = [cast(Lane, SimpleNamespace(spec=SimpleNamespace(name=f"cpu/{number}"))) for number in range(2)]
    for second in range(100, 5 * 3600 + 1, 4):  # engines take 96 s to load
        clock[0] = second
        for lane in lanes:  # half as fast after four hours
            display.tick(lane, Tick(rows=200 if second < 4 * hours else 100, seconds=4.0), Totals())
    lines = [record.getMessage() for record in caplog.records]
    assert 280 < len(lines) < 330
    assert lines[0].startswith(
        r"embedding /photos\x1b: 200/2,160,000  0 %, 50.0 img/s, 11:59:56 left, the budget ends in 4:58:20: about "
    )
    assert "2,160,000  50 %, 100.0 img/s, 3:00:" in "".join(lines), "the engine's start does not count"
    earlier, at_end = (next(line for line in lines if f"budget ends in {left}" in line) for left in ("1:01", "0:00"))
    assert "100.0 img/s, 2:02:" in earlier
    assert " 50.0 img/s, 3:0" in at_end, "the speed is that since the last line"
    assert re.search(r": about 549,900 stay for the next run  cpu/0 bad 0  waits: ", at_end)

    caplog.clear()
    for args in ({"total": 100}, {"total": 100, "deadline_s": 1e9}):
        Display("/photos", **args, quiet=False).tick(lanes[0], Tick(rows=50, seconds=1.0), Totals())
    endless, ample = [record.getMessage() for record in caplog.records]
    assert "0:00:01 left  cpu/0" in endless
    assert re.search(r"0:00:01 left, the budget ends in \d+ days, [\d:]+  cpu/0", ample), "nothing stays"
    Display("/photos", 100, quiet=True).tick(lanes[0], Tick(rows=50, seconds=1.0), Totals())
    assert len(caplog.records) == 2


def test_listing_is_told_of_containers_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each tar gives a thousand pictures, which are taken in when it has been read to its end."""
    clock = [0.0]

    def listed(_: object) -> Iterator[object]:
        for tar in range(100):
            yield from (Item(f"{tar}/{number}", b"", 1) for number in range(1000))
            clock[0] += 10
            yield SimpleNamespace(uri=f"{tar}.tar")

    monkeypatch.setattr(progress, "monotonic", lambda: clock[0])
    caplog.set_level("INFO")
    source = SimpleNamespace(kind="tar", root="s3://shards", list=listed)
    store = SimpleNamespace(
        observe=lambda _: None, container_seen=lambda _: None, container_unchanged=None, counts=lambda: [1, 0, 0, 0]
    )
    observe(cast(Config, SimpleNamespace(source=source)), cast(Store, store), Stop(), Indexed(1))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "listing s3://shards: 1,000 pictures in 0:00:10"
    assert 15 < len(lines) < 25, "a minute between them, of a thousand seconds"
    assert lines[-1].startswith("listing s3://shards: 9")


def test_a_named_runtime_that_was_not_built_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", 2)
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, "--runtime", "aoti-cpu")
    assert ran.code != 0
    assert "make engines" in ran.report["error"]


def test_many_newly_quarantined_is_exit_3_once(tiny_model: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", 3)
    for number in range(2):
        (tmp_path / "photos" / f"bad{number}.jpg").write_bytes(b"\xff\xd8 no picture")
    args = ("--model", tiny_model, "--max-quarantined", 1)
    assert index(tmp_path / "photos", tmp_path / "index", *args).code == 3
    assert index(tmp_path / "photos", tmp_path / "index", *args).code == 0, "known bad files are not news"


def test_a_text_query_imports_no_torch(tiny_model: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", 4)
    index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model)
    script = (
        "import sys; from pipeline.search.command import main; "
        f"code = main(['words', '--out', {str(tmp_path / 'index')!r}]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_search_by_picture_finds_the_picture(tiny_model: Path, tmp_path: Path) -> None:
    paths = write_folder(tmp_path / "photos", 12)
    index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model)
    query = tmp_path / "query.jpg"
    shutil.copyfile(paths[5], query)
    ran = run_module("pipeline.search", "--image", query, "--out", tmp_path / "index", "-k", 3, "--json")
    assert ran.code == 0, ran.stderr
    best = json.loads(ran.stdout)["hits"][0]
    assert best["key"] == "odd/00005.jpg"
    assert best["score"] > 0.999
    none = run_module("pipeline.search", "--image", query, "--out", tmp_path / "index", "-k", 1, "--label", "even",
        "--threshold", 1,
    )  # fmt: skip
    assert (none.code, none.stdout) == (0, "")
    assert "nothing at or above" in none.stderr
