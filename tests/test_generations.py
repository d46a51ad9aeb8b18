"""Promise: what was published can be shown again with one command; a new model takes over only when it is complete."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from pictures import write_folder
from runs import index, run_module
from store_model import DIM, PHOTOS, SPACE, embed, item, vector_of

from pipeline.generations import main
from pipeline.model_change import compare_models
from pipeline.store import Generation, Scope, Store
from pipeline.store.files import take_lock

OTHER = "space-b"
BIRDS = Scope("folder", "/birds")


def night(
    out: Path, pictures: dict[str, bytes], scope: Scope = PHOTOS, space: str = SPACE, **publish: Any
) -> int | None:
    with Store.open(out, space, DIM) as store:
        store.begin_run(scope)
        store.observe([item(key, content, metadata={"label": key[0]}) for key, content in pictures.items()])
        store.finish_listing()
        embed(store, pictures, space)
        return store.publish({"model": space}, {}, **publish)


def keys(out: Path) -> set[str]:
    with h5py.File(out / "index.h5") as file:
        assert np.isfinite(file["embeddings"][:]).all()
        return set(file["key"].asstr()[:])


def shown_space(out: Path) -> str:
    with Generation.open(out, "digest") as generation:
        return generation.space


def generations(out: Path, *args: str) -> Any:
    return run_module("pipeline.generations", "--out", out, *args)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "index"


def some(count: int, letter: str = "a") -> dict[str, bytes]:
    return {f"{letter}{number}.jpg": f"{letter}{number}".encode() for number in range(count)}


def test_a_roll_back_stays_until_told_otherwise(out: Path) -> None:
    assert [night(out, some(count)) for count in (3, 4)] == [1, 2]
    assert "generation 1 is shown" in generations(out, "--show", "1").stderr
    assert keys(out) == set(some(3))
    assert night(out, some(4)) == 2, "nothing is new, and nothing changes for readers either"
    assert night(out, some(5)) == 3
    assert keys(out) == set(some(3))
    for count in (6, 7, 8):
        night(out, some(count))
    kept = json.loads(generations(out, "--json").stdout)["generations"]
    assert [(one["number"], one["rows"], one["shown"]) for one in kept] == [
        (1, 3, True), (4, 6, False), (5, 7, False), (6, 8, False),
    ]  # fmt: skip
    assert generations(out, "--show", "newest").code == 0
    assert keys(out) == set(some(8))
    night(out, some(9))
    assert keys(out) == set(some(9))


def test_kept_generations_are_a_table_for_people_and_lines_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = "/a/long/folder" * 9, tmp_path / "o[/red]\x1b[2J"
    for count in (1, 2):
        night(out, some(count), space=model)
    assert main(["--out", str(out)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[2], *line[4:]) for line in lines] == [("1", "1", model), ("2", "2", model, "shown")]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "o[/red]\\x1b[2J" in shown
    assert "generation" in shown
    assert model in "".join(shown.split()), "folded, not cut"


@pytest.mark.parametrize("content", ["garbage", "[]", "{}", b"\xff"])
def test_a_generation_that_is_damaged_is_listed_and_rolled_back_from(out: Path, content: str | bytes) -> None:
    for count in (3, 4):
        night(out, some(count))
    (out / "generations/2/generation.json").write_bytes(content.encode() if isinstance(content, str) else content)
    ran = generations(out)
    assert (ran.code, [line.split("\t")[0::5] for line in ran.stdout.splitlines()]) == (
        0, [["1"], ["2", "shown"]],
    ), ran.stderr  # fmt: skip
    assert ran.stdout.rstrip().endswith("damaged")
    assert f"python -m pipeline.verify --repair --out {out}" in ran.stderr
    assert run_module("pipeline.status", "--out", out).code == 0
    assert generations(out, "--show", "1").code == 0
    assert keys(out) == set(some(3))
    (_, damaged) = json.loads(generations(out, "--json").stdout)["generations"]
    assert (damaged["number"], damaged["shown"], damaged["damaged"]) == (2, False, True)


def test_a_killed_roll_back_is_finished_by_the_next_run(out: Path) -> None:
    """Killed between the manifest and the link."""
    for count in (3, 4):
        night(out, some(count))
    generations(out, "--show", "1")
    (out / "current").unlink()
    os.symlink("generations/2", out / "current")
    night(out, some(4))
    assert keys(out) == set(some(3))


def test_as_many_generations_are_kept_as_asked(out: Path) -> None:
    for count in range(2, 7):
        night(out, some(count), keep=2)
    assert sorted(home.name for home in (out / "generations").iterdir()) == ["4", "5"]
    night(out, some(7), keep=1)
    assert [home.name for home in (out / "generations").iterdir()] == ["6"]
    assert keys(out) == set(some(7))


def test_what_cannot_be_shown_is_said(out: Path, tmp_path: Path) -> None:
    night(out, some(2))
    for args, code, words in (
        (("--show", "7"), 1, "generation 7 is not kept"),
        (("--show", "last"), 2, 'give the number of a generation, or "newest"'),
    ):
        ran = generations(out, *args)
        assert (ran.code, words in ran.stderr) == (code, True), ran
    assert generations(tmp_path / "nowhere").code == 2
    assert generations(tmp_path / "nowhere", "--show", "1").code == 2
    held = take_lock(out / "lock")
    assert generations(out, "--show", "1").code == 4
    assert generations(out).code == 0, "looking needs no lock"
    os.close(held)
    (out / "manifest.sqlite").write_bytes(b"no database at all" * 100)
    ran = generations(out, "--show", "1")
    assert (ran.code, "Traceback" in ran.stderr) == (1, False), ran.stderr
    assert "manifest.sqlite: expected a sound SQLite file" in ran.stderr
    assert "Restore manifest.sqlite from a backup" in ran.stderr


def test_a_new_model_is_shown_when_it_is_complete(out: Path) -> None:
    """Two roots share the index: until both are embedded with the new model, readers keep all of the old one."""
    photos, birds = some(40), some(30, "b")
    assert night(out, photos) == 1
    assert night(out, birds, BIRDS) == 2
    assert night(out, photos, space=OTHER) is None
    assert (shown_space(out), keys(out)) == (SPACE, {*photos, *birds})
    photos |= {"c1.jpg": b"c1"}
    assert night(out, photos) == 3, "the first model goes on meanwhile"
    assert keys(out) == {*photos, *birds}
    assert night(out, birds, BIRDS, OTHER) is None, "one picture is new since"
    seen = []
    assert night(out, photos, space=OTHER, review=lambda *numbers: seen.append((*numbers, shown_space(out)))) == 4
    assert seen == [(3, 4, SPACE)], "compared before anybody sees it"
    assert (shown_space(out), keys(out)) == (OTHER, {*photos, *birds})
    with Generation.open(out) as new:
        rows = np.arange(new.rows)
        contents = {**photos, **birds}
        want = np.stack([vector_of(contents[key], OTHER) for key in new.keys(rows)])
        assert np.array_equal(new.vectors(rows), want)


def test_the_old_model_goes_with_its_last_generation(out: Path) -> None:
    night(out, some(5))
    for count in (5, 6):
        night(out, some(count), space=OTHER)
    assert {file.name for file in (out / "shards").iterdir()} >= {"000001-000001.h5"}
    night(out, some(8), space=OTHER)
    with Store.open(out, SPACE, DIM) as store:
        spaces = store._db.execute(
            "SELECT count(*) FROM vector v JOIN space s ON s.id = v.space WHERE s.name = ?", (SPACE,)
        )
        assert spaces.fetchone() == (0,)
    assert "000001-000001.h5" not in {file.name for file in (out / "shards").iterdir()}
    assert keys(out) == set(some(8))


def test_a_model_that_is_being_built_is_not_dropped(out: Path) -> None:
    """It has no generation yet; nights of the first model must not take its vectors away."""
    photos, birds = some(20), some(5, "b")
    night(out, photos)
    night(out, birds, BIRDS)
    assert night(out, photos, space=OTHER) is None
    for count in range(21, 27):
        night(out, photos | some(count))
    with Store.open(out, OTHER, DIM) as store:
        store.begin_run(PHOTOS)
        assert len(store.pending(100)) == 6, "those that came since"


def test_models_are_compared_on_the_same_pictures(out: Path) -> None:
    photos = some(60) | some(60, "b")
    night(out, photos)
    night(out, photos, space=OTHER)
    with Generation.at(out, 1) as old, Generation.at(out, 2) as new:
        same, other = compare_models(old, old), compare_models(old, new)
    assert (same.overlap, same.queries, same.pictures) == (1.0, 120, 120)
    assert same.same_label_shown == same.same_label_new
    assert (other.shown, other.new) == (SPACE, OTHER)
    assert other.overlap < 0.3, "vectors of the two models have nothing to do with each other"
    assert 0.3 < (other.same_label_new or 0) < 0.7, "nor with the two labels"


def test_a_model_change_is_in_the_report(tmp_path: Path, tiny_model: Path) -> None:
    from engines.build import main as make_engines
    from export.random_model import write_random_model

    second = write_random_model(tmp_path / "second", "tiny", seed=7)
    assert make_engines(["--model", str(second), "--runtime", "ort-cpu"]) == 0
    for name, first_seed in (("here", 0), ("there", 12)):
        write_folder(tmp_path / name, 12, first_seed=first_seed)
        assert index(tmp_path / name, tmp_path / "index", "--model", tiny_model).code == 0
    unnamed = index(tmp_path / "here", tmp_path / "index", env={"NIGHTJAR_MODEL": str(second)})
    assert unnamed.code == 2
    assert f"holds vectors of {tiny_model}" in unnamed.report["error"]
    assert f"--model {second} to replace it" in unnamed.report["error"]
    half = index(tmp_path / "here", tmp_path / "index", "--model", second)
    assert (half.code, half.report["generation"], half.report["embedded"]) == (0, None, 12), half.stderr
    assert "12 pictures have no vector of this model yet" in half.stderr
    whole = index(tmp_path / "there", tmp_path / "index", "--model", second)
    assert (whole.code, whole.report["generation"]) == (0, 3)
    assert whole.report["model_change"]["queries"] == 24
    assert "nine nearest" in whole.stderr
