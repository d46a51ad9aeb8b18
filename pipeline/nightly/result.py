"""What a night came to: each source, the look at the index, and the one JSON object that sums them up."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engines.spec import default_model
from pipeline.config import Config
from pipeline.exits import (
    BUDGET_SPENT,
    DAMAGED,
    DONE,
    FAILED,
    INTERRUPTED,
    LOCKED,
    MANY_DELETED,
    MANY_QUARANTINED,
    USAGE,
)
from pipeline.failures import exit_code, words
from pipeline.index import UNLISTED_SHOWN, Indexed, Published, Report, Unlisted
from pipeline.nightly.config import Nightly, SourceTable
from pipeline.run_record import Clock
from pipeline.run_reports import unlisted_words

log = logging.getLogger("nightjar")

SCHEMA = 1
COUNTED = ("inputs", "unchanged", "embedded", "copied", "quarantined", "quarantined_new", "pending", "deleted")
# Of several sources the first of these that occurs is the exit code of the night.
GRAVEST = (INTERRUPTED, LOCKED, FAILED, DAMAGED, USAGE, MANY_DELETED, MANY_QUARANTINED, BUDGET_SPENT, DONE)


@dataclass
class Tonight:
    """One source and what became of it."""

    table: SourceTable
    cfg: Config | None = None  # None: it is not there, or the model is not
    indexed: Indexed | None = None
    report: Report | None = None
    failure: Exception | None = None
    error: str = ""  # its words
    exit: int = DONE

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.table.kind, self.table.root, self.table.split)))

    @property
    def config(self) -> Config:
        assert self.cfg is not None, f"{self.name} has failed before: {self.error}"
        return self.cfg

    def fail(self, error: Exception) -> None:
        self.failure, self.error, self.exit = error, words(error), exit_code(error)
        log.error("%s: %s", self.name, self.error)


@dataclass(frozen=True)
class Verified:
    """What the look at the index came to."""

    exit: int = DONE
    verdict: dict[str, Any] | None = None  # the JSON of pipeline.verify; None: not asked for, or it did not come to one
    words: str = ""  # why the exit code is what it is


def summary(
    plan: Nightly, sources: Sequence[Tonight], published: Published, verified: Verified, interrupted: bool,
    clock: Clock, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Sums over the sources that were begun, as they are now, and each of them."""
    reports = [one.report for one in sources if one.report is not None]
    sums = {name: sum(getattr(report, name) for report in reports) for name in COUNTED}
    bound_s: Counter[str] = Counter()
    for one in sources:
        bound_s.update(one.indexed.totals.bound_s if one.indexed else {})
    codes = {verified.exit, *(one.exit for one in sources), INTERRUPTED if interrupted else DONE}
    errors = [f"{one.name}: {one.error}" for one in sources if one.error]
    errors += [
        f"{one.name}: more newly quarantined, or not listed, than max_quarantined = {plan.index.max_quarantined:,}"
        for one in sources
        if one.exit == MANY_QUARANTINED
    ]
    parts = [part for report in reports for part in report.unlisted.examples]
    unlisted = asdict(Unlisted(sum(report.unlisted.count for report in reports), parts[:UNLISTED_SHOWN]))
    told = [work_words(sums), unlisted_words(unlisted), *errors, "" if interrupted else verified.words]
    return {
        "schema": SCHEMA,
        **sums,
        "seconds": round(seconds, 3),
        "phases_s": clock.phases_s,
        "unlisted": unlisted,
        "images_per_s": round((sums["embedded"] + sums["copied"]) / seconds, 2),
        "bound": max(bound_s, key=lambda stage: bound_s[stage], default=""),
        "lanes": sorted({lane for report in reports for lane in report.lanes}),
        "decoders": dict(sum((Counter(report.decoders) for report in reports), Counter[str]())),
        "model": reports[0].model if reports else plan.index.model or default_model(),
        "index": str(plan.index.out / "index.h5"),
        "generation": published.generation,
        "model_change": published.model_change and asdict(published.model_change),
        "verify": verified.verdict,
        "sources": [
            {"source": one.name, "run": one.indexed and one.indexed.run}
            | (asdict(one.report) if one.report else {})
            | {"error": one.error, "exit": one.exit}
            for one in sources
        ],
        "words": "; ".join(filter(None, told)),
        "exit": next((code for code in GRAVEST if code in codes), FAILED),
    }


def work_words(done: Mapping[str, int]) -> str:
    """Of one source or all of them; what `COUNTED` names."""
    left = f"; {done['pending']:,} are left for the next run" if done["pending"] else ""
    return (
        f"{done['embedded']:,} embedded, {done['copied']:,} copied, {done['quarantined_new']:,} newly quarantined, "
        f"{done['deleted']:,} deleted of {done['inputs']:,} pictures{left}"
    )


def failed(plan: Nightly, error: Exception, code: int, seconds: float) -> dict[str, Any]:
    """The last line of a night that came to nothing."""
    return {
        "schema": SCHEMA,
        "seconds": round(seconds, 3),
        "phases_s": {},
        "index": str(plan.index.out / "index.h5"),
        "generation": None,
        "sources": [],
        "error": words(error),
        "words": words(error),
        "exit": code,
    }
