"""What a night costs by the size of the index, in statements, rows and bytes: these hold on a noisy host."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pipeline.bench.nights import SCOPE, SPACE, listing, make_manifest, night, observe
from pipeline.store import ShardInfo, Store, amend
from pipeline.store.places import DataFile
from pipeline.store.table import shown_by

KEYS = 20_000


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("manifest") / "index"
    make_manifest(out, KEYS)
    return out


def test_a_quiet_night_reads_each_key_once_and_writes_no_row(manifest: Path) -> None:
    statements: list[str] = []
    with Store.open(manifest, SPACE, 8) as store:
        store.begin_run(SCOPE)
        store._db.set_trace_callback(statements.append)
        observe(store, listing(0, KEYS))
        assert store.listing_preview() == (0, KEYS)
        assert store.finish_listing() == 0
    assert sum("json_array" in one and "key BETWEEN" in one for one in statements) == KEYS // 2000
    assert len(statements) < 2 * KEYS // 2000 + 20, "a range is counted before it is read"
    assert not [one for one in statements if one.startswith(("UPDATE input", "INSERT INTO input"))]


def test_memory_of_a_listing_is_a_byte_a_key(manifest: Path) -> None:
    with Store.open(manifest, SPACE, 8) as store:
        store.begin_run(SCOPE)
        observe(store, listing(0, KEYS))
        assert store.listing._seen.nbytes <= 2 * KEYS
        assert np.count_nonzero(store.listing._seen) == KEYS


@pytest.mark.parametrize("order", ["sorted", "reversed", "gaps"])
def test_any_order_of_listing_finds_the_same(manifest: Path, order: str) -> None:
    """Sorted keys are read as one range, others one by one, and so are the few of a range that is full of others."""
    items = list(listing(0, KEYS))
    items = {"sorted": items, "reversed": items[::-1], "gaps": items[::9]}[order]
    with Store.open(manifest, SPACE, 8) as store:
        store.begin_run(SCOPE)
        found = [store.observe(items[first : first + 1500]) for first in range(0, len(items), 1500)]
        assert sum(one.unchanged for one in found) == len(items)
        assert sum(one.new + one.changed + one.relabelled + one.repeated for one in found) == 0
        assert store.listing_preview() == (KEYS - len(items), KEYS)


def test_the_order_of_a_table_is_worked_out_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, count = 20_000, 50
    monkeypatch.setattr(amend, "ID_PIECE", rows)
    infos = [ShardInfo(f"shards/{number}.h5", rows, 8, 0, "", 0) for number in range(count)]
    nothing = np.empty((0, 2), np.int64)
    files = [DataFile(at, info, np.arange(rows) + at * rows, nothing) for at, info in enumerate(infos)]
    order = np.arange(rows * count)
    other = np.append(order[:-1], 0)
    tracemalloc.start()
    shown = sum(len(ids) for ids in shown_by(files))
    first_moved = [amend._first_moved(one) for one in (order, order[::-1], other, order[:1])]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shown == rows * count - 1, "who shows a row is a number above 0"
    assert first_moved == [rows * count, 0, rows * count - 1, 1]
    assert peak < 4 * 8 * rows, f"{peak:,} bytes"


def test_renaming_everything_embeds_nothing(tmp_path: Path) -> None:
    night(tmp_path, 8, 0, 5000, 0)
    found = night(tmp_path, 8, 5000, 0, 5000)
    assert (found["embedded"], found["copied"], found["gone"]) == (0, 5000, 5000)
