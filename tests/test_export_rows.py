"""Rows of an index leave it whole, for Arrow, Parquet, USearch and FAISS, and the documented example runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import write_folder
from runs import index as run_index
from store_model import run, some, vector_of

from pipeline.bench.processes import Limit
from pipeline.bench.size import size
from pipeline.search import Index, Where
from pipeline.search.export_rows import batches, to_faiss, to_parquet, to_usearch

PICTURES = some(300)
METADATA = {key: {"label": f"label {number % 3}", "stars": number, "weight": number / 2}
            for number, key in enumerate(PICTURES) if number % 10}  # fmt: skip
QUERY = vector_of(b"question")
WHERE = Where(label="label 1")


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    run(tmp_path / "index", PICTURES, metadata=METADATA)
    with Index.open(tmp_path / "index") as opened:
        yield opened


def check(index: Index, table: pa.Table, keys: set[str]) -> None:
    rows = table["row"].to_numpy()
    assert table["key"].to_pylist() == index.generation.keys(rows)
    assert set(table["key"].to_pylist()) == keys
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), index.vectors(rows))
    for key, values in zip(table["key"].to_pylist(), table["metadata"].to_pylist(), strict=True):
        assert {name: value for name, value in values.items() if value is not None} == METADATA.get(key, {})


@pytest.mark.parametrize("where", [Where(), WHERE], ids=["all", "filtered"])
def test_arrow_and_parquet_have_every_row_that_passes(where: Where, index: Index, tmp_path: Path) -> None:
    keys = {key for key in PICTURES if where == Where() or METADATA.get(key, {}).get("label") == where.label}
    parts = list(batches(index, where, rows_max=70))
    assert all(part.num_rows <= 70 for part in parts)
    check(index, pa.Table.from_batches(parts), keys)
    assert to_parquet(index, str(tmp_path / "rows.parquet"), where) == len(keys)
    check(index, pq.read_table(tmp_path / "rows.parquet"), keys)


def test_an_index_without_metadata_is_exported_too(tmp_path: Path) -> None:
    run(tmp_path / "index", {"a.jpg": b"a"})
    with Index.open(tmp_path / "index") as index:
        assert to_parquet(index, tmp_path / "rows.parquet") == 1
    assert pq.read_table(tmp_path / "rows.parquet").column_names == ["row", "key", "mark", "embedding"]


def test_usearch_and_faiss_find_what_the_index_finds(index: Index, tmp_path: Path) -> None:
    from pipeline.search.usearch_lib import Index as UsearchIndex

    want = index.search(QUERY, 9, where=WHERE)
    assert to_usearch(index, str(tmp_path / "rows.usearch"), WHERE) == want.total
    found = UsearchIndex.restore(tmp_path / "rows.usearch").search(QUERY, 9)
    np.testing.assert_array_equal(found.keys.astype(np.int64), want.rows)
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed: make test brings it")
    assert to_faiss(index, str(tmp_path / "rows.faiss"), WHERE) == want.total
    scores, rows = faiss.read_index(str(tmp_path / "rows.faiss")).search(QUERY[None].astype(np.float32), 9)
    np.testing.assert_array_equal(rows[0], want.rows)
    np.testing.assert_allclose(scores[0], want.scores, atol=2e-3)


def test_the_documented_example_runs(tiny_model: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", 40)
    assert run_index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model).code == 0
    example = Path(__file__).resolve().parents[1] / "examples" / "ask_an_index.py"
    command = [sys.executable, str(example), str(tmp_path / "index"), "a blue star"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "rows in Parquet: 40" in ran.stdout
    assert "only 'even': 20 pictures" in ran.stdout


def test_smaller_vectors_are_measured_against_the_whole_ones(tmp_path: Path) -> None:
    run(tmp_path / "index", some(300))
    *_, last = size(tmp_path / "index", Limit(60))
    forms = {row["form"]: row for row in last["forms"]}
    assert [row["bytes a row"] for row in forms.values()] == [16, 8, 1, 8, 4, 2]
    recall, again = ([row[name] for row in forms.values()] for name in ("recall@10", "after re-rank of 100"))
    assert recall[0] == again[0] == 1.0
    assert recall[1] > 0.9, "a byte a dimension loses little"
    assert recall[2] < recall[1], "a bit loses more"
    assert recall[3] > recall[4] > recall[5], "the more dimensions are left out, the more is lost"
    assert all(better >= plain for plain, better in zip(recall, again, strict=True))
