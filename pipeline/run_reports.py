"""What earlier runs left in runs/<n>.json, for whoever plans or shows the next one. Needs no lock and no manifest."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import UsageError
from pipeline.duration import words
from pipeline.store.files import write_text

log = logging.getLogger("nightjar")

LOOK_BACK_RUNS = 10  # a run that changed nothing publishes in no time: the longest of a few is the honest figure
NIGHT = "last-night.json"
MARGIN = 1.25  # an index grows from night to night


def read_report(out: Path, run: int) -> dict[str, Any] | None:
    """None for a run that is still going on, or never ended."""
    try:
        report: dict[str, Any] = json.loads((out / "runs" / f"{run}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return report


def write_night(out: Path, night: Mapping[str, Any]) -> None:
    """What the last night came to, also where no source of it could be begun; read by `pipeline.status`."""
    told = {name: night[name] for name in ("started", "seconds", "generation", "words", "exit")}
    write_text(out / "runs" / NIGHT, json.dumps(told, indent=1))


def read_night(out: Path) -> dict[str, Any] | None:
    try:
        night: dict[str, Any] = json.loads((out / "runs" / NIGHT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return night


def recent_reports(out: Path, count: int) -> list[dict[str, Any]]:
    """Of the last `count` runs that left one, newest first."""
    runs = sorted((int(path.stem) for path in (out / "runs").glob("*.json") if path.stem.isdecimal()), reverse=True)
    return [report for run in runs[:count] if (report := read_report(out, run)) is not None]


def unended(out: Path, run: int) -> list[int]:
    """Runs right before this one that left no record; newest first."""
    found: list[int] = []
    for earlier in range(run - 1, max(0, run - 1 - LOOK_BACK_RUNS), -1):
        if (out / "runs" / f"{earlier}.json").exists():
            break
        found.append(earlier)
    return found


def tell_unended(out: Path, run: int) -> None:
    """To be called by who holds the lock and has not begun another run, so that none of them is going on."""
    for earlier in unended(out, run):
        why = "it was killed, its machine went down, or its disk was full"
        log.warning("run %d never ended: %s. This one goes on there", earlier, why)


def unlisted_words(unlisted: Mapping[str, Any] | None) -> str:
    """Of a run's or a night's record; "" where all could be listed."""
    if not unlisted or not unlisted["count"]:
        return ""
    count, first = unlisted["count"], unlisted["examples"][0]
    parts = "1 part of the source" if count == 1 else f"{count:,} parts of the source"
    return f"{parts} could not be listed, such as {first['key_prefix']}: {first['words']}"


def publishing_s(out: Path) -> float:
    """Seconds to keep back for publishing, and the look at the index before it, by what they took lately; 0 where
    nothing is known."""
    phases_s = [report.get("phases_s", {}) for report in recent_reports(out, LOOK_BACK_RUNS)]
    took = [phase_s.get("verifying", 0.0) + phase_s.get("publishing", 0.0) for phase_s in phases_s]
    return MARGIN * max(took, default=0.0)


def work_s(budget_s: float, keep_back_s: float) -> float:
    """Seconds of a budget that are left for listing and embedding.

    Raises:
        UsageError: publishing alone would take them all, so that a run with this budget never got anywhere.
    """
    if budget_s <= keep_back_s:
        raise UsageError(
            f"a budget of {words(budget_s)} is too short: publishing is expected to take {words(keep_back_s)} of it; "
            f"give at least {words(2 * keep_back_s)}"
        )
    return budget_s - keep_back_s
