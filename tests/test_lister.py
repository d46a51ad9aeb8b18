"""A container that takes its reader down costs nobody else anything: not the run, not its own rows, not other files."""

from __future__ import annotations

import logging
import math
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import noisy_jpeg
from runs import index, vectors_by_key
from test_sources_containers import entries, tar_bytes

from pipeline.batch import Item
from pipeline.sources import Container, Damage, Entry, lister, open_source

BROKEN = str(Path(__file__).parent / "broken_lister")


def listed(root: Path, kind: str = "tar") -> list[Entry]:
    return list(open_source(kind, str(root)).list(lambda *_: False))


def keys(found: list[Entry]) -> list[str]:
    return [entry.key for entry in found if isinstance(entry, Item)]


def write_tars(root: Path, *names: str, pictures: int = 4) -> None:
    root.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        members = {f"{at}.jpg": noisy_jpeg(100 * number + at, 64, 48) for at in range(pictures)}
        (root / f"{name}.tar").write_bytes(tar_bytes(members))


def test_a_container_that_kills_its_reader_costs_itself_alone(tmp_path: Path, tiny_model: Path) -> None:
    """Its pictures are served as they were, deletions do not count them, and all others are brought up to date."""
    tars, out, names = tmp_path / "tars", tmp_path / "index", ("abort", "eat", "m", "z")
    write_tars(tars, *names)
    first = index(tars, out, "--model", tiny_model, source="tar")
    assert (first.code, first.report["embedded"]) == (0, 16), first.stderr
    write_tars(tars, *names, pictures=5)
    second = index(tars, out, "--model", tiny_model, source="tar", env={"PYTHONPATH": BROKEN})
    assert second.code == 0, second.stderr
    assert [second.report[name] for name in ("inputs", "embedded", "deleted")] == [18, 2, 0]
    assert "could not list all of abort.tar/: the process that listed it died (SIGABRT" in second.stderr
    assert "a broken statistic" in second.stderr
    assert "could not list all of eat.tar/" in second.stderr
    pictures = {"abort": 4, "eat": 4, "m": 5, "z": 5}
    assert set(vectors_by_key(out)) == {f"{name}.tar/{at}.jpg" for name in names for at in range(pictures[name])}
    third = index(tars, out, "--model", tiny_model, source="tar")
    assert (third.code, third.report["embedded"], third.report["inputs"]) == (0, 2, 20), "it is listed again every run"


def test_what_stands_behind_a_damage_is_brought_up_to_date(tmp_path: Path, tiny_model: Path) -> None:
    """A member that comes twice must not hide that a later one has changed."""
    path, out = tmp_path / "tars" / "a.tar", tmp_path / "index"
    path.parent.mkdir()
    for night in range(2):
        first = tar_bytes({"a.jpg": noisy_jpeg(1), "b.jpg": noisy_jpeg(2)}).rstrip(b"\0")
        first += bytes(-len(first) % 512)
        path.write_bytes(first + tar_bytes({"a.jpg": noisy_jpeg(3), "z.jpg": noisy_jpeg(10 + night)}))
        ran = index(path, out, "--model", tiny_model, source="tar")
        assert "comes twice" in ran.stderr, ran.stderr
        assert ran.report["embedded"] == (3 if night == 0 else 1), ran.stderr
        assert "listed twice in one run" not in ran.stderr


def test_a_container_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tars(tmp_path / "tars", "a", "hang", "z")
    monkeypatch.setenv("PYTHONPATH", BROKEN)
    monkeypatch.setattr(lister, "SILENCE_S", 1.5)
    start_s = time.monotonic()
    found = listed(tmp_path / "tars")
    assert time.monotonic() - start_s < 20
    assert {key[:2] for key in keys(found)} >= {"a.", "z."}
    (damage,) = [entry for entry in found if isinstance(entry, Damage)]
    assert damage == Damage("hang.tar/", "nothing came of it for 1.5 s")
    assert [entry.key_prefix for entry in found if isinstance(entry, Container)] == ["a.tar/", "z.tar/"]


def test_what_a_child_lists_is_what_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every byte of names, every value of metadata, in order; and what was logged on the way."""
    members = {
        "a\udcff%.jpg": b"1",
        "é\n.jpg": b"2",
        "film.mp4": b"5",
        "é\n.json": b'{"big": 9223372036854775807, "f": 1e-320, "n": NaN}',
    }
    members |= {f"{number}.jpg": b"3" for number in range(3000)}
    members |= {"long.jpg": b"4", "long.txt": b"x" * 60_000, "0.jpg ": b"6"}
    (tmp_path / "a.tar").write_bytes(tar_bytes(members)[:-20_000])
    table = pa.table({"image": [b"1", b"2"], "text": ["a" * 100_000, None], "score": [math.inf, 0.1]})
    pq.write_table(table, tmp_path / "a.parquet")
    caplog.set_level(logging.INFO)
    for kind in ("tar", "parquet"):
        caplog.clear()
        assert repr(listed(tmp_path, kind)) == repr(entries(open_source(kind, str(tmp_path)))), kind
        told = [record.getMessage() for record in caplog.records]
        assert told[: len(told) // 2] == told[len(told) // 2 :], "once from the child, once from here"
        assert any("mp4" in words for words in told) == (kind == "tar")


def test_one_child_for_all_and_none_for_a_quiet_night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tars(tmp_path / "tars", *(f"{number:02}" for number in range(30)))
    started = []
    start = lister.Child.start
    monkeypatch.setattr(lister.Child, "start", lambda *args: started.append(start(*args)) or started[-1])
    source = open_source("tar", str(tmp_path / "tars"))
    assert len(keys(list(source.list(lambda *_: False)))) == 120
    assert len(started) == 1
    assert started[0].process.returncode is not None, "it ends with the listing"
    list(source.list(lambda *_: True))
    assert len(started) == 1


def test_a_child_that_cannot_start_is_an_error_and_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a broken installation would look like a source full of broken files."""
    write_tars(tmp_path / "tars", "a")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="lister did not start: exit code 1"):
        listed(tmp_path / "tars")
