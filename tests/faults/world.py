"""A small source whose index is known in advance, whatever was done to it and however often the run was killed.

A vector depends on the bytes of its picture alone, so one undisturbed run over the pool says what every later index
has to hold: `World.expected()` is a map over the files that are there now.
"""

from __future__ import annotations

import json
import random
import sqlite3
from dataclasses import asdict, dataclass, field
from pathlib import Path

import h5py
from pictures import noisy_jpeg
from resident import Order, Outcome, Resident
from runs import quarantine, vectors_by_key

from pipeline.store import Generation, NoIndex, content_hash, files
from pipeline.store.publish import FILE_FOLDERS
from pipeline.verify.command import verify
from pipeline.verify.config import VerifyConfig

Shown = dict[str, tuple[bytes, bytes]]  # key -> content hash, vector bits
BAD = {b"": "empty", b"not a picture": "not_an_image", noisy_jpeg(7)[:-700]: "truncated"}
# Folding, lists and pruning in every few runs, not after a month of nights or a million pictures.
PATCHES = {
    "pipeline.store.fold:SMALL_MAX": 3,
    "pipeline.store.fold:SEGMENT_ROWS": 60,
    "pipeline.store.amend:TOUCHED_SHARE_MAX": 1.0,
    "pipeline.store.ann:VECTOR_BYTES_MIN": 1,
    "pipeline.store.ann:TAIL_BYTES_MAX": 256,
    "pipeline.store.ann:FILE_BYTES": 100 * 32,
}


@dataclass
class World:
    folder: Path
    model: Path
    out: Path
    pool: list[bytes] = field(default_factory=list)
    vector_of: dict[bytes, bytes] = field(default_factory=dict)  # content hash -> vector bits

    @classmethod
    def make(cls, folder: Path, model: Path, resident: Resident, pictures: int = 70) -> World:
        world = cls(folder / "photos", model, folder / "index")
        world.pool = [noisy_jpeg(seed, 48 + seed % 32, 48 + seed % 24) for seed in range(pictures)] + list(BAD)
        pool = cls(folder / "pool", model, folder / "pool index")
        for number, content in enumerate(world.pool):
            pool.write(f"{number}.jpg", content)
        ran = resident.run(pool.order())
        assert ran.code == 0, ran.stderr
        world.vector_of = dict(vectors_by_key(pool.out).values())
        assert len(world.vector_of) == pictures, "every picture of the pool has a vector of its own"
        return world

    def order(self, **disturbed: object) -> Order:
        argv = ["--source", "folder", "--root", self.folder, "--out", self.out, "--model", self.model]
        argv += ["--runtime", "ort-cpu", "--max-deleted", "100"]
        patches = PATCHES | disturbed.pop("patches", {})  # type: ignore[operator]
        return Order([str(word) for word in argv], patches=patches, **disturbed)  # type: ignore[arg-type]

    def night(self, *, max_deleted: int = 100, page: bool = False, **disturbed: object) -> Order:
        """The same by `pipeline.nightly`, which locks, publishes and tells in its own way."""
        toml = self.folder.with_name("nightly.toml")
        toml.write_text(
            f'[index]\nout = "{self.out}"\nmodel = "{self.model}"\nmax_deleted = {max_deleted}\n'
            f'[verify]\nlevel = "off"\n[report]\npage = {str(page).lower()}\n'
            f'[[source]]\nkind = "folder"\nroot = "{self.folder}"\n'
        )
        patches = PATCHES | disturbed.pop("patches", {})  # type: ignore[operator]
        return Order(["--config", str(toml)], module="pipeline.nightly.night", patches=patches, **disturbed)  # type: ignore[arg-type]

    def repair(self, **disturbed: object) -> Order:
        argv = ["--repair", "--runtime", "ort-cpu", "--devices", "cpu", "--out", str(self.out)]
        return Order(argv, module="pipeline.verify.command", patches=PATCHES, **disturbed)  # type: ignore[arg-type]

    def show(self, generation: int | str, **disturbed: object) -> Order:
        argv = ["--show", str(generation), "--out", str(self.out)]
        return Order(argv, module="pipeline.generations", **disturbed)  # type: ignore[arg-type]

    def write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def fill(self, chance: random.Random, count: int) -> None:
        for number in range(count):
            self.write(f"{chance.choice('abc')}/{number:03d}.jpg", self.pool[number])

    def one_day(self, chance: random.Random) -> None:
        """Adds, changes, renames, copies and deletes: each day some of them."""
        paths = sorted(path for path in self.folder.rglob("*.jpg"))
        for path in chance.sample(paths, min(len(paths), chance.randrange(9))):
            match chance.randrange(4):
                case 0:
                    path.unlink()
                case 1:
                    path.rename(path.with_name(f"moved-{chance.randrange(10**6)}.jpg"))
                case 2:
                    path.write_bytes(chance.choice(self.pool))
                case 3:
                    path.with_name(f"copy-{chance.randrange(10**6)}.jpg").write_bytes(path.read_bytes())
        for _ in range(chance.randrange(1 if len(paths) > 90 else 16)):
            self.write(f"{chance.choice('abc')}/new-{chance.randrange(10**6)}.jpg", chance.choice(self.pool))

    def expected(self) -> tuple[Shown, dict[str, str]]:
        """What an undisturbed run shows, and its quarantine ledger."""
        shown: Shown = {}
        bad: dict[str, str] = {}
        for path in self.folder.rglob("*.jpg"):
            key, content = str(path.relative_to(self.folder)), path.read_bytes()
            if content in BAD:
                bad[key] = BAD[content]
            else:
                shown[key] = (content_hash(content), self.vector_of[content_hash(content)])
        return shown, bad

    def assert_equals_undisturbed(self, ran: Outcome) -> None:
        """After a run that came to its end: nothing lost, nothing twice, nothing else."""
        assert ran.code == 0, ran.stderr
        report = ran.report
        states = ("unchanged", "embedded", "copied", "quarantined", "pending")
        assert report["inputs"] == sum(report[state] for state in states), report
        shown, bad = self.expected()
        assert report["inputs"] == len(shown) + len(bad)
        self.assert_shows_undisturbed(ran)

    def assert_shows_undisturbed(self, ran: Outcome) -> None:
        assert ran.code == 0, ran.stderr
        shown, bad = self.expected()
        assert vectors_by_key(self.out) == shown
        assert quarantine(self.out) == bad
        assert not list(self.out.rglob("*.tmp")), "the next run sweeps drafts"
        assert not ran.orphans, "a process outlived the run"
        assert_whole(self.out)

    def assert_readers_see(self, *nights: Shown) -> None:
        """At any moment: the index opens, its files are whole, and it is that of one night or of the other."""
        try:
            Generation.open(self.out, check="digest").close()
        except NoIndex:
            assert {} in nights, "what was published has gone"
            return
        assert vectors_by_key(self.out) in nights, "readers see half a night"


def assert_whole(out: Path) -> None:
    """SQLite finds no fault, every vector is where the manifest says, every file is named and what it was; and
    `verify` finds nothing to say, of lists neither."""
    db = sqlite3.connect(out / "manifest.sqlite")
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    lost = "SELECT key FROM input WHERE status = 'embedded' AND content_hash NOT IN (SELECT content_hash FROM vector)"
    assert db.execute(lost).fetchall() == []
    named = set()
    for number, name, size, digest in db.execute("SELECT id, name, bytes, digest FROM shard").fetchall():
        named.add(name)
        assert ((out / name).stat().st_size, files.digest_file(out / name)) == (size, digest)
        with h5py.File(out / name) as file:
            hashes = file["content_hash"][:]
        for content, row in db.execute("SELECT content_hash, row FROM vector WHERE shard = ?", (number,)):
            assert hashes[row].tobytes() == content
    for (listed,) in db.execute("SELECT files FROM generation"):
        named |= set(json.loads(listed))
    db.close()
    assert {f"{kind}/{path.name}" for kind in FILE_FOLDERS for path in (out / kind).iterdir()} == named
    assert [asdict(one) for one in verify(VerifyConfig(out)).health.findings] == []
