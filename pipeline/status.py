"""`python -m pipeline.status`: what an index holds, what it could not take in and why, and what its last runs did.

Works while a run is going on, and shows the state of its last commit. Takes no lock and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shlex
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape

from pipeline.config import UsageError, index_words, only_index_here
from pipeline.exits import DONE, FAILED, USAGE
from pipeline.generations import Kept, kept_generations
from pipeline.run_reports import read_night, read_report, unlisted_words
from pipeline.store import NoIndex, StoreError
from pipeline.store.ledger import Entry, SourceState, Stock, quarantine_ledger, take_stock
from pipeline.terminal import printable
from pipeline.writing import writer

log = logging.getLogger("nightjar")

SCHEMA = 1
STATES = ("embedded", "pending", "quarantined", "deleted")
TOLD = ("exit", "error", "seconds", "embedded", "quarantined_new", "unlisted", "deleted")  # of a run, by its record
EXAMPLES_PER_REASON, RUNS_SHOWN = 3, 5
EXAMPLES = """examples:
  python -m pipeline.status --out inat2021-index
  python -m pipeline.status --out inat2021-index --json
  python -m pipeline.status --out inat2021-index --ledger > quarantine.jsonl

exit codes: 0 done, 1 failed, 2 usage"""


def status_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.status", description="What an index holds, what it lacks and why.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="the index (default: the only ./*-index here)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument(
        "--ledger", action="store_true", help="one JSON line for each quarantined picture, nothing else"
    )
    return parser


def status(index: Path) -> dict[str, Any]:
    """Everything that is shown, as it goes into the JSON.

    Raises:
        NoIndex: nothing was ever indexed there. sqlite3.Error, StoreError, OSError: what is there cannot be read.
    """
    stock = take_stock(index, examples=EXAMPLES_PER_REASON, runs=RUNS_SHOWN)
    kept, running = _kept(index), writer(index)
    shown = next((one for one in kept if one.shown), None)
    return {
        "schema": SCHEMA,
        "index": str(index),
        "running": running,
        "generation": shown and {"number": shown.number, "published": shown.published, "rows": shown.rows,
                                 "model": shown.model, "pinned": stock.pinned is not None},
        "generations": [one.number for one in kept],
        "bytes": {part: _bytes(index, part) for part in ("manifest", "shards", "segments", "generations")},
        "sources": [_source(index, source, stock, shown) for source in stock.sources],
        "last_night": read_night(index),
        "runs": _runs(index, stock, running),
    }  # fmt: skip


def _kept(index: Path) -> list[Kept]:
    """None in a first run that has not published yet."""
    return kept_generations(index) if (index / "current").is_symlink() else []


def _bytes(index: Path, part: str) -> int:
    total = 0
    for path in index.glob("manifest.sqlite*" if part == "manifest" else f"{part}/**/*"):
        try:
            total += path.lstat().st_size if not path.is_symlink() and path.is_file() else 0
        except FileNotFoundError:  # a run is going on, and has just deleted it
            continue
    return total


def _source(index: Path, source: SourceState, stock: Stock, shown: Kept | None) -> dict[str, Any]:
    ours = [entry for entry in stock.examples if entry.source == source.number]
    command = index_words(source.kind, source.root, source.options)
    command += ["--out", str(index)] + (["--model", shown.model] if shown and shown.model else [])
    return {
        "kind": source.kind, "root": source.root, "options": source.options,
        "embedded": source.embedded, "pending": source.pending, "quarantined": source.quarantined,
        "deleted": source.deleted,
        "reasons": {
            reason: {
                "count": count, "examples": [_as_json(entry) for entry in ours if entry.reason == reason],
                "retry": shlex.join([*command, "--retry", reason]),
            }
            for reason, count in source.reasons.items()
        },
    }  # fmt: skip


def _runs(index: Path, stock: Stock, running: int | None) -> list[dict[str, Any]]:
    roots = {source.number: source.root for source in stock.sources}
    now_s = _started_s(running) if running is not None else math.inf
    runs = []
    for start in stock.runs:
        report = read_report(index, start.run)
        told = {name: (report or {}).get(name) for name in TOLD}
        never_ended = report is None and start.started_s < now_s
        told |= {"run": start.run, "root": roots[start.source], "started": _time(start.started_s)}
        runs.append(told | {"never_ended": never_ended})
    return runs


def _started_s(process: int) -> float:
    """Seconds since 1970, rounded down as the manifest does; 0 where another container's processes cannot be asked."""
    try:
        return math.floor(psutil.Process(process).create_time())
    except psutil.Error:
        return 0.0


def _as_json(entry: Entry) -> dict[str, Any]:
    told = entry._asdict()
    seen = {name: _time(told.pop(f"{name}_s")) for name in ("first_seen", "last_seen")}
    return told | seen


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _print(found: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(f"[bold]{escape(found['index'])}[/]", *map(escape, _headline(found)), sep="\n  ", soft_wrap=True)
    for source in found["sources"]:
        states = ", ".join(f"{source[state]:,} {state}" for state in STATES)
        console.print(escape(f"{_name(source)}: {states}"), soft_wrap=True)
    for source in found["sources"]:
        for reason, told in source["reasons"].items():
            console.print(f"[bold]{reason}[/] {told['count']:,} of {escape(_name(source))}")
            for entry in told["examples"]:
                tried = f"tried {entry['attempts']} times" if entry["attempts"] > 1 else "tried once"
                line = f"  {escape(printable(entry['key']))}: {escape(printable(entry['words']))} ({tried})"
                console.print(line, soft_wrap=True)
            console.print(f"  try again: {escape(told['retry'])}", soft_wrap=True)
    if night := found["last_night"]:
        line = f"last night that ended, begun {night['started']}: exit {night['exit']}: {printable(night['words'])}"
        console.print(escape(line), soft_wrap=True)
    for run in found["runs"]:
        console.print(escape(_run_line(run)), soft_wrap=True)


def _headline(found: dict[str, Any]) -> Iterator[str]:
    shown = found["generation"]
    if shown is None:
        yield "no generation is published yet"
    else:
        pinned = ", chosen by hand" if shown["pinned"] else ""
        head = f"generation {shown['number']} of {shown['published']}{pinned}"
        yield f"{head}: {shown['rows']:,} pictures, {shown['model']}"
        if (newest := found["generations"][-1]) != shown["number"]:
            newest_again = ["python", "-m", "pipeline.generations", "--out", found["index"], "--show", "newest"]
            yield f"generation {newest} is newer, and not seen by readers; to show it: {shlex.join(newest_again)}"
    yield ", ".join(f"{part} {size / 1e6:,.1f} MB" for part, size in found["bytes"].items())
    if found["running"] is not None:
        yield f"a run is going on (process {found['running']})"


def _run_line(run: dict[str, Any]) -> str:
    head = f"run {run['run']} {run['started']} {run['root']}: "
    if run["never_ended"]:
        why = "it was killed, its machine went down, or its disk was full"
        return f"{head}never ended: {why}. The next run goes on there"
    if run["exit"] is None:
        return head + "going on"
    done = (
        f"exit {run['exit']}, {run['embedded']:,} embedded, {run['quarantined_new']:,} newly quarantined, "
        f"{run['deleted']:,} deleted in {run['seconds']:,.0f} s"
    )
    told = [done, printable(unlisted_words(run["unlisted"])), printable(run["error"] or "")]
    return head + ": ".join(filter(None, told))


def _name(source: dict[str, Any]) -> str:
    options = "".join(f" {name} {value}" for name, value in source["options"].items())
    return f"{source['kind']} {source['root']}{options}"


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args = status_parser().parse_args(argv)
    try:
        index = args.out or only_index_here()
        if args.ledger:
            for entry in quarantine_ledger(index):
                print(json.dumps(_as_json(entry)))
        elif args.json:
            print(json.dumps(status(index)))
        else:
            _print(status(index))
    except (UsageError, NoIndex) as error:
        log.error("error: %s", error)
        return USAGE
    except (StoreError, OSError, sqlite3.Error) as error:
        log.error("error: %s", error)
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
