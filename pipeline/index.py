"""`python -m pipeline.index`: every picture of a source becomes a vector in a published, searchable index.

    list the source -> diff against the manifest -> chunks to lanes -> shards -> publish a generation

Killed at any instant it loses at most the chunks in flight; the same command goes on where it stopped. A second run
over unchanged pictures starts no lane and embeds nothing.
"""

from __future__ import annotations

import gc
import json
import logging
import shlex
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

from pipeline.batch import Item
from pipeline.config import Config, index_words, parse_index
from pipeline.devices import EngineWish, lane_specs
from pipeline.exits import BUDGET_SPENT, DONE, INTERRUPTED, MANY_QUARANTINED
from pipeline.failures import FAILURES, TooManyDeletions, exit_code, words
from pipeline.model_change import ModelChange, compare_models
from pipeline.progress import Display, LinePace, TransferBar, clock_time
from pipeline.run_record import Clock, run_record
from pipeline.run_reports import publishing_s, tell_unended, unlisted_words, work_s
from pipeline.scheduler import Sharing, Totals
from pipeline.shares import POLICIES
from pipeline.sources import Damage, SourceError
from pipeline.sources.download import download_inat2021
from pipeline.stop import Stop
from pipeline.store import Counts, Generation, Scope, Store, StoreError, Turn
from pipeline.store.check_shown import open_shown
from pipeline.store.files import write_text
from pipeline.terminal import printable

log = logging.getLogger("nightjar")

SCHEMA = 1
OBSERVE_ROWS = 2000  # listed rows per transaction: one fsync for two thousand pictures
UNLISTED_SHOWN = 24
NOTHING = Counts(0, 0, 0, 0, {})


@dataclass
class Unlisted:
    """Parts of the source, folders or containers, that could not be listed to their end in this run."""

    count: int = 0
    examples: list[Damage] = field(default_factory=list)  # the first few

    def add(self, damage: Damage) -> None:
        self.count += 1
        self.examples += [damage] if len(self.examples) < UNLISTED_SHOWN else []


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
    unlisted: Unlisted
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


@dataclass
class Indexed:
    """A run of one source, as far as it has come; nothing of that is visible before it is published."""

    run: int
    clock: Clock = field(default_factory=Clock)
    whole: bool = False  # the listing, and the last of its pictures, is through
    deleted: int = 0
    counts: Counts = NOTHING
    totals: Totals = field(default_factory=Totals)
    unlisted: Unlisted = field(default_factory=Unlisted)


class Published(NamedTuple):
    generation: int | None = None
    model_change: ModelChange | None = None


def run(cfg: Config, stop: Stop) -> Report:
    """The main job, top to bottom.

    Raises:
        UsageError: the budget is too short to get anywhere.
        StoreError (Locked is one), SourceError, TooManyDeletions, LaneFailed: one line each; what was committed stays.
    """
    start_s = time.monotonic()
    stop.deadline_s = start_s + work_s(cfg.budget_s, publishing_s(cfg.out))
    with Store.open(cfg.out, cfg.artifact.spec.space, cfg.artifact.spec.dim) as store:
        indexed = begin(cfg, store)
        tell_unended(cfg.out, indexed.run)
        try:
            index_source(cfg, store, stop, indexed)
            with indexed.clock.phase("publishing"):
                turn = list_turn(stop, start_s + cfg.budget_s, indexed.clock)
                published = Published() if stop.requested else publish(cfg, store, turn)
            report = account(cfg, indexed, published, stop.requested, time.monotonic() - start_s)
            write_record(cfg, indexed, report)
        except BaseException as error:
            leave_record(cfg, indexed, error, time.monotonic() - start_s)
            raise
    return report


def begin(cfg: Config, store: Store) -> Indexed:
    return Indexed(store.begin_run(Scope(cfg.source.kind, cfg.source.root, cfg.source.options)))


def index_source(cfg: Config, store: Store, stop: Stop, indexed: Indexed) -> None:
    """List one source, drop what is gone, embed what is new. Publishing is a step of its own: sources may share it."""
    gc.freeze()  # modules stay; looking through them for garbage again and again took 1.5 us an image, of 41
    try:
        if cfg.retry:
            log.info("%s quarantined pictures are tried again: %s", f"{store.retry(cfg.retry):,}", ", ".join(cfg.retry))
        with indexed.clock.phase("listing"):
            observe(cfg, store, stop, indexed)
            listed = not stop()
            indexed.deleted = delete_missing(cfg, store) if listed else 0
        with indexed.clock.phase("embedding"):
            embed(cfg, store, stop, indexed)
        indexed.whole = listed and not store.counts().pending
    finally:
        with suppress(sqlite3.Error):  # a manifest that cannot be read: what went wrong there is raised already
            indexed.counts = store.counts()


def write_record(cfg: Config, indexed: Indexed, report: Report, **more: object) -> None:
    """
    Raises:
        StoreError: it cannot be written, such as for a full disk.
    """
    record = run_record(cfg, indexed.run, indexed.counts, indexed.totals, indexed.clock)
    content = {**asdict(report), **record, **more}
    path = cfg.out / "runs" / f"{indexed.run}.json"
    try:
        write_text(path, json.dumps(content, indent=1))
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error.strerror}; what is done is committed. Make room, or the folder "
            "writable, and run the same command again"
        ) from error


def leave_record(cfg: Config, indexed: Indexed, error: BaseException, seconds: float) -> None:
    """Of a run that failed, so that whoever looks in the morning finds out why."""
    if indexed.counts is NOTHING:
        indexed.totals = Totals()
    try:
        report = account(cfg, indexed, Published(), False, seconds)
        write_record(cfg, indexed, replace(report, exit=exit_code(error)), error=words(error))
    except FAILURES as another:  # the first one is what counts, and a full disk takes no record
        log.error("run %d leaves no record: %s", indexed.run, words(another))


def download(cfg: Config) -> None:
    """The official archives into the root, resumed where an earlier download stopped."""
    with TransferBar() as bar:
        download_inat2021(cfg.source.root, cfg.source.options["split"], progress=bar.show)


def observe(cfg: Config, store: Store, stop: Stop, indexed: Indexed) -> None:
    """List the source and let the manifest decide what is new, changed or known.

    Raises:
        SourceError: the root itself went away meanwhile, so nothing is deleted; or a first listing found no picture.
    """
    items: list[Item] = []
    damaged: set[str] = set()
    listed, pace = 0, LinePace()
    for found in cfg.source.list(store.container_unchanged):
        if isinstance(found, Item):
            items.append(found)
            listed += 1
        elif isinstance(found, Damage):
            if not found.key_prefix:
                root = cfg.source.root
                raise SourceError(f"root {root} could not be listed to its end: {found.words}. Is it mounted?")
            log.warning("could not list all of %s: %s; what is known of it stays", found.key_prefix, found.words)
            damaged.add(found.key_prefix)
            indexed.unlisted.add(found)
        else:
            store.observe(items)  # a container is remembered only after all of its items are
            store.container_seen(found)
            items = []
        if len(items) >= OBSERVE_ROWS:
            store.observe(items)
            items = []
        if not items and pace.due():
            log.info("listing %s: %s pictures in %s", printable(cfg.source.root), f"{listed:,}", pace.so_far())
        if stop():
            return
    store.observe(items)
    for key_prefix in damaged:  # after its items: of what is kept, the manifest takes no change any more
        store.keep(key_prefix)
    if not any(store.counts()[:4]):  # of a source that once had some, --max-deleted decides
        hint = unlisted_words(asdict(indexed.unlisted)) or f"is it mounted, and right for --source {cfg.source.kind}?"
        raise SourceError(f"no picture below {cfg.source.root}: {hint}")


def delete_missing(cfg: Config, store: Store) -> int:
    """Rows of this source that were not listed leave the next generation."""
    missing, known = store.listing_preview()
    if missing and 100 * missing > cfg.max_deleted_percent * known:
        again = index_words(cfg.source.kind, cfg.source.root, cfg.source.options)
        again += ["--model", cfg.artifact.spec.model, "--out", str(cfg.out)]
        raise TooManyDeletions(
            f"{missing:,} of {known:,} known pictures are gone from {cfg.source.root}, more than --max-deleted "
            f"{cfg.max_deleted_percent:g} %. Is it mounted? Nothing of it was deleted or embedded; if this is right, "
            f"once: {shlex.join(again)} --max-deleted 100"
        )
    return store.finish_listing()


def embed(cfg: Config, store: Store, stop: Stop, indexed: Indexed) -> None:
    """Everything pending goes through the lanes; with nothing pending no lane is started."""
    pending = store.counts().pending
    if stop():
        return
    if not pending:
        log.info("nothing to embed: every picture of %s is known and unchanged", cfg.source.root)
        return
    log.info("%s pictures to embed with %s", f"{pending:,}", cfg.artifact.spec.model)
    log.info("devices %s: %s", ",".join(cfg.devices.names), cfg.devices.reason)
    log.info("setting: %s", cfg.devices.setting)
    specs = lane_specs(cfg.devices, cfg.source, EngineWish(cfg.artifact, cfg.runtime, cfg.precision), cfg.out / "runs")
    with Display(cfg.source.root, pending, stop.deadline_s, quiet=cfg.json_only) as display:
        sharing = Sharing(store, specs, stop, display.tick, cfg.devices.named, POLICIES[cfg.sharing]())
        indexed.totals = sharing.totals  # of a run that fails too
        sharing.run()


def list_turn(stop: Stop, end_s: float, clock: Clock) -> Turn:
    """The making of lists, until the budget ends at `end_s` of time.monotonic(); hours of it are no silence."""

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        log.info("lists for approximate search are brought up to date")
        with clock.phase(name):
            yield

    return Turn(lambda: stop.requested or time.monotonic() >= end_s, phase)


def publish(cfg: Config, store: Store, turn: Turn) -> Published:
    """Readers see what is embedded; those of another model go on seeing that one's until this one's are complete."""
    changes: list[ModelChange] = []

    def review(shown: int, new: int) -> None:
        with Generation.at(cfg.out, shown) as old, Generation.at(cfg.out, new) as ours:
            changes.append(compare_models(old, ours))

    log.info("publishing")
    start_s = time.monotonic()
    spec, extra = json.loads(cfg.artifact.spec.to_json()), {"artifact": str(cfg.artifact.path)}
    try:
        generation = store.publish(spec, extra, cfg.keep, review, turn)
    except OSError as error:  # of a full disk Python says neither where nor what to do
        raise StoreError(
            f"{cfg.out} could not be published: {error}; what is embedded is kept, and readers see a whole generation. "
            "Make room, or mend the disk, and run the same command again"
        ) from error
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
    else:
        open_shown(cfg.out)
        log.info("readers see generation %d, after %s", generation, clock_time(time.monotonic() - start_s))
    for change in changes:
        log.info("%s", change.words())
    return Published(generation, changes[0] if changes else None)


def account(cfg: Config, indexed: Indexed, published: Published, interrupted: bool, seconds: float) -> Report:
    """Every input has exactly one state after the run, and the states add up."""
    counts, totals = indexed.counts, indexed.totals
    unchanged = counts.embedded - totals.embedded - totals.copied
    assert unchanged >= 0, f"{counts} against {totals}: rows were counted twice"
    bad = totals.quarantined_new + indexed.unlisted.count
    many = cfg.max_quarantined is not None and bad > cfg.max_quarantined
    code = INTERRUPTED if interrupted else MANY_QUARANTINED if many else DONE if indexed.whole else BUDGET_SPENT
    return Report(
        schema=SCHEMA,
        inputs=counts.embedded + counts.quarantined + counts.pending,
        unchanged=unchanged,
        embedded=totals.embedded,
        copied=totals.copied,
        quarantined=counts.quarantined,
        quarantined_new=totals.quarantined_new,
        unlisted=indexed.unlisted,
        pending=counts.pending,
        deleted=indexed.deleted,
        seconds=round(seconds, 3),
        images_per_s=round((totals.embedded + totals.copied) / max(seconds, 0.001), 2),
        bound=max(totals.bound_s, key=lambda stage: totals.bound_s[stage], default=""),
        lanes=[f"{name} {engine}" for name, engine in totals.engines.items()],
        decoders=dict(totals.decoders),
        model=cfg.artifact.spec.model,
        index=str(cfg.out / "index.h5"),
        generation=published.generation,
        model_change=published.model_change,
        exit=code,
    )


def tell_end(cfg: Config, report: Report) -> None:
    """What a person does next; a program reads it from the JSON."""
    if report.exit == INTERRUPTED or report.pending:
        why = "interrupted" if report.exit == INTERRUPTED else "the budget is spent"
        log.info("%s: what is done is kept, %s pictures are known to be left; the same command goes on there",
                 why, f"{report.pending:,}")  # fmt: skip
    lacks = [f"{report.quarantined:,} pictures are quarantined"] if report.quarantined else []
    if lacks := [*lacks, *filter(None, [unlisted_words(asdict(report.unlisted))])]:
        log.info("%s; what and why: %s", ", ".join(lacks),
                 shlex.join(["python", "-m", "pipeline.status", "--out", str(cfg.out)]))  # fmt: skip


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
        log.error("error: %s", words(error))
        print(json.dumps({"schema": SCHEMA, "error": words(error), "exit": exit_code(error)}), flush=True)
        return exit_code(error)
    tell_end(cfg, report)
    print(json.dumps(asdict(report)), flush=True)
    return report.exit


if __name__ == "__main__":
    sys.exit(main())
