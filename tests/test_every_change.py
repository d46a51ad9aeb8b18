"""What can happen to a picture between two nights: the index follows, and nothing is done twice."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from pictures import noisy_jpeg, write_folder
from runs import Ran, index, quarantine, run_module, vectors_by_key

from pipeline.store import Generation


def data_files(out: Path) -> set[str]:
    return {path.name for kind in ("shards", "segments") for path in (out / kind).iterdir()}


def assert_did(ran: Ran, want: Mapping[str, int]) -> None:
    """The report says exactly this; what is not named is 0."""
    assert ran.code == 0, ran.stderr
    states = ("unchanged", "embedded", "copied", "quarantined", "pending")
    got = {name: ran.report[name] for name in (*states, "quarantined_new", "deleted") if ran.report[name]}
    assert got == dict(want)
    assert ran.report["inputs"] == sum(ran.report[name] for name in states)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("every") / "photos"
    write_folder(folder, 12)
    return folder


def test_pictures_from_night_to_night(photos: Path, tmp_path: Path, tiny_model: Path) -> None:
    """One folder through five nights; another root in the same index is never touched."""
    out, other = tmp_path / "index", tmp_path / "other"
    write_folder(other / "other", 4, first_seed=400)
    args = ("--model", tiny_model)
    assert_did(index(photos, out, *args), {"embedded": 12})
    assert_did(index(other, out, *args), {"embedded": 4})
    first, files = vectors_by_key(out), data_files(out)

    # Touched, renamed, moved and copied: the bytes are known, so nothing is computed and no vector is written.
    os.utime(photos / "even/00000.jpg", (1_000_000_000, 1_000_000_000))
    (photos / "even/00002.jpg").rename(photos / "even/renamed.jpg")
    (photos / "elsewhere").mkdir()
    (photos / "odd/00001.jpg").rename(photos / "elsewhere/moved.jpg")
    shutil.copyfile(photos / "odd/00003.jpg", photos / "odd/a copy.jpg")
    assert_did(index(photos, out, *args), {"unchanged": 9, "copied": 4, "deleted": 2})
    second = vectors_by_key(out)
    assert data_files(out) == files
    assert second["even/00000.jpg"] == first["even/00000.jpg"]
    assert second["even/renamed.jpg"] == first["even/00002.jpg"]
    assert second["elsewhere/moved.jpg"] == first["odd/00001.jpg"]
    assert second["odd/a copy.jpg"] == second["odd/00003.jpg"] == first["odd/00003.jpg"]
    assert not {"even/00002.jpg", "odd/00001.jpg"} & second.keys()

    # Added, changed, gone, and one that cannot be read tonight.
    (photos / "added.jpg").write_bytes(noisy_jpeg(500))
    (photos / "even/00004.jpg").write_bytes(noisy_jpeg(501))
    (photos / "even/00006.jpg").unlink()
    unreadable = photos / "odd/00005.jpg"
    unreadable.rename(tmp_path / "kept")
    unreadable.symlink_to(unreadable)
    ran = index(photos, out, *args)
    assert_did(ran, {"unchanged": 10, "embedded": 2, "quarantined": 1, "quarantined_new": 1, "deleted": 1})
    third = vectors_by_key(out)
    assert third["even/00004.jpg"] != second["even/00004.jpg"]
    assert third["odd/00005.jpg"] == second["odd/00005.jpg"], "its last vector is still served"
    assert quarantine(out) == {"odd/00005.jpg": "read_error"}
    assert "even/00006.jpg" not in third
    searched = run_module("pipeline.search", "--image", tmp_path / "kept", "--out", out, "-k", 99, "--json")
    hits = {hit["key"] for hit in json.loads(searched.stdout)["hits"]}
    assert hits == third.keys(), "search sees what the index holds"

    # Readable again: tried without being asked, and known by its bytes.
    unreadable.unlink()
    (tmp_path / "kept").rename(unreadable)
    assert_did(index(photos, out, *args), {"unchanged": 12, "copied": 1})
    assert quarantine(out) == {}
    fourth = vectors_by_key(out)
    assert fourth["odd/00005.jpg"] == first["odd/00005.jpg"]

    # Suddenly empty: the index stays as it is, in every byte that a reader sees.
    generation, files = os.readlink(out / "current"), data_files(out)
    away = photos.rename(tmp_path / "away")
    photos.mkdir()
    stopped = index(photos, out, *args)
    assert stopped.code == 6, stopped.stderr
    assert "13 of 13 known pictures are gone" in stopped.report["error"]
    assert (os.readlink(out / "current"), data_files(out)) == (generation, files)
    assert vectors_by_key(out) == fourth
    photos.rmdir()
    away.rename(photos)
    assert_did(index(photos, out, *args), {"unchanged": 13})
    assert os.readlink(out / "current") == generation

    # And the other root is as it was in the first night.
    mine = {key for key in first if key.startswith("other/")}
    assert len(mine) == 4
    assert all(fourth[key] == first[key] for key in mine)


def test_a_relabelled_picture_costs_no_vector(tmp_path: Path, tiny_model: Path) -> None:
    """inat2021: the licence of a picture changes in the JSON, its file does not."""
    root, out = tmp_path / "birds", tmp_path / "index"
    name = "train_mini/00001_Animalia_Chordata_Aves_Order_Family_Genus_first"
    (root / name).mkdir(parents=True)
    for row in range(3):
        (root / name / f"{row}.jpg").write_bytes(noisy_jpeg(row))

    def write_json(licence: str) -> None:
        images = [
            {"id": row, "file_name": f"{name}/{row}.jpg", "license": row, "rights_holder": "somebody", "width": 1,
             "height": 1, "date": "2020-01-01", "latitude": 1.0, "longitude": 2.0, "location_uncertainty": 3}
            for row in range(3)
        ]  # fmt: skip
        content = {
            "images": images,
            "annotations": [{"id": row, "image_id": row, "category_id": 1} for row in range(3)],
            "categories": [{"id": 1, "name": "Genus first", "common_name": "first", "image_dir_name": name[11:]}],
            "licenses": [{"id": row, "name": licence if row == 1 else "none", "url": ""} for row in range(3)],
        }
        (root / "train_mini.json").write_text(json.dumps(content))

    def licences() -> list[str]:
        with Generation.open(out) as generation:
            return sorted(json.dumps(one) for one in generation.metadata(np.arange(generation.rows)))

    args = ("--model", tiny_model)
    write_json("CC0")
    assert_did(index(root, out, *args, source="inat2021"), {"embedded": 3})
    before, files, labels = vectors_by_key(out), data_files(out), licences()
    assert sum("CC0" in label for label in labels) == 1
    write_json("CC-BY")
    ran = index(root, out, *args, source="inat2021")
    assert_did(ran, {"unchanged": 3})
    assert ran.report["generation"] == 2
    assert (vectors_by_key(out), data_files(out)) == (before, files)
    assert sum("CC-BY" in label for label in licences()) == 1
    assert sum("CC0" in label for label in licences()) == 0
