"""`python -m pipeline.verify`: is everything in the index what it was when it was written, and what its pictures give?

    quick     every byte of the data files, every row of the manifest, every row of index.h5 against each other
    sample    quick, and some pictures embedded again, up to half of them such as readers do not see yet
    full      quick, and every picture embedded again

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

from rich.table import Column

from engines import EngineUnavailable
from engines.spec import ArtifactMissing, ModelSpec, find_artifact
from pipeline.batch import DeviceUnavailable
from pipeline.config import UsageError
from pipeline.devices import EngineWish, resolve_devices
from pipeline.exits import DAMAGED, DONE, FAILED, LOCKED, USAGE
from pipeline.failures import words
from pipeline.sources import SourceError
from pipeline.store import Locked, NoIndex, StoreError
from pipeline.store.check import Finding, Health, check_data, open_readonly
from pipeline.store.check_shown import check_generations
from pipeline.store.drop import drop_broken
from pipeline.store.manifest import RESTORE, SCHEMA_VERSION, ManifestDamaged, connect, other_schema
from pipeline.store.store import refuse_lost_manifest
from pipeline.terminal import print_table, printable, reader_may_leave
from pipeline.verify.config import VerifyConfig, parse
from pipeline.verify.copies import check_copies
from pipeline.verify.reembed import Comparison, compare_on
from pipeline.verify.repair import Dropped, RepairFailed, artifact_of, embed_again, locked
from pipeline.verify.sample import Space, draw, open_sources

log = logging.getLogger("nightjar")

SCHEMA = 1
SHARE_MIN = 0.5
COLUMNS = [Column(name, overflow="fold") for name in ("what", "where", "expected", "found", "remedy")]
REEMBED = "python -m pipeline.verify full --repair finds all of its kind and embeds them again"


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
    health, sample, dropped = check(cfg)
    embedded = None
    if cfg.repair and health.findings and all(one.remedy != RESTORE for one in health.findings):
        report(health.findings)
        embedded = embed_again(cfg, health, dropped)
        health, sample, _ = check(VerifyConfig(cfg.out))
    code = DAMAGED if health.findings else USAGE if unchecked(sample) else DONE
    return Verdict(health, sample, embedded, time.monotonic() - start_s, code)


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
            check_copies(cfg.out, health)
            if cfg.level != "quick":
                sample = embed_and_compare(cfg, db, health)
            if cfg.repair and health.findings:
                dropped = drop_broken(cfg.out, db, health.broken)
    except sqlite3.OperationalError:  # busy, or a full disk: says nothing about the file
        raise
    except ManifestDamaged as error:
        health.add("manifest", "manifest.sqlite", error.expected, error.found, RESTORE)
    except sqlite3.DatabaseError as error:
        health.add("manifest", "manifest.sqlite", "a sound SQLite file", str(error), RESTORE)
    return health, sample, dropped


@contextlib.contextmanager
def opened(cfg: VerifyConfig) -> Iterator[sqlite3.Connection]:
    """The manifest: a snapshot for looking, or under the lock for a repair."""
    path = cfg.out / "manifest.sqlite"
    refuse_lost_manifest(cfg.out)
    if not path.is_file():
        raise NoIndex(f"no manifest in {cfg.out}; make an index: python -m pipeline.index --out {cfg.out} ...")
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
        try:
            yield db
        finally:  # a file that a run took away in the midst of it is no damage either
            with contextlib.closing(open_readonly(cfg.out)) as now:
                if _runs(now) != first:
                    found = f"a run began in {cfg.out} while it was verified"
                    raise Locked(f"{found}, so files came and went; verify it again")


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


def embed_and_compare(cfg: VerifyConfig, db: sqlite3.Connection, health: Health) -> Comparison | None:
    """Pictures that readers see, or would see after the next publish. None: no picture has a vector."""
    if (space := _space(cfg, db, health)) is None:
        return None
    sources = open_sources(db)
    drawn = draw(db, space, health, sources, cfg.rows if cfg.level == "sample" else None, cfg.seed)
    if not drawn.there:
        return Comparison(0, drawn.away, 0) if drawn.away else None
    wish = EngineWish(artifact_of(cfg, space.name), cfg.runtime, cfg.precision)
    found = compare_on(resolve_devices(cfg.devices, wish), wish, cfg.out, space, drawn, sources)
    for off in found.off:
        health.broken.contents.add((off.content_hash, space.number))
        health.add("vector", f"{off.where}: {off.key}", "what its picture gives", off.words, REEMBED)
    if found.error > found.error_allowed:
        expected = f"a mean error/spread of at most {found.error_allowed:.3f} with {found.engine}"
        remedy = "Measure the engines of this host again: make engines. If they pass, index into a new folder"
        health.add("vector", "embeddings", expected, f"{found.error:.3f} over {found.compared:,} rows", remedy)
    return found


def _space(cfg: VerifyConfig, db: sqlite3.Connection, health: Health) -> Space | None:
    """That of --model, else what readers see, else what the last run made."""
    row = db.execute(
        "SELECT id, name, dim FROM space WHERE CASE WHEN :name IS NULL THEN id = coalesce("
        "(SELECT space FROM generation WHERE number = :shown), (SELECT space FROM run ORDER BY number DESC LIMIT 1)) "
        "ELSE name = :name END",
        {"name": find_artifact(cfg.model).spec.space if cfg.model else None, "shown": health.generation},
    ).fetchone()
    if row is None and cfg.model:
        raise UsageError(f"{cfg.out} has no vectors of --model {cfg.model}; leave --model out, or index with it")
    return Space(*row) if row else None


def unchecked(sample: Comparison | None) -> str:
    """Why nothing can be said of the vectors; empty where those compared speak for at least half of the pictures."""
    if sample is None or sample.share >= SHARE_MIN:
        return ""
    return (
        f"too little could be checked to speak for all vectors: {sample.compared:,} of {sample.rows:,} pictures could "
        f"be compared, {sample.changed:,} have changed, {sample.unreadable:,} cannot be read, {sample.away:,} more are "
        f"of sources that are not there; expected {SHARE_MIN:.0%} of all at least. Mount the sources, index what has "
        "changed, and verify again"
    )


# ---- what a person or a machine sees -----------------------------------------------------------------------------


def report(findings: list[Finding]) -> None:
    for one in findings:
        words = f"{one.what}: {one.where}: expected {one.expected}, found {one.found}. {one.remedy}"
        log.warning("%s", printable(words))


def summary(cfg: VerifyConfig, verdict: Verdict) -> dict[str, Any]:
    health, sample = verdict.health, verdict.sample
    compared = {name: value for name, value in asdict(sample).items() if name != "off"} if sample else None
    return {
        "schema": SCHEMA, "level": cfg.level, "index": str(cfg.out), "generation": health.generation,
        "files": health.files, "bytes": health.bytes, "vectors": health.vectors, "inputs": health.inputs,
        "behind": health.behind, "findings": [asdict(one) for one in health.findings],
        "sample": {**compared, "off": len(sample.off)} if sample and compared else None,
        "unchecked": unchecked(sample), "embedded": verdict.embedded,
        "seconds": round(verdict.seconds, 3), "exit": verdict.exit,
    }  # fmt: skip


def show(cfg: VerifyConfig, verdict: Verdict) -> None:
    health, sample = verdict.health, verdict.sample
    if health.findings:
        rows = [(one.what, one.where, one.expected, one.found, one.remedy) for one in health.findings]
        print_table(COLUMNS, rows)
    shown = "nothing published" if health.generation is None else f"generation {health.generation}"
    print(
        f"{printable(str(cfg.out))}: {shown}, {health.files} files of "
        f"{health.bytes / 1e6:,.1f} MB, {health.vectors:,} vectors, {health.inputs:,} rows of index.h5 "
        f"in {verdict.seconds:.1f} s"
    )
    if health.behind:
        print(f"{health.behind}: python -m pipeline.index makes it level")
    if sample:
        print(
            f"{sample.compared:,} of {sample.rows:,} pictures embedded again with {sample.engine}: "
            f"{sample.same_bits:,} with the same bits ({sample.bits_due:,} have to), mean error/spread "
            f"{sample.error:.5f} (allowed {sample.error_allowed:.3f}); {sample.changed:,} have changed, "
            f"{sample.unreadable:,} cannot be read, {sample.away:,} more are of sources that are not there"
        )
    if verdict.embedded is not None:
        print(f"repaired: {verdict.embedded:,} pictures embedded again")
    count = len(health.findings)
    print(f"{count} finding{'s' * (count > 1)}" if count else unchecked(sample) or "nothing is wrong")


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    as_json = False
    try:
        cfg = parse(argv)
        as_json = cfg.json
        verdict = verify(cfg)
    except (UsageError, NoIndex, SourceError, ArtifactMissing, EngineUnavailable, DeviceUnavailable) as error:
        return _fail(USAGE, error, as_json)
    except Locked as error:
        return _fail(LOCKED, error, as_json)
    except RepairFailed as error:
        return _fail(error.code, error, as_json)
    except (StoreError, OSError, MemoryError, sqlite3.Error) as error:
        return _fail(FAILED, error, as_json)
    with reader_may_leave():
        if cfg.json:
            print(json.dumps(summary(cfg, verdict)))
        else:
            show(cfg, verdict)
    return verdict.exit


def _fail(code: int, error: Exception, as_json: bool) -> int:
    log.error("error: %s", words(error))
    if as_json:
        print(json.dumps({"schema": SCHEMA, "error": words(error), "exit": code}), flush=True)
    return code
