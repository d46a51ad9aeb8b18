"""`python -m pipeline.verify`: is everything in the index what it was when it was written, and what its pictures give?

    quick     every byte of the data files, every row of the manifest, every row of index.h5 against each other
    sample    quick, and some rows embedded again from their pictures
    full      quick, and every row embedded again

It takes no lock, so a nightly run is never kept out. While one is going on it refuses (exit 4); should one begin in
between, what it found is not to be trusted and it says so (exit 4 too). With `--repair` it is a writer like any other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import sqlite3
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from engines import EngineUnavailable
from engines.spec import ArtifactMissing, ModelSpec
from pipeline.batch import DeviceUnavailable
from pipeline.config import UsageError
from pipeline.devices import EngineWish, resolve_devices
from pipeline.exits import DAMAGED, DONE, FAILED, LOCKED, USAGE
from pipeline.failures import words
from pipeline.sources import SourceError
from pipeline.store import Generation, Locked, NoIndex, StoreError
from pipeline.store.check import Finding, Health, check_data, open_readonly
from pipeline.store.check_shown import check_generations
from pipeline.store.drop import drop_broken
from pipeline.store.manifest import RESTORE, SCHEMA_VERSION, connect, other_schema
from pipeline.verify.config import VerifyConfig, parse
from pipeline.verify.reembed import Comparison, compare_on
from pipeline.verify.repair import Dropped, RepairFailed, artifact_of, embed_again, locked

log = logging.getLogger("nightjar")

SCHEMA = 1


@dataclass(frozen=True)
class Verdict:
    """What was found, and what is left of it after a repair."""

    health: Health
    sample: Comparison | None
    embedded: int | None  # pictures that a repair embedded again; None: nothing was repaired
    seconds: float
    exit: int


def verify(cfg: VerifyConfig) -> Verdict:
    """Check, and repair where that is asked for.

    Raises:
        NoIndex: nothing is there. Locked: a run writes, or began to. UsageError, SourceError, ArtifactMissing,
        EngineUnavailable, DeviceUnavailable: one line each.
    """
    start_s = time.monotonic()
    if not (cfg.out / "manifest.sqlite").is_file():
        raise NoIndex(f"no manifest in {cfg.out}; make an index: python -m pipeline.index --out {cfg.out} ...")
    health, sample, dropped = check(cfg)
    embedded = None
    if cfg.repair and health.findings and all(one.remedy != RESTORE for one in health.findings):
        report(health.findings)
        embedded = embed_again(cfg, health, dropped)
        health, sample, _ = check(VerifyConfig(cfg.out))
    return Verdict(health, sample, embedded, time.monotonic() - start_s, DAMAGED if health.findings else DONE)


def check(cfg: VerifyConfig) -> tuple[Health, Comparison | None, list[Dropped]]:
    """What is wrong; with `cfg.repair` it is dropped at once, and the sources with pictures to embed again are told."""
    health = Health()
    sample: Comparison | None = None
    dropped: list[Dropped] = []
    try:
        with opened(cfg) as db:
            if faults := [row[0] for row in db.execute("PRAGMA quick_check(3)") if row[0] != "ok"]:
                raise sqlite3.DatabaseError("; ".join(faults))
            check_generations(cfg.out, db, check_data(cfg.out, db, health), health)
            check_spec(cfg.out, health)
            sound = health.generation is not None and health.generation not in health.broken.generations
            if cfg.level != "quick" and sound:
                sample = embed_and_compare(cfg, db, health)
            if cfg.repair and health.findings:
                dropped = drop_broken(cfg.out, db, health.broken)
    except sqlite3.OperationalError:  # busy, or a full disk: says nothing about the file
        raise
    except sqlite3.DatabaseError as error:
        health.add("manifest", "manifest.sqlite", "a sound SQLite file", str(error), RESTORE)
    return health, sample, dropped


@contextlib.contextmanager
def opened(cfg: VerifyConfig) -> Iterator[sqlite3.Connection]:
    """The manifest: a snapshot for looking, or under the lock for a repair."""
    path = cfg.out / "manifest.sqlite"
    if cfg.repair:
        with locked(cfg.out), contextlib.closing(connect(path)) as db:
            yield db
        return
    refuse_while_written(cfg.out)
    with contextlib.closing(open_readonly(cfg.out)) as db:
        db.execute("BEGIN")
        schema = db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()[0]
        if schema != SCHEMA_VERSION:
            raise StoreError(other_schema(path, schema))
        first = _runs(db)
        yield db
    with contextlib.closing(open_readonly(cfg.out)) as db:
        if _runs(db) != first:
            raise Locked(f"a run began in {cfg.out} while it was verified, so files came and went; verify it again")


def _runs(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT count(*) FROM run").fetchone()[0])


def refuse_while_written(out: Path) -> None:
    """A shared lock, given back at once: it is only asked whether somebody holds the writer's."""
    try:
        with (out / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return
    except BlockingIOError:
        raise Locked(f"a run writes to {out}; verify it when the run has ended") from None


def check_spec(out: Path, health: Health) -> None:
    """The model that a generation names must be the one whose vectors it shows."""
    if health.generation is None or health.generation in health.broken.generations:
        return
    where = f"generations/{health.generation}/generation.json"
    content = json.loads((out / where).read_text(encoding="utf-8"))
    try:
        space = ModelSpec.from_json(json.dumps(content["spec"])).space
    except (KeyError, TypeError) as error:
        space = f"no spec ({type(error).__name__}: {error})"
    if space != content["space"]:
        health.broken.generations.add(health.generation)
        health.broken.republish = True
        health.add("wrong space", where, f"the spec of {content['space']}", f"that of {space}")


def embed_and_compare(cfg: VerifyConfig, db: sqlite3.Connection, health: Health) -> Comparison:
    """Rows of the generation that readers see, embedded again."""
    with Generation.open(cfg.out) as generation:
        rows = np.arange(generation.rows)
        if cfg.level == "sample":
            rng = np.random.default_rng(cfg.seed)
            rows = np.sort(rng.choice(rows, min(cfg.rows, generation.rows), replace=False))
        wish = EngineWish(artifact_of(cfg, generation.space), cfg.runtime, cfg.precision)
        found = compare_on(resolve_devices(cfg.devices, wish), wish, cfg.out, generation.number, rows)
        space = db.execute("SELECT id FROM space WHERE name = ?", (generation.space,)).fetchone()[0]
    for off in found.off:
        health.broken.contents.add((off.content_hash, space))
        health.add("vector", f"index.h5, row {off.row}: {off.key}", "what its picture gives", off.words)
    if found.error > found.error_allowed:
        expected = f"a mean error/spread of at most {found.error_allowed:.3f} with {found.engine}"
        remedy = "Measure the engines of this host again: make engines. If they pass, index into a new folder"
        health.add("vector", "index.h5", expected, f"{found.error:.3f} over {found.compared:,} rows", remedy)
    return found


# ---- what a person or a machine sees -----------------------------------------------------------------------------


def report(findings: list[Finding]) -> None:
    for one in findings:
        log.warning("%s: %s: expected %s, found %s. %s", one.what, one.where, one.expected, one.found, one.remedy)


def summary(cfg: VerifyConfig, verdict: Verdict) -> dict[str, Any]:
    health, sample = verdict.health, verdict.sample
    compared = {name: value for name, value in asdict(sample).items() if name != "off"} if sample else None
    return {
        "schema": SCHEMA, "level": cfg.level, "index": str(cfg.out), "generation": health.generation,
        "files": health.files, "bytes": health.bytes, "vectors": health.vectors, "inputs": health.inputs,
        "behind": health.behind, "findings": [asdict(one) for one in health.findings],
        "sample": {**compared, "off": len(sample.off)} if sample and compared else None,
        "embedded": verdict.embedded, "seconds": round(verdict.seconds, 3), "exit": verdict.exit,
    }  # fmt: skip


def show(cfg: VerifyConfig, verdict: Verdict) -> None:
    health, sample, console = verdict.health, verdict.sample, Console()
    if health.findings and console.is_terminal:
        table = Table("what", "where", "expected", "found", "remedy")
        for one in health.findings:
            table.add_row(one.what, one.where, one.expected, one.found, one.remedy)
        console.print(table)
    else:
        report(health.findings)
    print(
        f"{cfg.out}: generation {health.generation}, {health.files} files of {health.bytes / 1e6:,.1f} MB, "
        f"{health.vectors:,} vectors, {health.inputs:,} rows of index.h5 in {verdict.seconds:.1f} s"
    )
    if health.behind:
        print(f"{health.behind}: python -m pipeline.index makes it level")
    if sample:
        print(
            f"{sample.compared:,} of {sample.rows:,} pictures embedded again with {sample.engine}: "
            f"{sample.same_bits:,} with the same bits ({sample.bits_due:,} have to), mean error/spread "
            f"{sample.error:.5f} (allowed {sample.error_allowed:.3f}); {sample.changed:,} have changed, "
            f"{sample.unreadable:,} cannot be read"
        )
    if verdict.embedded is not None:
        print(f"repaired: {verdict.embedded:,} pictures embedded again")
    print(f"{len(health.findings)} findings" if health.findings else "nothing is wrong")


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    as_json = False
    try:
        cfg = parse(argv)
        as_json = cfg.json
        if cfg.json:
            logging.getLogger().setLevel(logging.WARNING)
        verdict = verify(cfg)
    except (UsageError, NoIndex, SourceError, ArtifactMissing, EngineUnavailable, DeviceUnavailable) as error:
        return _fail(USAGE, error, as_json)
    except Locked as error:
        return _fail(LOCKED, error, as_json)
    except RepairFailed as error:
        return _fail(error.code, error, as_json)
    except (StoreError, OSError, MemoryError, sqlite3.Error) as error:
        return _fail(FAILED, error, as_json)
    if cfg.json:
        print(json.dumps(summary(cfg, verdict)), flush=True)
    else:
        show(cfg, verdict)
    return verdict.exit


def _fail(code: int, error: Exception, as_json: bool) -> int:
    log.error("error: %s", words(error))
    if as_json:
        print(json.dumps({"schema": SCHEMA, "error": words(error), "exit": code}), flush=True)
    return code
