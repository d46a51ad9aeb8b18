"""The commands that change an index, each on a state that makes it do all it can, for `soak.every_call`."""

from __future__ import annotations

import json
import os
import random
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from resident import Order, Outcome, Resident
from runs import vectors_by_key
from world import Shown, World


@dataclass
class Command(ABC):
    """Given on what `prepare` leaves, again after each fault."""

    name: str
    before: Shown = field(default_factory=dict)  # what readers see when it is given, and when it has done its work
    after: Shown = field(default_factory=dict)

    @abstractmethod
    def prepare(self, world: World, resident: Resident, chance: random.Random) -> None:
        """Make the state that it is given on, and know what readers see before and after."""

    def order(self, world: World, **disturbed: object) -> Order:
        return world.order(**disturbed)

    def assert_after(self, world: World, ran: Outcome) -> None:
        """Right after the fault."""
        world.assert_readers_see(self.before, self.after)

    def assert_recovers(self, world: World, resident: Resident) -> None:
        world.assert_equals_undisturbed(resident.run(self.order(world)))


class First(Command):
    """The first run into a new folder: everything is written whole."""

    def prepare(self, world: World, resident: Resident, chance: random.Random) -> None:
        world.fill(chance, 30)
        world.out.mkdir()
        self.after, _ = world.expected()


class Index(Command):
    """A night with adds, changes, renames and deletes, that folds shards, adds to the lists and amends the table."""

    def prepare(self, world: World, resident: Resident, chance: random.Random) -> None:
        world.fill(chance, 30)
        world.assert_equals_undisturbed(resident.run(world.order()))
        base = world.out.with_name("before")
        for _ in range(40):
            self.before, _ = world.expected()
            shutil.copytree(world.out, base, symlinks=True)
            world.one_day(chance)
            self.after, _ = world.expected()
            ran = resident.run(world.order())
            world.assert_equals_undisturbed(ran)
            if does_all(base, world.out, ran):
                shutil.rmtree(world.out)
                base.rename(world.out)
                return
            shutil.rmtree(base)
        raise AssertionError("no night of 40 did all of it")


class Nightly(Index):
    """The same by `pipeline.nightly`, which locks, publishes and tells in its own way."""

    def order(self, world: World, **disturbed: object) -> Order:
        return world.night(**disturbed)

    def assert_after(self, world: World, ran: Outcome) -> None:
        # What was embedded before a source failed is published, as when a budget is spent: each key old or new.
        if ran.code == 1 and ran.report.get("generation") is not None:
            assert ran.report["sources"][0]["error"]
            shown = vectors_by_key(world.out).items()
            assert shown <= self.before.items() | self.after.items()
            assert self.before.items() & self.after.items() <= shown
        else:
            super().assert_after(world, ran)


class Repair(Index):
    """`verify --repair` of a shard, a file of lists and a table with bytes that are not what was written."""

    def prepare(self, world: World, resident: Resident, chance: random.Random) -> None:
        super().prepare(world, resident, chance)
        world.assert_equals_undisturbed(resident.run(world.order()))
        shown = json.loads((world.out / "current" / "generation.json").read_text())
        data = max(shown["files"], key=lambda file: file["rows"])  # an older generation's file is dropped, not repaired
        lists = shown["ann"]["lists"][0]["file"]
        for path in (world.out / data["name"], world.out / lists["name"], (world.out / "index.h5").resolve()):
            content = bytearray(path.read_bytes())
            content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
            path.write_bytes(content)
        damaged = world.out.with_name("damaged")
        shutil.copytree(world.out, damaged, symlinks=True)
        ran = resident.run(self.order(world))
        world.assert_shows_undisturbed(ran)
        assert "repaired: 0 pictures" not in ran.stdout, "the damage costs no vector, so no lane is asked for one"
        shutil.rmtree(world.out)
        damaged.rename(world.out)

    def order(self, world: World, **disturbed: object) -> Order:
        return world.repair(**disturbed)

    def assert_after(self, world: World, ran: Outcome) -> None:
        """Readers see damage until it is repaired."""

    def assert_recovers(self, world: World, resident: Resident) -> None:
        """What it finds wrong is right again; of files that nobody names any more the next run clears the folder."""
        ran = resident.run(self.order(world))
        assert ran.code == 0, ran.stderr
        world.assert_readers_see(self.after)
        world.assert_equals_undisturbed(resident.run(world.order()))


class Show(Index):
    """`generations --show`: back to the last night but one."""

    number: str

    def prepare(self, world: World, resident: Resident, chance: random.Random) -> None:
        super().prepare(world, resident, chance)
        self.number = Path(os.readlink(world.out / "current")).name
        world.assert_equals_undisturbed(resident.run(world.order()))

    def order(self, world: World, **disturbed: object) -> Order:
        return world.show(self.number, **disturbed)

    def assert_recovers(self, world: World, resident: Resident) -> None:
        ran = resident.run(self.order(world))
        assert ran.code == 0, ran.stderr
        world.assert_readers_see(self.before)
        world.assert_shows_undisturbed(resident.run(world.show("newest")))


def does_all(before: Path, after: Path, ran: Outcome) -> bool:
    def new(pattern: str) -> set[str]:
        return {path.name for path in after.glob(pattern)} - {path.name for path in before.glob(pattern)}

    return bool(new("segments/*") and new("ann/*-*.h5")) and "is written whole" not in ran.stderr


COMMANDS: dict[str, Command] = {
    "first": First("first"),
    "index": Index("index"),
    "nightly": Nightly("nightly"),
    "repair": Repair("repair"),
    "show": Show("show"),
}
