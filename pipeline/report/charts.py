"""Numbers of a run as shapes: SVG paths and shares of bars. The page puts words around them, so that they stay readable
at any width; shapes are stretched to it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

WIDTH, HEIGHT = 1000, 200  # of the drawing, in its own units
POINTS_MIN = 3  # fewer make no line
LEAST_WORK = 0.5  # of a point's time that the lanes worked, for it to be the last one


class Band(NamedTuple):
    """A stretch of time in which one stage held all others up."""

    x: float
    width: float
    stage: str


class Share(NamedTuple):
    name: str
    seconds: float
    share: float  # of the whole bar


@dataclass(frozen=True, slots=True)
class Chart:
    line: str  # an SVG path
    area: str
    bands: list[Band]
    ticks: list[tuple[float, float]]  # images/s, and how far down in percent
    length_s: float
    peak: float  # images/s
    bound: list[Share]  # lane seconds by bound stage, the largest first


def chart(series: Mapping[str, Any]) -> Chart | None:
    """None where the run was too short to draw."""
    width_s = series["width_s"]
    # What is left of a second after the last batch is no rate: the line would fall to nothing.
    whole = [at for at, lane_s in enumerate(series["lane_s"]) if lane_s >= LEAST_WORK * width_s]
    length = whole[-1] + 1 if whole else 0
    rows, lane_s, bound = (series[column][:length] for column in ("rows", "lane_s", "bound"))
    if length < POINTS_MIN:
        return None
    rates = [count / width_s for count in rows]
    top = _nice(max(rates))
    step = WIDTH / len(rates)
    points = [(step * (at + 0.5), HEIGHT * (1 - rate / top)) for at, rate in enumerate(rates)]
    line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    area = f"{line}L{points[-1][0]:.1f} {HEIGHT}L{points[0][0]:.1f} {HEIGHT}Z"
    bands: list[Band] = []
    for at, stage in enumerate(bound):
        if bands and bands[-1].stage == stage:
            bands[-1] = Band(bands[-1].x, bands[-1].width + step, stage)
        else:
            bands.append(Band(step * at, step, stage))
    by_stage: Counter[str] = Counter()
    for stage, worked_s in zip(bound, lane_s, strict=True):
        by_stage[stage] += worked_s
    del by_stage[""]
    return Chart(
        line, area, [band for band in bands if band.stage], [(top * part, 100 * (1 - part)) for part in (1, 0.5, 0)],
        width_s * len(rates), max(rates), shares(dict(by_stage.most_common())),
    )  # fmt: skip


def stages(series: Mapping[str, Any]) -> list[tuple[str, list[Share]]]:
    """Per stage, how its time went: at work, and waiting for whom."""
    lane_s = sum(series["lane_s"])
    waits = {
        "read": {"wait for decode": "read_wait_s"},
        "decode": {"wait for bytes": "decode_wait_s", "wait for engine": "slot_wait_s"},
        "engine": {"wait for pixels": "encode_wait_s"},
    }
    found = []
    for stage, kinds in waits.items():
        waited = {words: min(lane_s, sum(series[column])) for words, column in kinds.items()}
        work_s = max(0.0, lane_s - sum(waited.values()))
        found.append((stage, shares({"work": work_s, **waited})))
    return found if lane_s else []


def shares(seconds: Mapping[str, float]) -> list[Share]:
    total = sum(seconds.values()) or 1.0
    return [Share(name, value, value / total) for name, value in seconds.items()]


def _nice(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8 and their tenfolds: an axis that ends in a round number."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * factor for factor in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if unit * factor >= value * 0.999)


def median_rate(series: Mapping[str, Any]) -> float:
    """images/s of the middle bin among those in which lanes worked."""
    rates: Sequence[float] = sorted(
        rows / series["width_s"] for rows, lane_s in zip(series["rows"], series["lane_s"], strict=True) if lane_s
    )
    return rates[len(rates) // 2] if rates else 0.0
