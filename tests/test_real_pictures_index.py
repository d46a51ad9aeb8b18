"""The whole collection of real, hard and broken files as one folder source, through the product: nothing is lost."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import h5py
import pytest
from runs import Ran, index, quarantine, vectors_by_key

SPLITS = ("photo", "size", "format", "bad")
LANE_RSS_MAX_MB = 1500
SECONDS_MAX, SLOW_HOST = 60, 3  # 60 s are asked for; 25 s were seen on two idle cores, and tests share theirs


@pytest.fixture(scope="module")
def collection(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to the four splits: the pictures are read in place."""
    root = tmp_path_factory.mktemp("collection")
    for split in SPLITS:
        (root / split).symlink_to(shared_data / split)
    return root


@pytest.fixture(scope="module")
def expected(shared_data: Path) -> dict[str, str]:
    """path -> decode, optional, report, either or bounded."""
    with (shared_data / "MANIFEST.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {row["path"]: row["expect"] for row in rows if row["category"] in SPLITS and row["expect"] != "data"}


@pytest.fixture(scope="module")
def indexed(collection: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Ran, Path]:
    out = tmp_path_factory.mktemp("indexed") / "index"
    ran = index(collection, out, "--model", tiny_model)
    assert ran.code == 0, ran.stderr
    return ran, out


def test_every_file_is_embedded_or_quarantined_as_expected(
    indexed: tuple[Ran, Path], expected: dict[str, str]
) -> None:
    ran, out = indexed
    embedded, bad = vectors_by_key(out), quarantine(out)
    assert set(expected) <= set(embedded) | set(bad), "files that are neither: lost"
    wrong: list[tuple[str, str, str]] = []
    for path, expect in expected.items():
        state = "embedded" if path in embedded else bad[path]
        allowed: dict[str, Any] = {
            "decode": state == "embedded",
            "report": state != "embedded",
            "optional": state in ("embedded", "unsupported_format"),
            "either": True,
            "bounded": True,  # what it must keep is time and memory
        }
        if not allowed[expect]:
            wrong.append((path, expect, state))
    assert not wrong, wrong
    assert ran.peak_rss_mb < LANE_RSS_MAX_MB
    assert ran.report["seconds"] < SECONDS_MAX * SLOW_HOST


def test_the_sums_hold_and_equal_bytes_are_computed_once(indexed: tuple[Ran, Path]) -> None:
    ran, out = indexed
    report = ran.report
    assert report["inputs"] == report["embedded"] + report["copied"] + report["quarantined"]
    assert report["pending"] == 0
    by_key = vectors_by_key(out)
    assert report["embedded"] == len({content for content, _ in by_key.values()})
    assert report["embedded"] + report["copied"] == len(by_key)
    assert report["quarantined"] == len(quarantine(out))


def test_birds_have_their_taxa(shared_data: Path, tmp_path: Path, tiny_model: Path) -> None:
    ran = index(shared_data / "photo/birds_cc0", tmp_path / "index", "--model", tiny_model, source="inat2021")
    assert ran.code == 0, ran.stderr
    assert ran.report["embedded"] == 55
    with h5py.File(tmp_path / "index" / "index.h5") as file:
        assert file["embeddings"].shape[0] == 55
        columns = {dataset.attrs["name"] for dataset in file["metadata"].values()}
        assert {"label", "common_name", "family", "genus", "rights_holder", "license"} <= columns
        assert all(file["metadata/family"].asstr()[:])
