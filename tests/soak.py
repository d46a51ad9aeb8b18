"""`make soak CYCLES=1000 SECONDS=600`: what is too long for every push. Prints one JSON line.

    calls    every call of a command that changes the index is killed at, then made to fail with ENOSPC, EIO and EROFS
    cycles   a day's adds, changes, renames and deletes, then a run that is killed, then the run that resumes it
    fuzz     mutated pictures, archives, tables and configurations, for SECONDS in all

After each fault the index has to open, to show one night or the other, to resume, and to equal the undisturbed one.
The parts are independent and share the cores.
"""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import TypeAlias

sys.path[:0] = [str(Path(__file__).parent / "faults"), str(Path(__file__).parent)]

from commands import COMMANDS, Command  # noqa: E402
from fuzz import TARGETS, in_process  # noqa: E402
from resident import Fault, Order, Outcome, Resident, build_shim  # noqa: E402
from runs import make_tiny_model  # noqa: E402
from world import World  # noqa: E402

FAULTS: dict[str, dict[str, object]] = {
    "kills run": {"kills": "run"},
    "kills lane": {"kills": "lane"},
    "ENOSPC": {"error": errno.ENOSPC, "sticky": True},
    "EIO": {"error": errno.EIO},
    "EROFS": {"error": errno.EROFS, "sticky": True},
}
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # real pictures to mutate, where they are
FUZZ_PART_S = 30.0  # a new process and a new seed after that
CYCLES_PART = 100
PICTURES = 300  # of which every night shows some for the first time
SAY_EVERY = 50
Found: TypeAlias = dict[str, object]


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def cycles(world: World, resident: Resident, count: int, chance: random.Random) -> Found:
    """Half of the deaths come at any moment, half at any call that changes the index; a fifth hits the lane alone.
    A fifth of the runs is `pipeline.nightly`."""
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
        order = world.night if chance.random() < 0.2 else world.order
        orders: dict[str, Callable[[], Order]] = {
            "moment": partial(order, kill_after_s=chance.uniform(0.02, seconds)),
            "lane at a moment": partial(order, kill_after_s=chance.uniform(0.1, seconds), kill_lane=True),
            "call": partial(order, fault=Fault(str(world.out), at, kills="run")),
            "lane at a call": partial(order, fault=Fault(str(world.out), chance.randrange(1, 20), kills="lane")),
        }
        kind = chance.choices(list(orders), (40, 10, 40, 10))[0]
        killed = resident.run(orders[kind]())
        done[f"{kind}: {'killed' if killed.code == -9 else 'lived' if killed.code == 0 else killed.code}"] += 1
        assert killed.code in (0, -9), killed.stderr
        assert not killed.orphans, "a process outlived the run"
        world.assert_readers_see(before, after)
        run = resident.run(world.order(fault=Fault(str(world.out))))
        world.assert_equals_undisturbed(run)
        calls, seconds = max(run.calls, calls // 2), max(run.seconds, seconds / 2)
        if cycle % SAY_EVERY == 0:
            say(f"cycle {cycle}: {(time.monotonic() - start_s) / cycle:.2f} s each, {len(after)} rows, {dict(done)}")
    return {"cycles": count, **done}


def every_call(command: Command, fault: str, world: World, resident: Resident, chance: random.Random) -> Found:
    """One command on one state of an index, disturbed at each of its calls in turn, then given once more."""
    kind = FAULTS[fault]
    command.prepare(world, resident, chance)
    base = world.out.with_name("base")
    world.out.rename(base)

    def disturbed(at: int) -> Outcome:
        shutil.rmtree(world.out, ignore_errors=True)
        shutil.copytree(base, world.out, symlinks=True)
        ran = resident.run(command.order(world, fault=Fault(str(world.out), at, **kind)))  # type: ignore[arg-type]
        try:
            assert ran.code in ((0, -9) if fault.startswith("kills") else (0, 1)), "an exit code nobody promised"
            assert "Traceback" not in ran.stderr, "more than one line"
            assert not ran.orphans, "a process outlived the run"
            command.assert_after(world, ran)
            command.assert_recovers(world, resident)
        except Exception:  # noqa: BLE001 - all findings of a night, not the first alone
            say(f"{command.name}, {fault} at call {at}: exit {ran.code}\n{ran.stderr}\n{traceback.format_exc()}")
            wrong.append(at)
        return ran

    wrong: list[int] = []
    calls = disturbed(0).calls
    ends = Counter[str]()
    start_s = time.monotonic()
    for at in range(1, calls + 1):
        ends[{-9: "killed", 0: "lived"}.get(disturbed(at).code, "failed")] += 1
        if at % SAY_EVERY == 0:
            say(f"{command.name}, {fault}: {at} of {calls} calls, {(time.monotonic() - start_s) / at:.2f} s each")
    assert not wrong, f"{command.name}, {fault}: wrong at calls {wrong} of {calls}"
    return {"calls": calls, **ends}


def fuzz(target: str, folder: Path, seconds: float, chance: random.Random) -> Found:
    """What it died of stays in its folder."""
    pictures = [path for path in DATA.rglob("*") if path.is_file() and path.suffix not in (".tsv", ".md")]
    tried = 0
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        part_s = min(FUZZ_PART_S, left_s)
        found = in_process(
            target, part_s, chance.randrange(10**9), folder / target, pictures if target == "decode" else []
        )
        tried += int(str(found["tried"]))
    return {"tried": tried}


def in_world(work: Callable[[World, Resident, random.Random], Found], folder: Path, model: Path, seed: str) -> Found:
    """In a process of the pool: an index and a resident of its own."""
    folder.mkdir()  # no space in its name: LD_PRELOAD takes several
    with Resident(build_shim(folder)) as resident:
        found = work(World.make(folder, model, resident, PICTURES), resident, random.Random(seed))
    shutil.rmtree(folder)
    return found


def cycles_part(count: int, world: World, resident: Resident, chance: random.Random) -> Found:
    return cycles(world, resident, count, chance)


def calls_part(name: str, fault: str, world: World, resident: Resident, chance: random.Random) -> Found:
    return every_call(COMMANDS[name], fault, world, resident, chance)


def fuzz_part(target: str, folder: Path, seconds: float, seed: str) -> Found:
    return fuzz(target, folder, seconds, random.Random(seed))


def parts(args: argparse.Namespace, folder: Path, left: Path, model: Path) -> dict[str, Callable[[], Found]]:
    def with_world(words: str, seed: str, work: Callable[[World, Resident, random.Random], Found]) -> None:
        found[words] = partial(in_world, work, folder / words.replace(" ", "-"), model, f"{args.seed} {seed}")

    found: dict[str, Callable[[], Found]] = {}
    for name in COMMANDS:
        for fault in FAULTS:  # of one seed for all: the same night is disturbed in every way
            with_world(f"calls {name} {fault}", name, partial(calls_part, name, fault))
    for first in range(0, args.cycles, CYCLES_PART):
        words = f"cycles {first}"
        with_world(words, words, partial(cycles_part, min(CYCLES_PART, args.cycles - first)))
    for target in TARGETS:
        words = f"fuzz {target}"
        found[words] = partial(fuzz_part, target, left, args.seconds / len(TARGETS), f"{args.seed} {words}")
    return {words: part for words, part in found.items() if words.startswith(args.only)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=600.0, help="of fuzzing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help='parts whose names start so, as "calls index" or "fuzz"')
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parts at once (default: one a core)")
    args = parser.parse_args()
    start_s = time.monotonic()
    found: dict[str, Found] = {}
    left = Path(tempfile.mkdtemp(prefix="nightjar-fuzz-"))
    with tempfile.TemporaryDirectory(prefix="nightjar-soak-") as name:
        model = make_tiny_model(Path(name) / "tiny", Path(name) / "artifacts")
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            running = {pool.submit(part): words for words, part in parts(args, Path(name), left, model).items()}
            for done in as_completed(running):
                error = done.exception()
                found[running[done]] = {"wrong": str(error)} if error else done.result()
                say(f"{time.monotonic() - start_s:.0f} s: {running[done]}: {found[running[done]]}")
    wrong = any("wrong" in part for part in found.values())
    if not wrong:
        shutil.rmtree(left)
    print(json.dumps({"seed": args.seed, "seconds": round(time.monotonic() - start_s), "found": found}))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
