"""Promise: whatever ends lanes, the run ends too and says why, and no picture pays for what others or the host did."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import noisy_jpeg, write_folder
from runs import Ran, index, quarantine
from test_sharing import fakes

from pipeline import blame
from pipeline.blame import LANE_DEATHS_MAX, LANE_KILLS_MAX
from pipeline.config import parse_index
from pipeline.exits import INTERRUPTED
from pipeline.index import Report, run
from pipeline.scheduler import LaneFailed
from pipeline.stop import Stop
from tests.test_never_loses import assert_adds_up

BROKEN_DECODER = str(Path(__file__).parent / "broken_decoder")


def deaths(ran: Ran) -> int:
    return ran.stderr.count(" died (exit code")


def mark(paths: list[Path], *numbers: int, end: bytes = b"DECODE-KILL") -> None:
    for number in numbers:
        paths[number].write_bytes(noisy_jpeg(1000 + number) + end)


# ---- killed, as for want of memory -------------------------------------------------------------------------------


def test_a_picture_whose_lane_is_killed_each_time_waits_for_the_next_run(tmp_path: Path, tiny_model: Path) -> None:
    paths = write_folder(tmp_path / "photos", 42)
    mark(paths, 30)
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, env=fakes(tmp_path))
    assert ran.code == 0, ran.stderr
    assert_adds_up(ran)
    assert quarantine(tmp_path / "index") == {"even/00030.jpg": "read_error"}
    assert (ran.report["embedded"], deaths(ran)) == (41, 3), "one in a chunk, two with it alone"
    assert "killed, mostly for want of memory" in ran.stderr
    again = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model)
    assert (again.report["embedded"], again.report["quarantined"]) == (1, 0)


def test_lanes_that_are_killed_whatever_they_do_end_the_run(tmp_path: Path, tiny_model: Path) -> None:
    paths = write_folder(tmp_path / "photos", 42)
    mark(paths, *range(42))
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, env=fakes(tmp_path))
    assert ran.code == 1
    assert "cpu/0 was killed 3 times in a row" in ran.report["error"]
    for remedy in ("raise the limit", "fewer lanes (--devices)", "pipeline.tune --max-memory", "goes on there"):
        assert remedy in ran.report["error"]
    assert quarantine(tmp_path / "index") == {}, "nobody was shown to be guilty"


def test_lanes_that_are_killed_by_all_but_single_rows_end_the_run(tmp_path: Path, tiny_model: Path) -> None:
    write_folder(tmp_path / "photos", 60)
    env = fakes(tmp_path, kill_rows=2, batch=4, decode_s=0.1)
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, env=env)
    assert ran.code == 1
    assert "cpu/0 was killed 3 times in a row" in ran.report["error"]
    assert "2 of them alone" in ran.stderr, "those that were being decoded are tried"
    assert (deaths(ran), quarantine(tmp_path / "index")) == (3, {})


def test_a_lane_that_is_killed_whatever_it_does_leaves_its_work_to_the_other(tmp_path: Path, tiny_model: Path) -> None:
    write_folder(tmp_path / "photos", 60)
    speeds = {"cpu/0": 10, "cpu/1": 10}  # so that there is work left when the fourth judgement is due
    env = fakes(tmp_path, kill_lane="cpu/0", wait_for_kill=2, batch=4, start_together=2, rows_per_s=speeds)
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, "--devices", "cpu,cpu", env=env)
    assert ran.code == 0, ran.stderr
    # Four where the third death left a question open: it had a picture alone.
    words = r"cpu/0 is given up, the run goes on with cpu/1: cpu/0 was killed [34] times in a row"
    assert re.search(words, ran.stderr), ran.stderr
    assert (ran.report["embedded"], quarantine(tmp_path / "index")) == (60, {})


def test_a_night_that_has_only_huge_pictures_left_ends_well(tmp_path: Path, tiny_model: Path) -> None:
    """They are tried again every night. No other picture is there to show that lanes work: the index is."""
    photos, out = tmp_path / "photos", tmp_path / "index"
    paths = write_folder(photos, 12)
    assert index(photos, out, "--model", tiny_model).code == 0
    mark(paths, 2, 5, 7)
    ran = index(photos, out, "--model", tiny_model, env=fakes(tmp_path))
    assert ran.code == 0, ran.stderr
    assert_adds_up(ran)
    assert set(quarantine(out).values()) == {"read_error"}
    assert (ran.report["quarantined"], ran.report["unchanged"]) == (3, 9)
    assert LANE_DEATHS_MAX < deaths(ran) <= LANE_KILLS_MAX


def test_a_lane_killed_by_hand_costs_no_picture(tmp_path: Path, tiny_model: Path) -> None:
    """Twice, the second time just when it has one picture alone."""
    paths = write_folder(tmp_path / "photos", 42)
    mark(paths, 30)
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, env=fakes(tmp_path, kills=2))
    assert ran.code == 0, ran.stderr
    assert (deaths(ran), ran.report["embedded"], quarantine(tmp_path / "index")) == (2, 42, {})


# ---- one verdict for each content, one container for each container ----------------------------------------------


def test_copies_of_a_picture_that_crashes_the_decoder_are_judged_once(tmp_path: Path, tiny_model: Path) -> None:
    paths = write_folder(tmp_path / "photos", 60)
    for path in paths[10:]:
        path.write_bytes(noisy_jpeg(7) + b"CRASH-HERE")
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, env={"PYTHONPATH": BROKEN_DECODER})
    assert ran.code == 0, ran.stderr
    assert_adds_up(ran)
    assert (ran.report["embedded"], ran.report["quarantined_new"]) == (10, 50)
    assert set(quarantine(tmp_path / "index").values()) == {"decoder_crash"}
    assert deaths(ran) == 2


def write_parquet(path: Path, first_seed: int, end: bytes = b"") -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": [noisy_jpeg(first_seed + row) + end for row in range(20)]}), path)


@pytest.mark.parametrize(("end", "reason"), [(b"READ-ABORT", "decoder_crash"), (b"READ-KILL", "read_error")])
def test_a_container_that_takes_its_reader_down_again_and_again_is_left_alone(
    tmp_path: Path, tiny_model: Path, end: bytes, reason: str
) -> None:
    write_parquet(tmp_path / "tables" / "a.parquet", 0, end)
    write_parquet(tmp_path / "tables" / "b.parquet", 100)
    options = ["--model", tiny_model]
    ran = index(tmp_path / "tables", tmp_path / "index", *options, source="parquet", env=fakes(tmp_path))
    assert ran.code == 0, ran.stderr
    assert_adds_up(ran)
    assert quarantine(tmp_path / "index") == {f"a.parquet/{row:08d}": reason for row in range(20)}
    assert ran.report["embedded"] == 20
    assert deaths(ran) <= 3 + 2 * 3 + 3, "not one death for each of its pictures"


def test_files_that_take_their_reader_down_cost_their_folder_nothing(tmp_path: Path, tiny_model: Path) -> None:
    paths = write_folder(tmp_path / "photos", 40)
    mark(paths, 10, 12, 14, 16, end=b"READ-ABORT")
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, env=fakes(tmp_path))
    assert ran.code == 0, ran.stderr
    assert quarantine(tmp_path / "index") == {f"even/000{number}.jpg": "decoder_crash" for number in (10, 12, 14, 16)}
    assert ran.report["embedded"] == 36


# ---- a stop ------------------------------------------------------------------------------------------------------


def run_until(tmp_path: Path, tiny_model: Path, there: Callable[[], bool], *args: str) -> Report:
    """A run in this process that is stopped as soon as something is `there`."""
    options = ["--source", "folder", "--root", str(tmp_path / "photos"), "--out", str(tmp_path / "index")]
    stop = Stop()

    def watch() -> None:
        while not there():
            time.sleep(0.01)
        stop.requested = True
        time.sleep(1)
        (tmp_path / "write").touch()

    threading.Thread(target=watch, daemon=True).start()
    return run(parse_index([*options, "--model", str(tiny_model), *args]), stop)


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def give(**orders: object) -> None:
        for name, value in fakes(tmp_path, **orders).items():
            monkeypatch.setenv(name, value)

    return give


def test_a_lane_that_dies_once_too_often_while_a_run_is_stopped_does_not_fail_it(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, order: Callable[..., None]
) -> None:
    write_folder(tmp_path / "photos", 40)
    order(write_s=1.0, write_dies=True)
    monkeypatch.setattr(blame, "LANE_DEATHS_MAX", 1)
    report = run_until(tmp_path, tiny_model, lambda: bool(list(tmp_path.glob("writing-*"))))
    assert (report.exit, report.pending, report.quarantined) == (INTERRUPTED, 40, 0)


def test_a_lane_that_breaks_while_a_run_is_stopped_costs_the_others_nothing(
    tmp_path: Path, tiny_model: Path, order: Callable[..., None]
) -> None:
    """It is a bug of ours, so it is told; but not before what the others have done is committed."""
    write_folder(tmp_path / "photos", 60)
    order(write_fails="cpu/0", write_s=1.0, batch=4, rows_per_s={"cpu/0": 20, "cpu/1": 20}, start_together=2)
    with pytest.raises(LaneFailed, match="no shard today"):
        run_until(tmp_path, tiny_model, lambda: len(list(tmp_path.glob("span-*"))) == 2, "--devices", "cpu,cpu")
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, env={"PYTHONPATH": ""})
    assert ran.report["unchanged"] > 0
