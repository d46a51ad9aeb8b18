"""Promise: every input is scored once, whoever does the work, and no lane is left idle while another still has much."""

from __future__ import annotations

import heapq
import json
import math
import os
import re
import shutil
import signal
import time
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noisy_jpeg, write_folder
from runs import index, quarantine, vectors_by_key

from pipeline.bench.null_engine import BATCH, NullEngine, little_stages
from pipeline.config import parse_index
from pipeline.cores import Core, divide, nodes, usable_cores
from pipeline.devices import EngineWish, lane_specs, plan
from pipeline.index import run
from pipeline.lane_process import lane_main
from pipeline.lanes import KILL_S, STOP_GRACE_S, Board, Lane, LaneSpec
from pipeline.messages import Chunk, Claim, Ready, Tick, Verdict
from pipeline.scheduler import CHUNKS_PER_LANE, Sharing
from pipeline.setting import Setting
from pipeline.shares import POLICIES, PROBE_BATCHES, Pace, Static, split
from pipeline.stop import Stop
from pipeline.tune.trial import sample
from pipeline.waits import Wait
from tests.test_never_loses import assert_adds_up, start

HERE = Path(__file__).parent
WAITED_S, ENGINE_S = 3.0, 1.0  # far more than a chunk of ninety little pictures takes


class Shared(NamedTuple):
    rows: int
    end_s: float  # when the last one was done
    lanes: set[str]  # that did any


def share_out(policy_name: str, rows: int, speeds: dict[str, float], batch: int, known: bool = True) -> Shared:
    """The coordinator's loop on a clock of its own; asserts that no row is handed out twice, or never.

    `known`: cards tell the true speed; otherwise all lanes are thought equal until they have done a chunk.
    """
    policy, left, cursor, now_s = POLICIES[policy_name](), rows, 0, 0.0
    chunks: dict[str, list[range]] = {name: [] for name in speeds}
    rates, seen = dict(speeds) if known else dict.fromkeys(speeds, 1e4), set[str]()
    done: list[tuple[str, range]] = []
    ends: list[tuple[float, str]] = []

    def begin(name: str) -> None:
        seconds = math.ceil(len(chunks[name][0]) / batch) * batch / speeds[name]
        heapq.heappush(ends, (now_s + seconds, name))

    while True:
        for _ in range(CHUNKS_PER_LANE):
            for name in speeds:
                if left and len(chunks[name]) < CHUNKS_PER_LANE:
                    paces = {n: Pace(batch, rates[n], sum(map(len, chunks[n])), n in seen) for n in speeds}
                    if count := policy.chunk_rows(name, left, paces, 0):
                        assert 0 < count <= left, "rows that are not there"
                        chunks[name].append(range(cursor, cursor + count))
                        cursor, left = cursor + count, left - count
                        if len(chunks[name]) == 1:
                            begin(name)
        if not ends:
            break
        now_s, name = heapq.heappop(ends)
        done.append((name, chunks[name].pop(0)))
        rates[name] = speeds[name]
        seen.add(name)
        if chunks[name]:
            begin(name)
    assert not left, f"{left} rows were never handed out"
    in_order = sorted((chunk for _, chunk in done), key=lambda chunk: chunk.start)
    assert all(one.stop == other.start for one, other in pairwise(in_order)), "handed out twice"
    return Shared(sum(map(len, in_order)), now_s, {name for name, _ in done})


def best_end_s(rows: int, speeds: list[float], batch: int) -> float:
    """Of all ways to hand out whole batches: each goes to the lane that is through with it first."""
    ends = [(batch / speed, speed) for speed in speeds]
    heapq.heapify(ends)
    for _ in range(math.ceil(rows / batch) - 1):
        end_s, speed = ends[0]
        heapq.heapreplace(ends, (end_s + batch / speed, speed))
    return ends[0][0]


@settings(deadline=None, max_examples=200)
@given(
    batches=st.floats(0.01, 300),
    speeds=st.lists(st.floats(5, 5_000), min_size=1, max_size=7),
    batch=st.sampled_from([1, 7, 32, 256]),
    known=st.booleans(),
)
def test_dynamic_ends_within_batches_of_the_best_that_whole_batches_allow(
    batches: float, speeds: list[float], batch: int, known: bool
) -> None:
    rows, slowest_s = math.ceil(batches * batch), batch / min(speeds)
    end_s = share_out("dynamic", rows, {str(number): speed for number, speed in enumerate(speeds)}, batch, known).end_s
    best_s = best_end_s(rows, speeds, batch)
    if known:
        assert end_s <= best_s + 1.5 * slowest_s
    else:
        assert end_s <= max(best_s, CHUNKS_PER_LANE * PROBE_BATCHES * slowest_s) + 3 * slowest_s


@pytest.mark.parametrize("policy", POLICIES)
@settings(deadline=None, max_examples=100)
@given(
    rows=st.one_of(st.integers(0, 40), st.integers(0, 20_000), st.just(499_999)),
    speeds=st.lists(st.floats(5, 20_000), min_size=1, max_size=9),
    batch=st.sampled_from([1, 7, 32, 256, 2048]),
    known=st.booleans(),
)
def test_every_row_is_handed_out_once(policy: str, rows: int, speeds: list[float], batch: int, known: bool) -> None:
    lanes = {f"lane {number}": speed for number, speed in enumerate(speeds)}
    assert share_out(policy, rows, lanes, batch, known).rows == rows


@pytest.mark.parametrize(
    ("policy", "rows", "batch"),
    [
        ("dynamic", 499_999, 32), ("dynamic", 100_000, 32), ("dynamic", 10_000, 32), ("dynamic", 3_000, 8),
        ("static", 499_999, 32), ("static", 100_000, 32), ("static", 20_000, 32),
    ],
)
def test_lanes_of_speed_1_3_10_end_within_3_percent_of_the_ideal(policy: str, rows: int, batch: int) -> None:
    """Where the slowest has at least some 20 batches to do; with fewer, one batch of its is more than 3 %.

    static needs more: while it measures, the fast ones wait for the slow one.
    """
    speeds = {"slow": 10.0, "middle": 30.0, "fast": 100.0}
    found = share_out(policy, rows, speeds, batch, known=policy == "static")
    assert found.lanes == set(speeds)
    assert found.end_s <= 1.03 * rows / sum(speeds.values())


@given(st.integers(0, 10**9), st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=50))
def test_a_split_has_every_row_and_follows_the_speeds(rows: int, speeds: list[float]) -> None:
    lanes = {str(number): speed for number, speed in enumerate(speeds)}
    shares = split(rows, lanes)
    assert sum(shares.values()) == rows
    for name, share in shares.items():
        assert abs(share - rows * lanes[name] / sum(speeds)) < 1 + 1e-6 * rows


def test_a_lane_that_goes_leaves_its_share_to_the_others() -> None:
    policy = POLICIES["static"]()
    paces = {"a": Pace(8, 100.0), "b": Pace(8, 100.0)}
    first = {name: policy.chunk_rows(name, 10_000, paces, 0) for name in paces}
    left = 10_000 - sum(first.values())
    while left:
        count = policy.chunk_rows("a", left, {"a": paces["a"]}, 1)  # b is starting again, or never comes back
        assert count
        left -= count


def test_static_waits_until_all_lanes_can_be_measured_together() -> None:
    policy = POLICIES["static"]()
    assert policy.chunk_rows("a", 100, {"a": Pace(8, 100.0)}, 1) == 0
    assert policy.chunk_rows("a", 100, {"a": Pace(8, 100.0), "b": Pace(8, 1.0)}, 0) > 0


# ---- cores -------------------------------------------------------------------------------------------------------


def fake_host(folder: Path, sockets: int, cores: int, threads: int) -> Path:
    """/sys of a host whose CPU numbers count all first hardware threads, then all second ones, as Linux does."""
    for thread in range(threads):
        for socket in range(sockets):
            for core in range(cores):
                home = folder / f"cpu{thread * sockets * cores + socket * cores + core}"
                (home / "topology").mkdir(parents=True)
                (home / "cache" / "index3").mkdir(parents=True)
                (home / f"node{socket}").mkdir()
                (home / "topology" / "physical_package_id").write_text(f"{socket}\n")
                (home / "topology" / "core_id").write_text(f"{core}\n")
                (home / "cache" / "index3" / "id").write_text(f"{socket}\n")
    return folder


def test_lanes_get_cores_of_their_own_and_one_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sockets of 28 cores with two hardware threads each: 56 cores, 112 CPUs."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(112)))
    cores = usable_cores(fake_host(tmp_path, 2, 28, 2))
    assert (len(cores), nodes(cores)) == (56, 2)
    assert {len(core.cpus) for core in cores} == {2}
    for lanes in (1, 2, 3, 4, 8, 56):
        bound = [[cpu for core in own for cpu in core.cpus] for own in divide(cores, lanes)]
        assert len(bound) == lanes
        assert sorted(cpu for cpus in bound for cpu in cpus) == list(range(112)), "each CPU belongs to one lane"
        if lanes % 2 == 0:
            assert all(len({(cpu % 56) // 28 for cpu in cpus}) == 1 for cpus in bound), "no lane has two memories"
    assert divide(cores, 57) == [[]] * 57


def test_a_host_that_tells_nothing_is_single_threaded_cores(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == [Core(0, 0, 0, cpu, (cpu,)) for cpu in sorted(os.sched_getaffinity(0))]


# ---- lanes that run ----------------------------------------------------------------------------------------------


def fakes(tmp_path: Path, **orders: object) -> dict[str, str]:
    (tmp_path / "orders.json").write_text(json.dumps(orders))
    return {"PYTHONPATH": str(HERE / "fake_lanes"), "FAKE_LANES": str(tmp_path / "orders.json")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    paths = write_folder(folder, 90)
    shutil.copyfile(paths[3], folder / "copy of 3.jpg")
    (folder / "words.jpg").write_text("not a picture")
    return folder


@pytest.mark.parametrize("policy", POLICIES)
def test_two_lanes_on_one_cpu_give_the_same_index(photos: Path, tmp_path: Path, tiny_model: Path, policy: str) -> None:
    one = index(photos, tmp_path / "one", "--model", tiny_model, "--devices", "cpu")
    args = ["--model", tiny_model, "--devices", "cpu,cpu", "--sharing", policy]
    two = index(photos, tmp_path / "two", *args, env=fakes(tmp_path, start_together=2))
    assert (one.code, two.code) == (0, 0), two.stderr
    assert_adds_up(two)
    assert (two.report["embedded"], two.report["copied"], two.report["quarantined"]) == (90, 1, 1)
    assert vectors_by_key(tmp_path / "one") == vectors_by_key(tmp_path / "two")
    assert "setting: by default" in two.stderr
    bound = [set(json.loads((tmp_path / f"there-cpu-{number}").read_text())) for number in (0, 1)]
    if len(usable_cores()) > 1:
        assert not bound[0] & bound[1], "each lane has cores of its own"


class SlowEngine(NullEngine):
    def result(self, slot: int) -> npt.NDArray[np.float16]:
        time.sleep(ENGINE_S)
        return super().result(slot)


def _slow_lane(spec: LaneSpec, conn: Connection, board: Board) -> None:
    with patch("pipeline.lane_process.open_lane_engine", SlowEngine):
        with patch("pipeline.lane_process.open_stages", little_stages):
            lane_main(spec, conn, board)


def test_a_wait_counts_in_the_second_it_passes_in(
    photos: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lane's time counts from its first chunk on: `static` splits the work by its speed, and lanes do not start
    equally fast. What its threads still wait for when the chunk ends counts as well."""
    cfg = parse_index(["--source", "folder", "--root", str(photos), "--model", str(tiny_model), "--devices", "cpu"])
    (spec,) = lane_specs(cfg.devices, cfg.source, EngineWish(cfg.artifact, "auto", "auto"), tmp_path)
    (tmp_path / "shards").mkdir()
    monkeypatch.setattr("pipeline.lanes._child", _slow_lane)
    rows, lane = sample(cfg.source), Lane.start(spec)
    assert len(rows) <= BATCH
    try:
        assert isinstance(lane.hear(), Ready)
        time.sleep(WAITED_S)
        start_s = time.monotonic()
        lane.give(Chunk(1, tmp_path / "shards" / "000001.h5", rows))
        while not isinstance(told := lane.hear(), Tick):
            assert isinstance(told, Claim), told
            lane.tell(Verdict([True] * len(told.hashes)))
        assert ENGINE_S <= told.seconds <= time.monotonic() - start_s
        # The decoder was through long before the engine, and its reader before that.
        assert 0.8 * ENGINE_S < told.decode_wait_s < 1.01 * told.seconds
        assert told.encode_wait_s < 1.01 * told.seconds - ENGINE_S
    finally:
        lane.kill()


def test_a_wait_is_told_as_it_passes_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: now_s)
    monkeypatch.setattr("pipeline.waits.time", clock)
    now_s, wait = 10.0, Wait()
    assert wait.untold_s() == 0
    with wait:
        now_s = 13.0
        assert wait.untold_s() == 3
        now_s = 14.0
    now_s = 20.0
    assert wait.untold_s() == 1
    with wait:
        now_s = 22.0
    with wait:
        now_s = 23.0
    assert wait.untold_s() == 3
    assert wait.untold_s() == 0


def test_a_lane_that_is_alone_cuts_no_little_chunks() -> None:
    """Each costs, and there is nobody to leave the rest to; but for one that is still starting."""
    alone, two = {"a": Pace(256, 300.0)}, {"a": Pace(256, 300.0), "b": Pace(256, 300.0)}
    ask = POLICIES["dynamic"]().chunk_rows
    assert [ask("a", left, alone, 0) for left in (10_000, 3000, 300, 7)] == [4608, 3000, 300, 7]
    assert ask("a", 100_000, {"a": Pace(256, 10_000.0)}, 0) == 16_384
    assert ask("a", 3000, alone, 1) == ask("a", 6000, two, 0) == 768
    for rows_per_s, rows in ((5000.0, PROBE_BATCHES * 256), (10_000.0, 1024), (40_000.0, 3000)):  # .1 s by its card
        unseen = {"a": Pace(256, rows_per_s, seen=False)}
        assert ask("a", 3000, unseen, 0) == rows
        assert ask("a", 30_000, unseen | {"b": Pace(256, 300.0)}, 0) == PROBE_BATCHES * 256


def test_lanes_that_are_bound_to_no_cores_share_what_there_is(
    photos: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two memories, a quota of four cores: a lane by default for each memory, none where one core is left."""
    monkeypatch.setattr("pipeline.devices.nodes", lambda _: 2)
    monkeypatch.setattr("pipeline.devices.divide", lambda cores, lanes: [[]] * lanes)
    arguments = ["--source", "folder", "--root", str(photos), "--model", str(tiny_model), "--devices", "cpu"]
    for cores, shares in ((4, [2, 2]), (3, [1, 2]), (1, [1])):
        monkeypatch.setattr("pipeline.devices.physical_cores", lambda cores=cores: cores)
        cfg = parse_index(arguments)
        specs = lane_specs(cfg.devices, cfg.source, EngineWish(cfg.artifact, "auto", "auto"), tmp_path)
        assert [spec.cores for spec in specs] == shares
        assert [spec.engine_threads for spec in specs] == [spec.decode_threads for spec in specs] == shares


@settings(max_examples=200, deadline=None)
@given(
    sockets=st.integers(1, 4), cores=st.integers(1, 40), threads=st.integers(1, 2), quota=st.integers(1, 160),
    gpus=st.integers(0, 4), cpus=st.integers(0, 5), lanes=st.integers(1, 6), decode_threads=st.integers(1, 64),
    tuned=st.booleans(),
)  # fmt: skip
def test_threads_of_all_lanes_never_exceed_the_cores(
    sockets: int, cores: int, threads: int, quota: int, gpus: int, cpus: int, lanes: int, decode_threads: int,
    tuned: bool,
) -> None:  # fmt: skip
    """Whatever the host, the quota and the mix, and with what was tuned for GPUs alone; a lane has one at least."""
    names = tuple([f"gpu:{number}" for number in range(gpus)] + ["cpu"] * cpus) or ("cpu",)
    host = [
        Core(number // cores, 0, 0, number, tuple(number * threads + thread for thread in range(threads)))
        for number in range(sockets * cores)
    ]
    quota = min(quota, len(host))
    card = SimpleNamespace(rows_per_s=1.0, bytes=1, batch=8, row_shape=(3, 8, 8))
    wish = cast(EngineWish, SimpleNamespace(runtime="auto", choice=lambda kind: SimpleNamespace(card=card)))
    trial = Setting(lanes, 1, decode_threads, 2) if tuned and gpus else None
    with (
        patch("pipeline.devices.usable_cores", lambda: host),
        patch("pipeline.devices.physical_cores", lambda: quota),
        patch("pipeline.devices.tuned_for", lambda choice, names: (None, "never")),
    ):
        planned = plan(names, wish, "", trial=trial).lanes
    assert sum(lane.cores for lane in planned) <= max(quota, len(planned))
    for lane in planned:
        assert max(lane.setting.engine_threads, lane.setting.decode_threads) <= lane.cores
        assert lane.setting.engine_threads >= 1
    of_cpu = [set(lane.cpus) for lane in planned if lane.device == "cpu"]
    of_gpu = set().union(*(lane.cpus for lane in planned if lane.device != "cpu"))
    if 1 < len(planned) <= len(host) and of_cpu:  # else nobody is bound
        assert all(of_cpu)
        assert sum(map(len, of_cpu)) + len(of_gpu) == len(host) * threads, "nobody shares a core with a CPU lane"
        assert len(set().union(*of_cpu) | of_gpu) == len(host) * threads
    else:
        assert not any(of_cpu)
        assert not of_gpu


def test_cpu_lanes_that_do_not_fit_are_exit_2(photos: Path, tmp_path: Path, tiny_model: Path) -> None:
    env = fakes(tmp_path, memory_bytes=300 << 20)
    ran = index(photos, tmp_path / "index", "--model", tiny_model, "--devices", "cpu,cpu", env=env)
    assert ran.code == 2
    assert "2 CPU lanes need about 0.4 GB, here are 0.3 GB" in ran.report["error"]


def test_lanes_of_speed_1_3_10_share_by_speed(tmp_path: Path, tiny_model: Path) -> None:
    """Real processes around an engine of a speed to order. Each is busy until nearly the end."""
    write_folder(tmp_path / "photos", 2000)
    env = fakes(tmp_path, rows_per_s={"cpu/0": 20, "cpu/1": 60, "cpu/2": 200}, batch=4, start_together=3)
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, "--devices", "cpu,cpu,cpu", env=env)
    assert ran.code == 0, ran.stderr
    assert ran.report["embedded"] == 2000
    spans = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("span-*.json"))]
    start_s, end_s = min(span["first_s"] for span in spans), max(span["last_s"] for span in spans)
    speeds = [span["rows"] / (span["last_s"] - span["first_s"]) for span in spans]
    # An engine has the speed it was ordered to have only where it never waits for pictures.
    assert speeds == pytest.approx([20, 60, 200], rel=0.05)
    # Ideal: nobody waits for anybody.
    ideal_s = 2000 / sum(speeds)
    assert end_s - start_s <= 1.03 * ideal_s, spans


# ---- pictures that are no engine's fault, and readers that are --------------------------------------------------


def test_a_picture_without_a_finite_vector_costs_one_picture(tmp_path: Path, tiny_model: Path) -> None:
    paths = write_folder(tmp_path / "photos", 40)
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, env=fakes(tmp_path, nan_every=40))
    assert ran.code == 0, ran.stderr
    assert_adds_up(ran)
    assert (ran.report["embedded"], ran.report["quarantined"]) == (len(paths) - 1, 1)
    assert list(quarantine(tmp_path / "index").values()) == ["corrupt"]


def test_an_engine_that_gives_no_finite_vector_at_all_ends_the_run(tmp_path: Path, tiny_model: Path) -> None:
    write_folder(tmp_path / "photos", 40)
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, env=fakes(tmp_path, nan_every=1))
    assert ran.code == 1
    assert "no finite vector for a whole batch" in ran.report["error"]
    assert quarantine(tmp_path / "index") == {}


@pytest.mark.parametrize(("mark", "reason"), [(b"READ-ABORT", "decoder_crash"), (b"READ-HANG", "read_error")])
def test_a_reader_that_dies_or_hangs_costs_one_picture(
    tmp_path: Path, tiny_model: Path, mark: bytes, reason: str
) -> None:
    paths = write_folder(tmp_path / "photos", 42)
    paths[30].write_bytes(noisy_jpeg(30) + mark)
    env = fakes(tmp_path, read_deadline_s=3.0)
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, env=env)
    assert ran.code == 0, ran.stderr
    assert_adds_up(ran)
    assert quarantine(tmp_path / "index") == {"even/00030.jpg": reason}
    assert ran.report["embedded"] == 41


def test_a_source_that_never_answers_ends_the_run(tmp_path: Path, tiny_model: Path) -> None:
    for number, path in enumerate(write_folder(tmp_path / "photos", 8)):
        path.write_bytes(noisy_jpeg(number) + b"READ-HANG")
    env = fakes(tmp_path, read_deadline_s=1.0)
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, env=env)
    assert ran.code == 1
    assert "is it there, and does it answer?" in ran.report["error"]


def test_a_mount_that_goes_away_does_not_stop_who_watches_for_it(tmp_path: Path, tiny_model: Path) -> None:
    """Chunks of some 300 KB, more than a pipe holds: the coordinator sends the next one to a lane that is stuck."""
    deep = tmp_path.joinpath("photos", *["long name " * 20] * 8)
    paths = write_folder(deep, 400)
    first = sorted(paths)[8]  # of the second chunk, when the first has not been done
    first.write_bytes(noisy_jpeg(1000) + b"READ-HANG")
    env = fakes(tmp_path, read_deadline_s=3.0, batch=4, rows_per_s={"cpu/0": 100})
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, env=env)
    assert ran.code == 0, ran.stderr
    assert_adds_up(ran)
    assert list(quarantine(tmp_path / "index").values()) == ["read_error"]


def test_equal_files_that_do_not_decode_are_looked_at_a_few_times(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crawl saves its error page ten thousand times: not one pass over all that are left for each of some of them."""
    for path in write_folder(tmp_path / "photos", 310)[10:]:
        path.write_bytes(b"<html>403</html>")
    passes, another_pass = [], Sharing._another_pass

    def counted(sharing: Sharing) -> bool:
        passes.append(sharing.left)
        return another_pass(sharing)

    monkeypatch.setattr(Sharing, "_another_pass", counted)
    options = ["--source", "folder", "--root", str(tmp_path / "photos"), "--out", str(tmp_path / "index")]
    report = run(parse_index([*options, "--model", str(tiny_model)]), Stop())
    assert (report.embedded, report.quarantined) == (10, 300)
    assert set(quarantine(tmp_path / "index").values()) == {"not_an_image"}
    assert len(passes) <= 6


def test_an_engine_that_dies_condemns_no_picture(tmp_path: Path, tiny_model: Path) -> None:
    """Pictures are being decoded when it dies, so they are tried alone: then it dies with nothing being decoded."""
    write_folder(tmp_path / "photos", 12)
    env = fakes(tmp_path, batch=2, decode_s=0.2, engine_dies_s=0.1)
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, env=env)
    assert ran.code == 1
    assert re.search("[1-9] of them alone", ran.stderr), "it died before anything was decoded"
    assert "a fault of the engine" in ran.report["error"]
    assert set(quarantine(tmp_path / "index").values()) <= {"read_error"}, "not tried again by the next run"


def test_a_stop_while_a_slow_disk_writes_a_shard_takes_no_grace(tmp_path: Path, tiny_model: Path) -> None:
    """All buffers are full then and wait for the engine, which drops them: the decoder has to get one back."""
    write_folder(tmp_path / "photos", 200)
    env = fakes(tmp_path, batch=4, write_s=2.0)
    child = start(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, env=env)
    while len(list(tmp_path.glob("writing-*"))) < 2 and child.poll() is None:
        time.sleep(0.01)
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    start_s = time.monotonic()
    child.communicate(timeout=60)
    assert child.returncode == 130
    assert time.monotonic() - start_s < STOP_GRACE_S / 2


def test_a_run_of_little_more_than_a_measurement_is_shared_all_the_same() -> None:
    """16 batches of 8 would be all of it: the first lane that asks got it, and the others nothing."""
    policy = Static()
    paces = {"gpu:0/0": Pace(8, 100.0), "gpu:1/1": Pace(8, 100.0), "cpu/2": Pace(8, 50.0)}
    given, left = [], 124
    for name in paces:
        given.append(policy.chunk_rows(name, left, paces, 0))
        left -= given[-1]
    assert given == [48, 48, 28]


def test_static_measures_a_fast_lane_for_a_second() -> None:
    """16 batches would be .27 s of a GPU's work, with the filling of its line in it."""
    paces = {"gpu": Pace(256, 15_000.0), "cpu": Pace(64, 100.0)}
    static = Static()
    assert static.chunk_rows("gpu", 10**6, paces, 0) == pytest.approx(15_000, rel=0.01)
    assert static.chunk_rows("cpu", 10**6, paces, 0) == pytest.approx(300, abs=32)


def test_a_lane_that_a_driver_holds_does_not_hold_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, it lives on in the kernel, and no end of file comes."""
    spec = cast(Any, SimpleNamespace(name="gpu:0/0", source=SimpleNamespace(container_of=str)))
    sharing, buried, kills = Sharing(cast(Any, None), [spec], lambda: False, lambda *_: None), [], []
    monkeypatch.setattr(sharing, "_bury", lambda lane, lost: buried.append(lane))
    board = Board(1)
    board.start(0, 7, -1.0)
    lane = Lane(spec, SimpleNamespace(kill=lambda: kills.append("killed")), cast(Any, None), board)
    sharing.lanes = [lane]
    for _ in range(2):
        sharing._kill_the_hung()
        assert (kills, buried) == (["killed"], [])
    lane.hung_until_s -= KILL_S
    sharing._kill_the_hung()
    assert (kills, buried) == (["killed"], [lane])
