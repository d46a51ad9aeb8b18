"""`python -m pipeline.report`: what a run did, as one page for the morning after, runs/<n>.html.

Made of runs/<n>.json, the runs before it and the generation it published; the manifest is not opened. The page needs
nothing but itself: no script, no network, pictures inside.
"""

from __future__ import annotations

import json
import logging
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np

from pipeline.config import UsageError, only_index_here
from pipeline.exits import DONE, FAILED, USAGE
from pipeline.report.charts import HEIGHT, WIDTH, Share, chart, median_rate, shares, stages
from pipeline.report.looks import NEAR_DUPLICATE_COSINE, Looks, look
from pipeline.report.thumbnails import Request, Thumbnails
from pipeline.report.words import MEANING, STATES, advice, again, headline, page_template
from pipeline.run_reports import unended
from pipeline.store import Generation, NoIndex, StoreError
from pipeline.store.files import write_text
from pipeline.terminal import reader_may_leave

log = logging.getLogger("nightjar")

SCHEMA = 1  # of runs/<n>.json
PARTS = ("unchanged", "embedded", "copied", "quarantined", "pending")  # their sum is inputs
RUNS_SHOWN, LOOK_BACK_RUNS = 8, 100  # other sources may have runs in between
THUMBNAILS_QUARANTINED = 24
OPEN_CARDS, OPEN_CARDS_NEW = 3, 12  # of a reason; the rest unfolds
SHOWABLE = ("truncated", "corrupt", "too_large")  # the others have nothing to show, or are not to be decoded again

EXAMPLES = """examples:
  python -m pipeline.report                          # of the last run of the only ./*-index here
  python -m pipeline.report --out birds-index --run 12

exit codes: 0 done, 1 failed, 2 usage"""


class ReportError(Exception):
    """There is no such run, or its record cannot be read; the message says what there is."""


def write_report(index: Path, run_number: int) -> Path:
    """Write runs/<n>.html and return its path.

    Raises:
        ReportError: no run of that number, or its record is not one. StoreError, OSError: damage, a full disk.
    """
    run = load_run(index, run_number)
    history = list(_history(index, run))
    with Thumbnails() as thumbnails:
        tonight, unseen = _tonight(index, run, thumbnails)
        quarantine = list(_quarantine(run, thumbnails))
        untold = thumbnails.excuse()
    series = run.get("throughput") or {"width_s": 1.0, "rows": [], "lane_s": [], "bound": []}
    page = page_template().get_template("page.html").render(
        run=run, started=_moment(run), state=STATES.get(run["exit"], "failed"), headline=headline(run),
        advice=advice(run, index), unended=unended(index, run_number),
        again=again(run, index), before=history[0] if history else None, history=history,
        parts=PARTS, adds_up=run["inputs"] == sum(run[part] for part in PARTS), chart=chart(series),
        median=median_rate(series), stages=stages(series) if series["rows"] else [], phases=_phases(run),
        tonight=tonight, unseen=unseen, quarantine=quarantine, meaning=MEANING, untold=untold, width=WIDTH,
        height=HEIGHT, near=NEAR_DUPLICATE_COSINE, made=datetime.now(UTC),
    )  # fmt: skip
    path = index / "runs" / f"{run_number}.html"
    write_text(path, page)
    return path


def load_run(index: Path, number: int) -> dict[str, Any]:
    """The record of one run.

    Raises:
        ReportError: there is none, or it is not one.
    """
    path = index / "runs" / f"{number}.json"
    try:
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = ", ".join(map(str, run_numbers(index)[-RUNS_SHOWN:])) or "none"
        raise ReportError(f"{index} has no record of run {number}, only of {there}; a killed one left none") from None
    except ValueError as error:
        raise ReportError(f"{path} is no JSON ({error}): it was damaged after the run; take another one") from None
    if run.get("schema") != SCHEMA or not {"inputs", "exit", *PARTS} <= run.keys():
        raise ReportError(f"{path} has schema {run.get('schema')} or no counts; expected a run of schema {SCHEMA}")
    return {"run": number, **run}


def run_numbers(index: Path) -> list[int]:
    """Runs with a record, oldest first."""
    return sorted(int(path.stem) for path in (index / "runs").glob("*.json") if path.stem.isdecimal())


def _history(index: Path, run: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The runs of the same source before this one, the latest first."""
    found = 0
    earlier_numbers = [number for number in run_numbers(index) if number < run["run"]]
    for number in reversed(earlier_numbers[-LOOK_BACK_RUNS:]):
        try:
            earlier = load_run(index, number)
        except ReportError as error:
            log.warning("left out of the report: %s", error)
            continue
        if earlier.get("source") == run.get("source") and found < RUNS_SHOWN:
            found += 1
            yield {**earlier, "page": (index / "runs" / f"{number}.html").is_file(), "when": _moment(earlier)}


def _moment(run: Mapping[str, Any]) -> datetime | None:
    return datetime.fromisoformat(run["started"]) if "started" in run else None


def _phases(run: Mapping[str, Any]) -> list[Share]:
    phases = dict(run.get("phases_s", {}))
    return shares({**phases, "other": max(0.0, run["seconds"] - sum(phases.values()))}) if phases else []


def _tonight(index: Path, run: Mapping[str, Any], thumbnails: Thumbnails) -> tuple[dict[str, Any] | None, str]:
    """Neighbours and drift of the new pictures, or why there are none."""
    if not run["embedded"] or not run.get("sample_ids"):
        return None, "No picture was embedded in this run."
    if run.get("generation") is None:
        return None, "Nothing was published yet: the new pictures can be searched once a run completes."
    try:
        generation = Generation.at(index, run["generation"])
    except NoIndex:
        return None, f"Generation {run['generation']}, which this run published, is no longer kept."
    with generation:
        looks = look(generation, run["sample_ids"], run["embedded"])
        return {"looks": looks, "samples": list(_samples(generation, looks, thumbnails))}, ""


def _samples(generation: Generation, looks: Looks, thumbnails: Thumbnails) -> Iterator[list[dict[str, Any]]]:
    """Cards of a new picture and of those nearest to it."""
    for sample in looks.samples:
        rows = np.array([sample.row, *(row for row, _ in sample.nearest)], np.int64)
        scores = [None, *(score for _, score in sample.nearest)]
        told = zip(generation.keys(rows), generation.metadata(rows), generation.pictures(rows), scores, strict=True)
        yield [
            {
                "key": key,
                "label": metadata.get("common_name") or metadata.get("label", ""),
                "cosine": score,
                "thumbnail": thumbnails.make(Request(*_place(found.source), found.locator, found.size_bytes)),
            }
            for key, metadata, found, score in told
        ]


def _place(source: Any) -> tuple[str, str, Mapping[str, Any]]:
    return source.kind, source.root, source.options


def _quarantine(run: Mapping[str, Any], thumbnails: Thumbnails) -> Iterator[dict[str, Any]]:
    """By reason, the most frequent first; in each the new ones first, then those that can be shown."""
    reasons = sorted(run.get("quarantine", {}).items(), key=lambda entry: -entry[1]["count"])
    each = THUMBNAILS_QUARANTINED // max(1, sum(reason in SHOWABLE for reason, _ in reasons))
    for reason, found in reasons:
        left = each if reason in SHOWABLE else 0
        cards = []
        for row in found["examples"]:
            thumbnail = None
            if left:
                source, locator = run["source"], unquote_to_bytes(row["locator"])
                thumbnail = thumbnails.make(
                    Request(source["kind"], source["root"], source["options"], locator, row["size_bytes"])
                )
                left -= bool(thumbnail)
            cards.append({**row, "thumbnail": thumbnail, "new": row["last_seen"] == run["run"]})
        cards.sort(key=lambda card: (not card["new"], not card["thumbnail"]))
        opened = max(OPEN_CARDS, min(OPEN_CARDS_NEW, sum(card["new"] for card in cards)))
        yield {"reason": reason, "count": found["count"], "open": cards[:opened], "folded": cards[opened:]}


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = ArgumentParser(
        prog="python -m pipeline.report", description="A page about a run: runs/<n>.html in the index.",
        epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="the index (default: the only ./*-index here)")
    parser.add_argument("--run", type=int, metavar="N", help="which run (default: the last one)")
    args = parser.parse_args(argv)
    try:
        index = args.out or only_index_here()
        numbers = run_numbers(index)
        if args.run is None and not numbers:
            begun = (index / "manifest.sqlite").exists()
            raise ReportError(
                f"no run into {index} has ended yet; python -m pipeline.status --out {index} says how far it is"
                if begun
                else f"no run in {index}; make one: python -m pipeline.index --out {index} ..."
            )
        with reader_may_leave():
            print(write_report(index, numbers[-1] if args.run is None else args.run))
    except (UsageError, ReportError) as error:
        log.error("error: %s", error)
        return USAGE
    except (StoreError, OSError) as error:
        log.error("error: %s", error)
        return FAILED
    return DONE
