"""`bench tune`: whether what `python -m pipeline.tune` found is the fastest: against up to eleven other settings of the
same CPU engine, real lanes on the same pictures, in interleaved rounds. Engines that were not tuned are left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines import EngineUnavailable, choose, device_of
from engines.hardware import physical_cores
from engines.spec import Artifact, ArtifactMissing, EngineCard, find_artifact
from pipeline.bench.processes import Limit
from pipeline.devices import EngineWish
from pipeline.setting import Setting, Tuned, memory_limit_bytes, tuned_for
from pipeline.sources import Source, open_source
from pipeline.tune.config import TuneConfig
from pipeline.tune.trial import Rehearsal, sample
from pipeline.tune.tuner import Tuning

POINTS_MAX = 12
SECONDS_MIN, BATCHES_MIN = 4.0, 4  # of a measurement


def points(found: Setting, default: Setting, own_batch: int, cores: int) -> list[Setting]:
    """`found` first; each other one is a plain choice that a person would try, or one step from `default`."""
    several = [replace(default, lanes=lanes, engine_threads=cores // lanes, decode_threads=decode, team=team)
               for lanes in (1, 2, cores) if lanes <= cores
               for decode in (1, cores // lanes)
               for team in (1, cores // lanes)]  # fmt: skip
    steps = [
        replace(default, batch=max(1, own_batch // 2)),
        replace(default, batch=2 * own_batch),
        replace(default, lead_batches=1),
        replace(default, lead_batches=2 * default.lead_batches),
        replace(default, engine_threads=max(1, default.engine_threads - 1), team=1),
    ]
    return list(dict.fromkeys([found, default, *several, *steps]))[:POINTS_MAX]


def settings(model: str, pictures: Path, rounds: int, limit: Limit, work: Path) -> Iterator[dict[str, Any]]:
    """Rows so far, a table of `points` and one of what was found over the fastest of them."""
    artifact, source = find_artifact(model), open_source("folder", str(pictures))
    whole: dict[str, Any] = {"model": model, "found": [], "points": []}
    for part in ("shards", "logs"):
        (work / part).mkdir()
    for card, tuned, tuning in _tuned_engines(artifact, source, limit, work):
        seconds = max(SECONDS_MIN, BATCHES_MIN * card.batch / card.rows_per_s)
        rates: dict[Setting, list[float]] = {
            one: [] for one in points(tuned.setting, tuning.default(), card.batch, physical_cores())
        }
        for _ in range(rounds):
            for setting, seen in rates.items():
                if limit.left_s > 2 * seconds and (one := tuning.measure(setting, seconds)).seconds:
                    seen.append(one.rows_per_s)
        engine = f"{card.runtime} {card.precision}"
        rounds_done = max(1, min(map(len, rates.values())))  # rounds differ: one that was cut does not count
        medians = {one: statistics.median(seen[:rounds_done]) for one, seen in rates.items() if seen}
        best = max(medians.values(), default=0.0)
        whole["points"] += [
            {"engine": engine, "setting": one.words("cpu"), "images_per_s": median, "over_best": median / best,
             "each": " ".join(f"{rate:.1f}" for rate in rates[one])}
            for one, median in medians.items()
        ]  # fmt: skip
        whole["found"].append(
            {"engine": engine, "setting": tuned.setting.words("cpu"), "measured": len(medians), "rounds": rounds_done,
             "search_s": tuned.seconds, "over_best": medians.get(tuned.setting, 0.0) / best if best else None}
        )  # fmt: skip
        yield whole
    if not whole["found"]:
        command = f"python -m pipeline.tune --source folder --root {pictures} --model {model}"
        raise ArtifactMissing(f"no engine of {model} was tuned on this CPU. Run: {command}")


def _tuned_engines(
    artifact: Artifact, source: Source, limit: Limit, work: Path
) -> Iterator[tuple[EngineCard, Tuned, Tuning]]:
    rows, start_s = sample(source), time.monotonic()
    for _, card in artifact.cards():
        if card.tower != "vision" or device_of(card.runtime) != "cpu":
            continue
        wish = EngineWish(artifact, card.runtime, card.precision)
        try:
            choice = choose(artifact, "vision", card.runtime, card.precision)
        except EngineUnavailable:  # of another host, or of other versions
            continue
        tuned, _ = tuned_for(choice, ("cpu",))
        if tuned is not None:
            cfg = TuneConfig(source, wish, ("cpu",), memory_limit_bytes(), json_only=True)
            yield card, tuned, Tuning(cfg, choice, Rehearsal(rows, work, start_s + limit.left_s), work, start_s)
