"""`make soak CYCLES=1000 SECONDS=600`: what is too long for every push. Prints one JSON line; fails on the first loss.

    calls    every call of a run that changes the index is killed at, then made to fail with ENOSPC, EIO and EROFS
    cycles   a day's adds, changes, renames and deletes, then a run that is killed, then the run that resumes it
    fuzz     mutated pictures, archives, tables and configurations, for SECONDS

After each fault the index has to open, to show one night or the other, to resume, and to equal the undisturbed one.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "faults"), str(Path(__file__).parent)]

from fuzz import TARGETS, in_process  # noqa: E402
from resident import Fault, Order, Resident, build_shim  # noqa: E402
from world import World  # noqa: E402

ERRORS = ("ENOSPC", "EIO", "EROFS")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # real pictures to mutate, where they are
FUZZ_PART_S = 30.0  # a new process and a new seed after that


def tiny_model(folder: Path) -> Path:
    from engines.build import main as make_engines
    from export.random_model import write_random_model

    os.environ["NIGHTJAR_ARTIFACTS"] = str(folder / "artifacts")
    write_random_model(folder / "tiny", "tiny")
    assert make_engines(["--model", str(folder / "tiny"), "--runtime", "ort-cpu"]) == 0
    return folder / "tiny"


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def cycles(world: World, resident: Resident, count: int, chance: random.Random) -> dict[str, object]:
    """Half of the deaths come at any moment, half at any call that changes the index; a fifth hits the lane alone."""
    world.fill(chance, 60)
    run = resident.run(world.order(fault=Fault(str(world.out))))
    world.assert_equals_undisturbed(run)
    calls, seconds, done = run.calls, run.seconds, Counter[str]()
    start_s = time.monotonic()
    for cycle in range(1, count + 1):
        before, _ = world.expected()
        world.one_day(chance)
        after, _ = world.expected()
        at = chance.randrange(1, calls + 1)
        orders: dict[str, Order] = {
            "moment": world.order(kill_after_s=chance.uniform(0.02, seconds)),
            "lane at a moment": world.order(kill_after_s=chance.uniform(0.1, seconds), kill_lane=True),
            "call": world.order(fault=Fault(str(world.out), at, kills="run")),
            "writer at a call": world.order(fault=Fault(str(world.out), at, kills="writer")),
        }
        kind = chance.choices(list(orders), (40, 10, 40, 10))[0]
        killed = resident.run(orders[kind])
        done[f"{kind}: {'killed' if killed.code == -9 else 'lived' if killed.code == 0 else killed.code}"] += 1
        assert killed.code in (0, -9), killed.stderr
        assert not killed.orphans, "a process outlived the run"
        world.assert_readers_see(before, after)
        run = resident.run(world.order(fault=Fault(str(world.out))))
        world.assert_equals_undisturbed(run)
        calls, seconds = max(run.calls, calls // 2), max(run.seconds, seconds / 2)
        if cycle % 50 == 0:
            say(f"cycle {cycle}: {(time.monotonic() - start_s) / cycle:.2f} s each, {len(after)} rows, {dict(done)}")
    return {"cycles": count, "seconds": round(time.monotonic() - start_s, 1), "deaths": dict(done)}


def every_call(world: World, resident: Resident, chance: random.Random) -> dict[str, object]:
    """One night with adds, changes, renames and deletes, disturbed at each of its calls in turn."""
    world.fill(chance, 30)
    for _ in range(5):
        world.one_day(chance)
        world.assert_equals_undisturbed(resident.run(world.order()))
    before, _ = world.expected()
    base = world.out.with_name("base")
    shutil.copytree(world.out, base, symlinks=True)
    world.one_day(chance)
    after, _ = world.expected()
    calls = resident.run(world.order(fault=Fault(str(world.out)))).calls
    say(f"a night has {calls} calls that change the index")
    codes: Counter[str] = Counter()
    faults = [("kills run", {"kills": "run"}), ("kills writer", {"kills": "writer"})]
    faults += [(name, {"error": getattr(errno, name), "sticky": name != "EIO"}) for name in ERRORS]
    for name, kind in faults:
        for at in range(1, calls + 1):
            shutil.rmtree(world.out)
            shutil.copytree(base, world.out, symlinks=True)
            ran = resident.run(world.order(fault=Fault(str(world.out), at, **kind)))  # type: ignore[arg-type]
            codes[f"{name}: {ran.code}"] += 1
            assert ran.code in ((0, -9) if name.startswith("kills") else (0, 1)), ran.stderr
            world.assert_readers_see(before, after)
            world.assert_equals_undisturbed(resident.run(world.order()))
        say(f"{name}: {dict(codes)}")
    return {"calls": calls, "ends": dict(codes)}


def fuzz(folder: Path, seconds: float, chance: random.Random) -> dict[str, object]:
    """All targets in turn, until the time is over; what one died of stays in its folder."""
    pictures = [path for path in DATA.rglob("*") if path.is_file() and path.suffix not in (".tsv", ".md")]
    tried: Counter[str] = Counter()
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        for target in TARGETS:
            seed = chance.randrange(10**9)
            part_s = min(FUZZ_PART_S, left_s / len(TARGETS))
            found = in_process(target, part_s, seed, folder / target, pictures if target == "decode" else [])
            tried[target] += int(str(found["tried"]))
        say(f"fuzz: {dict(tried)}")
    return {"tried": dict(tried)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=600.0, help="of fuzzing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("calls", "cycles", "fuzz"))
    args = parser.parse_args()
    chance = random.Random(args.seed)
    found: dict[str, object] = {"seed": args.seed}
    with tempfile.TemporaryDirectory(prefix="nightjar-soak-") as name:
        folder = Path(name)
        model = tiny_model(folder)
        with Resident(build_shim(folder)) as resident:
            if args.only in (None, "calls"):
                found["calls"] = every_call(World.make(folder / "calls", model, resident), resident, chance)
            if args.only in (None, "cycles") and args.cycles:
                world = World.make(folder / "cycles", model, resident)
                found["cycles"] = cycles(world, resident, args.cycles, chance)
    if args.only in (None, "fuzz") and args.seconds:
        left = Path(tempfile.mkdtemp(prefix="nightjar-fuzz-"))
        found["fuzz"] = fuzz(left, args.seconds, chance)
        shutil.rmtree(left)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
