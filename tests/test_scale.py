"""What a night costs by the size of the index, in statements, rows and bytes: these hold on a noisy host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.bench.nights import SCOPE, SPACE, listing, make_manifest, night, observe
from pipeline.store import Store

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


def test_renaming_everything_embeds_nothing(tmp_path: Path) -> None:
    night(tmp_path, 8, 0, 5000, 0)
    found = night(tmp_path, 8, 5000, 0, 5000)
    assert (found["embedded"], found["copied"], found["gone"]) == (0, 5000, 5000)
