"""After each fault the index opens, shows one night or the other, resumes, and equals the undisturbed one.

Whole runs of `pipeline.index`, forked from a resident process (tests/faults), with a shim that breaks any call that
changes the index. Here a sample of the calls and a few cycles; `make soak` takes every call and a thousand cycles.
"""

from __future__ import annotations

import errno
import gc
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import quarantine, vectors_by_key

sys.path.insert(0, str(Path(__file__).parent / "faults"))

from resident import Fault, Order, Outcome, Resident, build_shim
from world import BAD, Shown, World

CALLS_TRIED = 5  # of each kind of fault; a night has 200 to 300


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Resident]:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: it compiles the shim that makes calls fail")
    with Resident(build_shim(tmp_path_factory.mktemp("shim"))) as process:
        yield process


class Night:
    """An index of some nights, and one more night's changes that are not in it yet."""

    def __init__(self, world: World, resident: Resident) -> None:
        chance = random.Random(5)
        self.world, self.resident = world, resident
        world.fill(chance, 40)
        for _ in range(4):
            world.one_day(chance)
            world.assert_equals_undisturbed(resident.run(world.order()))
        self.before, _ = world.expected()
        self.base = world.out.with_name("base")
        shutil.copytree(world.out, self.base, symlinks=True)
        world.one_day(chance)
        for number, content in enumerate(BAD):
            world.write(f"bad/{number}.jpg", content)
        self.after, _ = world.expected()
        ran = resident.run(world.order(fault=Fault(str(world.out))))
        world.assert_equals_undisturbed(ran)
        self.calls = ran.calls

    def disturbed(self, **order: object) -> Outcome:
        """The night's run from the same start, with this fault."""
        shutil.rmtree(self.world.out)
        shutil.copytree(self.base, self.world.out, symlinks=True)
        return self.resident.run(self.world.order(**order))

    def assert_recovers(self, *also: Shown) -> None:
        self.world.assert_readers_see(self.before, self.after, *also)
        self.world.assert_equals_undisturbed(self.resident.run(self.world.order()))


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, resident: Resident) -> Night:
    return Night(World.make(tmp_path_factory.mktemp("night"), tiny_model, resident), resident)


def assert_one_line(ran: Outcome) -> None:
    """It failed as a command fails: exit 1 and the reason, also in the last line of stdout."""
    assert ran.code == 1, ran.stderr
    assert "Traceback" not in ran.stderr, ran.stderr
    assert "\nerror: " in ran.stderr, ran.stderr
    assert ran.report["exit"] == 1
    assert ran.report["error"]


def some_calls(night: Night, kind: str) -> list[int]:
    return sorted(random.Random(kind).sample(range(1, night.calls + 1), CALLS_TRIED))


def test_killed_at_any_call(night: Night) -> None:
    for at in some_calls(night, "run"):
        ran = night.disturbed(fault=Fault(str(night.world.out), at, kills="run"))
        assert ran.code == -9, ran.stderr
        night.assert_recovers()


def test_lanes_killed_at_any_call(night: Night) -> None:
    """The run goes on with another one and nobody notices."""
    for at in (1, 3, 5):
        ran = night.disturbed(fault=Fault(str(night.world.out), at, kills="lane"))
        assert ran.code == 0, ran.stderr
        assert "died" in ran.stderr, ran.stderr
        night.world.assert_readers_see(night.after)
        night.assert_recovers()


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EIO", "EMFILE"])
def test_any_call_that_fails(night: Night, name: str) -> None:
    """A full disk, one gone read-only, a sick one (one error), no descriptors: one line, and nothing lost."""
    for at in some_calls(night, name):
        fault = Fault(str(night.world.out), at, error=getattr(errno, name), sticky=name != "EIO")
        ran = night.disturbed(fault=fault)
        if ran.code != 0:  # what cannot be deleted, or is done again, may be left for the next run
            assert_one_line(ran)
        night.assert_recovers()


def test_pictures_that_cannot_be_read_tonight(night: Night) -> None:
    """EIO on every picture from the k-th read on: told as read errors, served as they were, read tomorrow."""
    for at in (1, 4, 11):
        ran = night.disturbed(fault=Fault(str(night.world.folder), at, error=errno.EIO, sticky=True, reads=True))
        assert ran.code == 0, ran.stderr
        assert ran.report["quarantined_new"] > 0
        night.world.assert_equals_undisturbed(night.resident.run(night.world.order()))


def test_a_manifest_that_cannot_be_read(night: Night) -> None:
    for at in (1, 3, 9, 27):
        ran = night.disturbed(fault=Fault(str(night.world.out), at, error=errno.EIO, reads=True))
        if ran.code != 0:
            assert_one_line(ran)
        night.assert_recovers()


# ---- whole nights ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calls_of_a_night(night: Night) -> int:
    ran = a_night(night, fault=Fault(str(night.world.out)))
    night.world.assert_equals_undisturbed(ran)
    return ran.calls


def a_night(night: Night, **order: object) -> Outcome:
    shutil.rmtree(night.world.out)
    shutil.copytree(night.base, night.world.out, symlinks=True)
    return night.resident.run(night.world.night(**order))  # type: ignore[arg-type]


def assert_next_night_recovers(night: Night) -> None:
    night.world.assert_readers_see(night.before, night.after)
    night.world.assert_equals_undisturbed(night.resident.run(night.world.night()))


def test_nights_that_are_killed(night: Night, calls_of_a_night: int) -> None:
    chance = random.Random(3)
    at_calls = [
        {"fault": Fault(str(night.world.out), chance.randrange(1, calls_of_a_night + 1), kills="run")} for _ in range(2)
    ]
    at_moments = [{"kill_after_s": chance.uniform(0.05, 1.0)} for _ in range(2)]
    for order in [*at_calls, *at_moments]:
        ran = a_night(night, **order)
        assert ran.code in (0, -9), ran.stderr
        assert not ran.orphans
        assert_next_night_recovers(night)


@pytest.mark.parametrize("name", ["ENOSPC", "EIO"])
def test_nights_on_a_full_or_sick_disk(night: Night, calls_of_a_night: int, name: str) -> None:
    """One line says why, the night's last line says it too, and the page of it is not worth a second failure."""
    for at in sorted(random.Random(name).sample(range(1, calls_of_a_night + 1), 2)):
        fault = Fault(str(night.world.out), at, error=getattr(errno, name), sticky=name != "EIO")
        ran = a_night(night, fault=fault, page=True)
        assert "Traceback" not in ran.stderr, ran.stderr
        assert ran.code in (0, 1), ran.stderr
        assert ran.report["exit"] == ran.code
        if ran.code and ran.report.get("generation") is not None:
            # What was embedded before a source failed is published, as when a budget is spent: each key old or new.
            assert ran.report["sources"][0]["error"]
            shown = vectors_by_key(night.world.out)
            assert shown.items() <= night.before.items() | night.after.items()
            assert night.before.items() & night.after.items() <= shown.items()
            night.world.assert_equals_undisturbed(night.resident.run(night.world.night()))
        else:
            assert_next_night_recovers(night)


def test_a_source_that_vanishes_while_it_is_listed(night: Night) -> None:
    """Unmounted in the middle of the walk: nothing is taken for deleted, and the next night has it all."""
    world, photos = night.world, night.world.folder
    ran = a_night(night, max_deleted=20, before="meddle:vanish", patches={"meddle:FOLDER": str(photos)})
    photos.with_name("unmounted").rename(photos)
    assert ran.code in (2, 6), ran.stderr
    assert ran.report["deleted"] == 0
    world.assert_readers_see(night.before)
    world.assert_equals_undisturbed(night.resident.run(world.night()))


def test_two_nights_at_once(night: Night) -> None:
    """Cron starts a second one, or two hosts share a disk: one does the work, the other says who is at it."""
    world = night.world
    shutil.rmtree(world.out)
    shutil.copytree(night.base, world.out, symlinks=True)
    order = world.night()
    command = [sys.executable, "-m", "pipeline.nightly", *order.argv]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate() for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) in ([0, 4], [0, 0]), told
    for code, (_, stderr) in zip(codes, told, strict=True):
        assert code == 0 or "another run writes to" in stderr
    world.assert_readers_see(night.after)
    world.assert_equals_undisturbed(night.resident.run(world.night()))


@pytest.mark.parametrize(
    "limit",
    [{"RLIMIT_FSIZE": 1000}, {"RLIMIT_FSIZE": 12_000}, {"RLIMIT_FSIZE": 40_000}, {"RLIMIT_NOFILE": 12},
     {"RLIMIT_NOFILE": 24}, {"RLIMIT_NOFILE": 36}],
    ids=str,
)  # fmt: skip
def test_limits_of_the_process(night: Night, limit: dict[str, int]) -> None:
    ran = night.disturbed(limits=limit)
    shown = []
    if ran.code != 0:
        assert_one_line(ran)
    elif "read_error" in quarantine(night.world.out).values():  # no descriptor was left for some: next time
        shown.append(vectors_by_key(night.world.out))
    night.assert_recovers(*shown)


def test_clocks_that_go_back(night: Night) -> None:
    for jump_s in (1e9, 3600.0):
        night.world.assert_equals_undisturbed(night.disturbed(clock_jumps_s=jump_s))


@pytest.mark.parametrize("more_mb", [2, 6, 24, 48, 80, 200])
def test_too_little_memory(night: Night, more_mb: int) -> None:
    """`ulimit -v`: one line, or it does without. A good picture is never condemned for it."""
    ran = night.disturbed(memory_mb=more_mb)
    shown = []
    if ran.code != 0:
        assert_one_line(ran)
    else:
        shown.append(vectors_by_key(night.world.out))
    assert_only_the_bad_are_condemned(night)
    night.assert_recovers(*shown)


@pytest.mark.parametrize("limit_mb", [4, 24, 30])
def test_a_control_group_with_too_little_memory(night: Night, limit_mb: int) -> None:
    """The kernel kills the run, or its lane again and again: what was committed stays, nothing is condemned."""
    group = Path("/sys/fs/cgroup/memory") / f"nightjar-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"making a control group for memory needs root and cgroup v1: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(f"{limit_mb}M")
        ran = night.disturbed(before="meddle:into_cgroup", patches={"meddle:FOLDER": str(group)})
        assert ran.code in (0, 1, -9), ran.stderr
        assert "Traceback" not in ran.stderr, ran.stderr
        assert_only_the_bad_are_condemned(night)
        night.assert_recovers(*([vectors_by_key(night.world.out)] if ran.code == 0 else []))
    finally:
        group.rmdir()


def assert_only_the_bad_are_condemned(night: Night) -> None:
    _, bad = night.world.expected()
    ours = {key: why for key, why in quarantine(night.world.out).items() if why != "read_error"}
    assert ours.items() <= bad.items()


@pytest.mark.parametrize("command", ["order", "night", "show"])
def test_a_manifest_that_somebody_else_holds(night: Night, command: str) -> None:
    """For a moment: it waits. For longer: one line. Either way nothing is lost."""
    order = night.world.show("newest") if command == "show" else getattr(night.world, command)()
    assert holding_the_manifest(night, order, seconds=1.5).code == 0
    ran = holding_the_manifest(night, order, seconds=60.0)
    assert ran.code == 1, ran.stderr
    assert "Traceback" not in ran.stderr, ran.stderr
    assert "another program holds it" in ran.stderr
    night.assert_recovers()


def holding_the_manifest(night: Night, order: Order, seconds: float) -> Outcome:
    ended = threading.Event()

    def hold() -> None:
        db = sqlite3.connect(night.world.out / "manifest.sqlite", isolation_level=None, timeout=0.1)
        db.execute("BEGIN IMMEDIATE")
        held.set()
        ended.wait(seconds)
        db.execute("ROLLBACK")
        db.close()

    held = threading.Event()
    shutil.rmtree(night.world.out)
    shutil.copytree(night.base, night.world.out, symlinks=True)
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    ran = night.resident.run(order)
    ended.set()
    holder.join()
    return ran


@pytest.mark.parametrize("harm", ["replaced", "truncated", "deleted", "a pipe", "a link in a circle"])
def test_pictures_that_change_between_listing_and_reading(night: Night, harm: str) -> None:
    """The run ends well; what it shows is what it read; the next run shows what is there."""
    world, photos = night.world, night.world.folder
    kept = photos.with_name("kept")
    shutil.copytree(photos, kept, symlinks=True)
    try:
        ran = night.disturbed(before=f"meddle:{harm.replace(' ', '_')}", patches={"meddle:FOLDER": str(photos)})
        assert ran.code == 0, ran.stderr
        for path in photos.rglob("*.jpg"):
            if path.is_fifo() or path.is_symlink():
                path.unlink()
        world.assert_equals_undisturbed(night.resident.run(world.order()))
    finally:
        shutil.rmtree(photos)
        kept.rename(photos)


def test_a_disk_that_really_is_full_and_then_read_only(night: Night, tmp_path: Path) -> None:
    """A tmpfs of a few MB: too small at first, then mounted read-only, then large enough."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options: str) -> bool:
        done = subprocess.run(["mount", "-t", "tmpfs", *options, "none", str(disk)], capture_output=True)
        return done.returncode == 0

    if os.geteuid() != 0 or not mount("-o", "size=32k"):
        pytest.skip("mounting a small disk needs root and the right to mount")
    world = World(night.world.folder, night.world.model, disk / "index", night.world.pool, night.world.vector_of)
    try:
        failures = 0
        for size_kb in (32, 64, 96, 128, 192, 65_536):
            assert mount("-o", f"remount,size={size_kb}k")
            ran = night.resident.run(world.order())
            if ran.code != 0:
                failures += 1
                assert_one_line(ran)
                world.assert_readers_see({})
        assert failures > 2, "the disk was never full"
        world.assert_equals_undisturbed(ran)
        gc.collect()  # a connection that nobody has closed yet holds the disk writable
        assert mount("-o", "remount,ro")
        assert_one_line(night.resident.run(world.order()))
        world.assert_readers_see(night.after)
        assert mount("-o", "remount,rw")
        world.assert_equals_undisturbed(night.resident.run(world.order()))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_few_cycles_of_killing_and_resuming(tmp_path: Path, tiny_model: Path, resident: Resident) -> None:
    from soak import cycles

    found = cycles(World.make(tmp_path, tiny_model, resident), resident, 6, random.Random(12))
    assert any(name.endswith("killed") for name in found)


def test_the_check_itself_rejects(tmp_path: Path, tiny_model: Path, resident: Resident) -> None:
    """A row that is lost, doubled or different, and half a night, are seen."""
    world = World.make(tmp_path, tiny_model, resident, pictures=12)
    world.fill(random.Random(1), 12)
    ran = resident.run(world.order())
    world.assert_equals_undisturbed(ran)
    shown, _ = world.expected()
    key = next(iter(shown))
    for wrong in ({**shown, "extra.jpg": shown[key]}, {k: v for k, v in shown.items() if k != key}):
        with pytest.raises(AssertionError, match="half a night"):
            world.assert_readers_see(wrong)
    (world.folder / key).unlink()
    with pytest.raises(AssertionError):
        world.assert_equals_undisturbed(ran)
