"""`python -m pipeline.index`: every picture of a source becomes a vector in a published, searchable index.

    list the source -> diff against the manifest -> chunks to lanes -> shards -> publish a generation

Killed at any instant it loses at most the chunks in flight; the same command goes on where it stopped. A second run
over unchanged pictures starts no lane and embeds nothing.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import sys
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

from engines import EngineUnavailable
from engines.spec import ArtifactMissing
from pipeline.batch import DeviceUnavailable, Item
from pipeline.config import Config, UsageError, parse_index
from pipeline.exits import BUDGET_SPENT, DONE, FAILED, INTERRUPTED, LOCKED, MANY_DELETED, MANY_QUARANTINED, USAGE
from pipeline.lanes import LaneSpec
from pipeline.model_change import ModelChange, compare_models
from pipeline.progress import Display, TransferBar
from pipeline.run_record import Clock, run_record
from pipeline.run_reports import publishing_s, work_s
from pipeline.scheduler import LaneFailed, LaneRefused, Sharing, Totals
from pipeline.sources import Damage, SourceError
from pipeline.sources.download import DownloadError, download_inat2021
from pipeline.stop import Stop
from pipeline.store import Counts, Generation, Locked, Scope, Store, StoreError

log = logging.getLogger("nightjar")

SCHEMA = 1
OBSERVE_ROWS = 2000  # listed rows per transaction: one fsync for two thousand pictures


@dataclass(frozen=True)
class Report:
    """The last line of stdout: inputs = unchanged + embedded + copied + quarantined + pending (0 unless stopped)."""

    schema: int
    inputs: int
    unchanged: int
    embedded: int
    copied: int
    quarantined: int
    quarantined_new: int
    pending: int
    deleted: int
    seconds: float
    images_per_s: float
    bound: str
    lanes: list[str]
    decoders: dict[str, int]
    model: str
    index: str
    generation: int | None  # None: stopped before, or another model's is shown until this one's is complete
    model_change: ModelChange | None  # how the answers differ, when this run changed the model that readers see
    exit: int


@dataclass(frozen=True)
class Indexed:
    """A source that was listed and embedded as far as time allowed; nothing of that is visible yet."""

    run: int
    whole: bool  # False: stopped before the listing, or the last of its pictures, was through
    deleted: int
    counts: Counts
    totals: Totals
    clock: Clock


class Published(NamedTuple):
    generation: int | None = None
    model_change: ModelChange | None = None


class TooManyDeletions(Exception):
    """The source lost so much that a person should look before the index does the same."""


# What may happen to anybody: told in one line. Everything else is a fault of ours and keeps its traceback.
FAILURES = (
    UsageError, SourceError, ArtifactMissing, DeviceUnavailable, EngineUnavailable, TooManyDeletions, DownloadError,
    LaneFailed, StoreError, OSError, sqlite3.Error,
)  # fmt: skip


def run(cfg: Config, stop: Stop) -> Report:
    """The main job, top to bottom.

    Raises:
        UsageError: the budget is too short to get anywhere.
        StoreError (Locked is one), SourceError, TooManyDeletions, LaneFailed: one line each; what was committed stays.
    """
    start_s = time.monotonic()
    stop.deadline_s = start_s + work_s(cfg.budget_s, publishing_s(cfg.out))
    with Store.open(cfg.out, cfg.artifact.spec.space, cfg.artifact.spec.dim) as store:
        indexed = index_source(cfg, store, stop)
        with indexed.clock.phase("publishing"):
            published = Published() if stop.requested else publish(cfg, store)
        report = account(cfg, indexed, published, stop.requested, time.monotonic() - start_s)
        write_record(cfg, store, indexed, report)
    return report


def index_source(cfg: Config, store: Store, stop: Stop) -> Indexed:
    """List one source, drop what is gone, embed what is new. Publishing is a step of its own: sources may share it."""
    clock = Clock()
    number = store.begin_run(Scope(cfg.source.kind, cfg.source.root, cfg.source.options))
    if cfg.retry:
        log.info("%s quarantined pictures are tried again: %s", f"{store.retry(cfg.retry):,}", ", ".join(cfg.retry))
    with clock.phase("listing"):
        observe(cfg, store, stop)
        listed = not stop()
        deleted = delete_missing(cfg, store) if listed else 0
    with clock.phase("embedding"):
        totals = embed(cfg, store, stop)
    counts = store.counts()
    return Indexed(number, listed and not counts.pending, deleted, counts, totals, clock)


def write_record(cfg: Config, store: Store, indexed: Indexed, report: Report) -> None:
    record = run_record(cfg, indexed.run, indexed.counts, indexed.totals, indexed.clock)
    store.write_run_report(indexed.run, {**asdict(report), **record})


def download(cfg: Config) -> None:
    """The official archives into the root, resumed where an earlier download stopped."""
    with TransferBar() as bar:
        download_inat2021(cfg.source.root, cfg.source.options["split"], progress=bar.show)


def observe(cfg: Config, store: Store, stop: Stop) -> None:
    """List the source and let the manifest decide what is new, changed or known."""
    items: list[Item] = []
    listed, last_line_s = 0, time.monotonic()
    for found in cfg.source.list(store.container_unchanged):
        if isinstance(found, Item):
            items.append(found)
        elif isinstance(found, Damage):
            log.warning("could not list all of %s: %s; what is known of it stays", found.key_prefix, found.words)
            store.keep(found.key_prefix)
        else:
            store.observe(items)  # a container is remembered only after all of its items are
            store.container_seen(found)
            items = []
        if len(items) >= OBSERVE_ROWS:
            store.observe(items)
            listed, items = listed + len(items), []
            if time.monotonic() - last_line_s >= 1.0:
                last_line_s = time.monotonic()
                log.info("listing: %s pictures so far", f"{listed:,}")
        if stop():
            return
    store.observe(items)


def delete_missing(cfg: Config, store: Store) -> int:
    """Rows of this source that were not listed leave the next generation."""
    missing, known = store.listing_preview()
    if missing and 100 * missing > cfg.max_deleted_percent * known:
        raise TooManyDeletions(
            f"{missing:,} of {known:,} known pictures are gone from {cfg.source.root}, more than --max-deleted "
            f"{cfg.max_deleted_percent:g} %. Is it mounted? Nothing was changed; if this is right, run again with "
            "--max-deleted 100"
        )
    return store.finish_listing()


def embed(cfg: Config, store: Store, stop: Stop) -> Totals:
    """Everything pending goes through the lanes; with nothing pending no lane is started."""
    pending = store.counts().pending
    if stop():
        return Totals()
    if not pending:
        log.info("nothing to embed: every picture of %s is known and unchanged", cfg.source.root)
        return Totals()
    log.info("%s pictures to embed with %s", f"{pending:,}", cfg.artifact.spec.model)
    log.info("devices %s: %s", ",".join(cfg.devices.names), cfg.devices.reason)
    with Display(pending, quiet=cfg.json_only) as display:
        return Sharing(store, lane_specs(cfg), stop, display.tick, all_needed=cfg.devices.named).run()


def publish(cfg: Config, store: Store) -> Published:
    """Readers see what is embedded; those of another model go on seeing that one's until this one's are complete."""
    changes: list[ModelChange] = []

    def review(shown: int, new: int) -> None:
        with Generation.at(cfg.out, shown) as old, Generation.at(cfg.out, new) as ours:
            changes.append(compare_models(old, ours))

    spec, extra = json.loads(cfg.artifact.spec.to_json()), {"artifact": str(cfg.artifact.path)}
    generation = store.publish(spec, extra, cfg.keep, review)
    if generation is None:
        log.warning(
            "%s pictures have no vector of this model yet, so readers still see the other model's; "
            "index all sources, to the end, with --model %s", f"{store.missing():,}", cfg.artifact.spec.model,
        )  # fmt: skip
    elif store.pinned not in (None, generation):
        log.warning(
            "generation %d is written, but readers see %d, which was chosen: "
            "python -m pipeline.generations --out %s --show newest", generation, store.pinned, cfg.out,
        )  # fmt: skip
    for change in changes:
        log.info("%s", change.words())
    return Published(generation, changes[0] if changes else None)


def lane_specs(cfg: Config) -> list[LaneSpec]:
    """One for each device; lanes share the cores for decoding, whatever they encode on."""
    spec, names = cfg.artifact.spec, cfg.devices.names
    return [
        LaneSpec(
            name=f"{device}/{number}",
            device=device,
            source=cfg.source,
            artifact_path=cfg.artifact.path,
            preprocess=spec.preprocess,
            runtime=cfg.runtime,
            precision=cfg.precision,
            engine_threads=cfg.engine_threads,
            decode_threads=max(1, cfg.decode_threads // len(names)),
            space=spec.space,
            log_path=cfg.out / "runs" / f"{device.replace(':', '')}-{number}.log",
        )
        for number, device in enumerate(names)
    ]


def account(cfg: Config, indexed: Indexed, published: Published, interrupted: bool, seconds: float) -> Report:
    """Every input has exactly one state after the run, and the states add up."""
    counts, totals = indexed.counts, indexed.totals
    unchanged = counts.embedded - totals.embedded - totals.copied
    assert unchanged >= 0, f"{counts} against {totals}: rows were counted twice"
    many = cfg.max_quarantined is not None and totals.quarantined_new > cfg.max_quarantined
    code = INTERRUPTED if interrupted else MANY_QUARANTINED if many else DONE if indexed.whole else BUDGET_SPENT
    return Report(
        schema=SCHEMA,
        inputs=counts.embedded + counts.quarantined + counts.pending,
        unchanged=unchanged,
        embedded=totals.embedded,
        copied=totals.copied,
        quarantined=counts.quarantined,
        quarantined_new=totals.quarantined_new,
        pending=counts.pending,
        deleted=indexed.deleted,
        seconds=round(seconds, 3),
        images_per_s=round((totals.embedded + totals.copied) / seconds, 2),
        bound=max(totals.bound_s, key=lambda stage: totals.bound_s[stage], default=""),
        lanes=[f"{name} {engine}" for name, engine in totals.engines.items()],
        decoders=dict(totals.decoders),
        model=cfg.artifact.spec.model,
        index=str(cfg.out / "index.h5"),
        generation=published.generation,
        model_change=published.model_change,
        exit=code,
    )


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        cfg = parse_index(argv)
        if cfg.json_only:
            logging.getLogger().setLevel(logging.WARNING)
        log.info("source %s: %s", cfg.source.kind, cfg.source.root)
        log.info("index  %s", cfg.out)
        if cfg.download:
            download(cfg)
        report = run(cfg, Stop())
    except FAILURES as error:
        log.error("error: %s", error)
        print(json.dumps({"schema": SCHEMA, "error": str(error), "exit": exit_code(error)}), flush=True)
        return exit_code(error)
    print(json.dumps(asdict(report)), flush=True)
    return report.exit


def exit_code(error: Exception) -> int:
    """Of a run that ended with one of FAILURES."""
    match error:
        case Locked():
            return LOCKED
        case TooManyDeletions():
            return MANY_DELETED
        case UsageError() | SourceError() | ArtifactMissing() | DeviceUnavailable() | EngineUnavailable():
            return USAGE
        case LaneRefused():
            return USAGE
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
