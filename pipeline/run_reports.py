"""What earlier runs left in runs/<n>.json, for whoever plans or shows the next one. Needs no lock and no manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config import UsageError
from pipeline.duration import words

LOOK_BACK_RUNS = 10  # a run that changed nothing publishes in no time: the longest of a few is the honest figure
MARGIN = 1.25  # an index grows from night to night


def read_report(out: Path, run: int) -> dict[str, Any] | None:
    """None for a run that is still going on, or left no report: it failed or was killed."""
    try:
        report: dict[str, Any] = json.loads((out / "runs" / f"{run}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return report


def recent_reports(out: Path, count: int) -> list[dict[str, Any]]:
    """Of the last `count` runs that left one, newest first."""
    runs = sorted((int(path.stem) for path in (out / "runs").glob("*.json") if path.stem.isdecimal()), reverse=True)
    return [report for run in runs[:count] if (report := read_report(out, run)) is not None]


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
