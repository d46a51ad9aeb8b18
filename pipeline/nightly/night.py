"""`python -m pipeline.nightly --config nightly.toml`: what a scheduler starts every night, for years.

    lock -> each source: list, diff, retry, embed -> verify a sample -> publish once, for all -> pages, metrics, webhook

A source that fails keeps what is known of it and does not stop the others. Readers see tonight's pictures only after
the look at the index found nothing wrong. Killed at any instant, the next night goes on where this one stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engines.spec import default_model
from pipeline import duration
from pipeline.config import Config, UsageError, parse_index, refusal
from pipeline.exits import DAMAGED, DONE, FAILED, USAGE
from pipeline.failures import FAILURES, exit_code, words
from pipeline.index import (
    Indexed,
    Published,
    account,
    begin,
    index_source,
    leave_record,
    list_turn,
    publish,
    write_record,
)
from pipeline.nightly.config import Nightly, SourceTable, load
from pipeline.nightly.result import SCHEMA, Tonight, Verified, failed, summary, work_words
from pipeline.nightly.tell import tell_all, write_log
from pipeline.progress import LinePace, clock_time
from pipeline.report.page import ReportError, write_report
from pipeline.run_record import Clock
from pipeline.run_reports import publishing_s, tell_unended, work_s
from pipeline.sources.places import canonical_root
from pipeline.stop import Stop
from pipeline.store import Store, StoreError
from pipeline.store.ledger import take_stock
from pipeline.terminal import printable

log = logging.getLogger("nightjar")

VERIFY_POLL_S, VERIFY_LINE_S = 0.5, 10.0

EXAMPLES = """examples:
  python -m pipeline.nightly --config /etc/nightjar/nightly.toml --check    is it right, and what would run?
  python -m pipeline.nightly --config /etc/nightjar/nightly.toml
  python -m pipeline.nightly --config nightly.toml --log nightly.jsonl

docker/nightly.toml is a configuration to start from; docker/ has files for cron, systemd and Kubernetes beside it.
exit codes: 0 done, 1 failed, 2 configuration, or a source that is not there, 3 done but more newly quarantined or
not listed than max_quarantined, 4 another run holds the lock, 5 budget spent (what was done is published; the next
night goes on), 6 too many deletions in a source, 7 damage found and nothing published, 130 interrupted (resumable).
Of several the gravest: 130, 4, 1, 7, 2, 6, 3, 5, 0"""


def run_night(plan: Nightly, stop: Stop) -> dict[str, Any]:
    """The whole night; returns the JSON of its last line.

    Raises:
        FAILURES: of the index itself, such as Locked. What befalls one source is in the result.
    """
    clock, start_s = Clock(), time.monotonic()
    sources = [Tonight(table) for table in plan.sources]
    for one in sources:
        try:
            one.cfg = parse_index(index_command(plan, one.table))
        except FAILURES as error:
            one.fail(error)
    ready = [one for one in sources if one.cfg is not None]
    published, verified = Published(), Verified()
    if ready:
        deadline_s = start_s + work_s(plan.index.budget_s or math.inf, publishing_s(plan.index.out))
        try:
            with clock.phase("indexing"), open_store(ready) as store:
                index_in_turn(ready, store, stop, deadline_s)
            with clock.phase("verifying"):
                verified = verify(plan, sources, stop)
            with open_store(ready) as store:
                if not stop.requested and verified.exit != DAMAGED:
                    with clock.phase("publishing"):
                        turn = list_turn(stop, start_s + (plan.index.budget_s or math.inf), clock)
                        published = publish(ready[0].config, store, turn)
                settle(sources, published, verified, stop, clock)
            if any(one.report and one.report.quarantined_new for one in ready):
                log.info("what is quarantined and why: python -m pipeline.status --out %s", plan.index.out)
        except BaseException as error:
            for one in ready:
                if one.indexed is not None and one.report is None:
                    leave_record(one.config, one.indexed, one.failure or error, time.monotonic() - start_s)
            raise
        finally:
            if plan.report.page:
                write_pages(plan.index.out, ready)
    return summary(plan, sources, published, verified, stop.requested, clock, time.monotonic() - start_s)


def index_command(plan: Nightly, source: SourceTable) -> list[str]:
    """Options of the `pipeline.index` that does what the night does with this source. One road for both."""
    index = plan.index
    words = ["--source", source.kind, "--root", canonical_root(source.root)]
    words += ["--split", source.split] if source.split is not None else []
    words += ["--model", index.model] if index.model is not None else []
    words += ["--out", str(index.out.absolute()), "--devices", index.devices]
    words += ["--precision", index.precision, "--max-deleted", f"{index.max_deleted:g}", "--keep", str(index.keep)]
    words += ["--max-quarantined", str(index.max_quarantined)] if index.max_quarantined is not None else []
    words += ["--retry", ",".join(index.retry)] if index.retry else []
    return words


def open_store(ready: Sequence[Tonight]) -> Store:
    """All sources share model and index."""
    cfg = ready[0].config
    return Store.open(cfg.out, cfg.artifact.spec.space, cfg.artifact.spec.dim)


def index_in_turn(ready: Sequence[Tonight], store: Store, stop: Stop, deadline_s: float) -> None:
    """Each source gets an equal share of the time that is left when its turn comes.

    Those with the least left over from last night come first: what they do not use goes to those that lag behind.
    """
    left_over = pending_of(ready[0].config.out) if len(ready) > 1 and deadline_s < math.inf else {}
    order = sorted(ready, key=lambda one: left_over.get(scope_of(one.config), 0))
    for place, one in enumerate(order):
        if stop.requested:
            return
        now_s = time.monotonic()
        stop.deadline_s = now_s + (deadline_s - now_s) / (len(order) - place)
        until = "" if deadline_s == math.inf else f", {clock_time(stop.deadline_s - now_s)} for it"
        log.info("source %d of %d: %s%s", place + 1, len(order), printable(one.name), until)
        try:
            one.indexed = begin(one.config, store)
            if place == 0:
                tell_unended(one.config.out, one.indexed.run)
            index_source(one.config, store, stop, one.indexed)
        except FAILURES as error:
            one.fail(error)
        else:
            log.info("source %d of %d: %s", place + 1, len(order), _work_words(one.indexed))


def _work_words(indexed: Indexed) -> str:
    counts, totals = indexed.counts, indexed.totals
    return work_words({
        "inputs": counts.embedded + counts.quarantined + counts.pending, "embedded": totals.embedded,
        "copied": totals.copied, "quarantined_new": totals.quarantined_new, "deleted": indexed.deleted,
        "pending": counts.pending,
    })  # fmt: skip


def pending_of(index: Path) -> dict[tuple[str, ...], int]:
    return {
        (source.kind, source.root, *map(str, source.options.values())): source.pending
        for source in take_stock(index, examples=0, runs=0).sources
    }


def scope_of(cfg: Config) -> tuple[str, ...]:
    return (cfg.source.kind, cfg.source.root, *map(str, cfg.source.options.values()))


def verify(plan: Nightly, sources: Sequence[Tonight], stop: Stop) -> Verified:
    """In a process of its own: it decodes pictures, and a decoder that dies must not take the night with it."""
    if plan.verify.level == "off" or stop.requested:
        return Verified()
    log.info("verifying: %s", plan.verify.level)
    seed = max((one.indexed.run for one in sources if one.indexed), default=0)  # other pictures every night
    code, stdout = _wait([sys.executable, *verify_command(plan, seed)], stop)
    verdict = json.loads(stdout.strip().splitlines()[-1]) if code in (DONE, DAMAGED, USAGE) else {}
    if "findings" not in verdict:
        words = f"the index could not be verified (exit code {code}); it is published all the same"
        if not stop.requested:
            log.error("%s", words)
        return Verified(code if code > 0 else FAILED, words=words)
    log.info(
        "verified: %s vectors read, %s pictures embedded again, %d findings, %s", f"{verdict['vectors']:,}",
        f"{(verdict['sample'] or {}).get('compared', 0):,}", len(verdict["findings"]), clock_time(verdict["seconds"]),
    )  # fmt: skip
    words = ""
    if code == DAMAGED:
        full = "full " if any(finding["what"] == "vector" for finding in verdict["findings"]) else ""
        repair = f"python -m pipeline.verify {full}--repair --out {plan.index.out}"
        words = f"damage was found, so readers still see the last generation: {repair}"
        log.error("%s", words)
    if code == USAGE:
        unchecked = f"{verdict['unchecked']}; it is published all the same"
        log.warning("%s", unchecked)
        if any(one.error for one in sources):  # told by those sources already, with their own exit codes
            code = DONE
        else:
            words = unchecked
    return Verified(code, verdict, words)


def _wait(command: Sequence[str], stop: Stop) -> tuple[int, str]:
    """Exit code and output; a night that is told to end does not wait."""
    pace = LinePace(VERIFY_LINE_S)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        while True:
            try:
                stdout, _ = child.communicate(timeout=VERIFY_POLL_S)
            except subprocess.TimeoutExpired:
                if pace.due():
                    log.info("verifying: %s so far", pace.so_far())
                if stop.requested:
                    child.terminate()
            else:
                return child.returncode, stdout


def verify_command(plan: Nightly, seed: int) -> list[str]:
    level = plan.verify.level
    words = ["-m", "pipeline.verify", level, "--out", str(plan.index.out), "--json"]
    if level != "quick":  # of what is published next, whatever is shown now
        words += ["--model", plan.index.model or default_model()]
    return words + (["--rows", str(plan.verify.rows), "--seed", str(seed)] if level == "sample" else [])


def settle(sources: Sequence[Tonight], published: Published, verified: Verified, stop: Stop, clock: Clock) -> None:
    """Every source that was begun gets the record that `pipeline.index` would have left."""
    for one in sources:
        if one.indexed is None:
            continue
        phases_s = one.indexed.clock.phases_s
        phases_s |= {phase: clock.phases_s.get(phase, 0.0) for phase in ("verifying", "publishing")}
        phases_s |= {"ann": clock.phases_s["ann"]} if "ann" in clock.phases_s else {}
        report = account(one.config, one.indexed, published, stop.requested, sum(phases_s.values()))
        if one.error or verified.exit == DAMAGED:
            report = replace(report, exit=one.exit if one.error else DAMAGED)
        one.report, one.exit = report, report.exit
        others = [f"{other.name}: {other.error}" for other in sources if other.error and other is not one]
        try:
            write_record(one.config, one.indexed, report, error=one.error, also_failed=others)
        except StoreError as error:  # what this night has done and found is told all the same
            if one.error:
                log.error("run %d leaves no record: %s", one.indexed.run, error)
            else:
                one.fail(error)
                one.report = replace(report, exit=one.exit)


def write_pages(index: Path, ready: Sequence[Tonight]) -> None:
    for one in ready:
        if one.indexed is not None and (index / "runs" / f"{one.indexed.run}.json").is_file():
            try:
                log.info("page %s", write_report(index, one.indexed.run))
            except ReportError as error:
                log.error("no page of run %d: %s", one.indexed.run, error)
            except FAILURES as error:
                log.error("no page of run %d: %s", one.indexed.run, words(error))
            except Exception:  # a page is made of whatever pictures hold, and no night fails for it
                log.exception("no page of run %d", one.indexed.run)


def check(path: Path, plan: Nightly) -> int:
    """What would run, as commands that anybody may type; and what of it is not there."""
    code, lines = DONE, ["Every night, below one lock:"]
    for source in plan.sources:
        words = index_command(plan, source)
        lines.append(f"  {shlex.join(['python', '-m', 'pipeline.index', *words])}")
        try:
            parse_index(words)
        except FAILURES as error:
            code = exit_code(error)
            lines.append(f"    CANNOT RUN: {error}")
        for other in plan.sources:
            if other.holds(source):
                lines.append(f"    WARNING: it lies in {other.kind} {other.root}, so its pictures are answered twice")
    if plan.index.budget_s is not None:
        lines.append(f"  all within {duration.words(plan.index.budget_s)}, publishing included")
    if plan.verify.level != "off":
        lines.append(f"  {shlex.join(['python', *verify_command(plan, seed=0)])}")
    lines.append(f"  one generation for all, {plan.index.keep} kept")
    for what, file in (("page", plan.index.out / "runs/<n>.html" if plan.report.page else None),
                       ("log", plan.report.log), ("metrics", plan.report.metrics)):  # fmt: skip
        if file is None:
            continue
        lines.append(f"  {what} {file.absolute()}")
        if refused := _refused(file, what):
            code = USAGE
            lines.append(f"    CANNOT BE WRITTEN: {refused}")
    if plan.webhook is not None:
        lines.append(f"  webhook on failure at {urlsplit(plan.webhook.url).hostname}")
    print(f"{path} is right." if code == DONE else f"{path} can be read, but not all that it asks for can be done.")
    print(*lines, sep="\n")
    return code


def _refused(file: Path, what: str) -> str:
    """Why this user cannot write it; "" where nothing is in the way."""
    if file.is_dir():
        return f"{file} is a folder"
    appended = what == "log" and os.access(file, os.W_OK)  # in a folder that may be another user's
    return "" if appended or what == "page" else refusal(file.parent)


def nightly_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.nightly", description="Bring an index up to date with its sources, every night.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "--config", type=Path, required=True, metavar="TOML", help="what to do; see docker/nightly.toml"
    )
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="append one JSON object per event (default: as TOML says)"
    )
    parser.add_argument("--check", action="store_true", help="say what would run, and do nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args = nightly_parser().parse_args(argv)
    try:
        plan = load(args.config)
    except UsageError as error:
        log.error("error: %s", error)
        print(json.dumps({"schema": SCHEMA, "error": str(error), "exit": USAGE}), flush=True)
        return USAGE
    plan = replace(plan, report=replace(plan.report, log=args.log or plan.report.log))
    if args.check:
        return check(args.config, plan)
    start_s, started = time.monotonic(), datetime.now().astimezone()
    try:
        if plan.report.log is not None:
            write_log(plan.report.log)
        night = run_night(plan, Stop())
    except FAILURES as error:
        night = failed(plan, error, exit_code(error), time.monotonic() - start_s)
    except Exception as error:  # a fault of ours: nobody watches at night, so somebody has to be told
        log.exception("a fault of Nightjar")
        night = failed(plan, error, FAILED, time.monotonic() - start_s)
    night["started"] = started.isoformat(timespec="seconds")
    tell_all(plan, night)
    print(json.dumps(night), flush=True)
    return int(night["exit"])
