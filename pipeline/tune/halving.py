"""The search for the best setting, without a lane or a clock of its own: who is measured next, and for how long.

From where it stands it looks one step along each axis, and lets those neighbours race by successive halving: all are
measured briefly, the faster half for twice as long, and so on. It goes on from the winner until no step helps or the
time is over. A measurement is kept: the same setting is measured again only to know it better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from pipeline.setting import Setting

CLEAR = 1.1  # ahead by a tenth: longer measurements would not change that
WORTH = 1.03  # times the default: by less, two measurements of one setting differ too
LEAD_BATCHES_MAX = 8
GPU_LANES_MAX = 4  # on one GPU: each has weights and buffers of its own there
BATCH_FACTOR_MAX = 4  # of the engine's own batch; larger ones take memory and were never seen to pay


class Measured(NamedTuple):
    rows_per_s: float  # of all lanes together
    seconds: float
    peak_bytes: int  # of all lanes together
    problem: str = ""  # why it cannot be had; then nothing else counts
    others: float = 0.0  # share of the host's CPU time that other processes took meanwhile


@dataclass
class Trial:
    """All measurements of one setting."""

    setting: Setting
    seconds: float = 0.0
    rows: float = 0.0
    peak_bytes: int = 0
    problem: str = ""
    others: float = 0.0  # the largest

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.seconds if self.seconds and not self.problem else 0.0

    def add(self, found: Measured) -> None:
        self.seconds += found.seconds
        self.rows += found.rows_per_s * found.seconds
        self.peak_bytes, self.problem = max(self.peak_bytes, found.peak_bytes), found.problem
        self.others = max(self.others, round(found.others, 3))

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": round(self.rows), "rows_per_s": round(self.rows_per_s, 2)}


Measure: TypeAlias = Callable[[Setting, float], Measured]  # a setting, for about so many seconds
Axis: TypeAlias = Callable[[Setting], Iterator[Setting]]  # the neighbours of a setting


class Search:
    """`window_s` is the shortest measurement that says something; `over` ends the search."""

    def __init__(
        self, measure: Measure, window_s: float, over: Callable[[], bool], trials: dict[Setting, Trial] | None = None
    ) -> None:
        self.trials: dict[Setting, Trial] = {} if trials is None else trials
        self._measure, self._window_s, self._over = measure, window_s, over

    def best(self, start: Setting, axes: Sequence[Axis]) -> Setting:
        """The fastest found; `start` is always among those that were measured."""
        best, still = start, 0  # axes in a row that led nowhere
        while still < len(axes) and not self._over():
            for axis in axes:
                still += 1
                while (winner := self.race([best, *axis(best)], self._window_s)) != best:
                    best, still = winner, 0
        return best

    def worth(self, best: Setting, start: Setting, window_s: float) -> Setting:
        """`best`, if after longer measurements of both it is still worth leaving `start` for."""
        winner = self.race([start, best] if best != start else [start], window_s)
        ahead = self.trials[winner].rows_per_s > WORTH * self.trials[start].rows_per_s
        return winner if ahead else start

    def race(self, field: Sequence[Setting], window_s: float) -> Setting:
        """The fastest of `field`, by measurements that last longer the fewer are left, until one is clearly ahead."""
        while True:
            for setting in field:
                trial = self.trials.setdefault(setting, Trial(setting))
                if trial.seconds < window_s and not trial.problem and not self._over():
                    trial.add(self._measure(setting, window_s - trial.seconds))
            by_speed = sorted(field, key=lambda setting: -self.trials[setting].rows_per_s)
            rates = [self.trials[setting].rows_per_s for setting in by_speed]
            if len(field) == 1 or rates[0] > CLEAR * rates[1] or self._over():
                return by_speed[0]
            field, window_s = by_speed[: len(field) - len(field) // 2], 2 * window_s


# ---- axes --------------------------------------------------------------------------------------------------------


class CpuAxes:
    """Of lanes on a CPU. Neither engine threads nor decode threads of all lanes together exceed `cores`."""

    def __init__(self, cores: int, own_batch: Callable[[Setting], int], teams: bool) -> None:
        self._cores, self._own_batch = cores, own_batch
        self.coarse: list[Axis] = [self._split, self._lanes, *([self._team] if teams else []), self._batch, _lead]
        self.fine: list[Axis] = [self._near]

    def _split(self, now: Setting) -> Iterator[Setting]:
        """A sixteenth to a half of the cores decode; the engine has the others, or shares all of them."""
        each = self._cores // now.lanes
        for decode in sorted({max(1, each // part) for part in (16, 8, 4, 2)}):
            for engine in {max(1, each - decode), each}:
                yield self._with(now, engine_threads=engine, decode_threads=decode)
        yield self._with(now, engine_threads=each, decode_threads=each)

    def _near(self, now: Setting) -> Iterator[Setting]:
        """An eighth more or less of either, or of one for the other."""
        each, engine, decode = self._cores // now.lanes, now.engine_threads, now.decode_threads
        for step in {max(1, decode // 8), -max(1, decode // 8)}:
            for other in {engine, engine - step}:
                yield from self._if_room(now, each, other, decode + step)
        for step in {max(1, engine // 8), -max(1, engine // 8)}:
            yield from self._if_room(now, each, engine + step, decode)

    def _if_room(self, now: Setting, each: int, engine: int, decode: int) -> Iterator[Setting]:
        if 1 <= engine <= each and 1 <= decode <= each:
            yield self._with(now, engine_threads=engine, decode_threads=decode)

    def _lanes(self, now: Setting) -> Iterator[Setting]:
        for lanes in _twice_and_half(now.lanes, self._cores):
            each = self._cores // lanes
            decode = min(each, -(-now.decode_threads * now.lanes // lanes))
            for engine in {min(each, max(1, now.engine_threads * now.lanes // lanes)), max(1, each - decode)}:
                yield self._with(now, lanes=lanes, engine_threads=engine, decode_threads=decode)

    def _team(self, now: Setting) -> Iterator[Setting]:
        for team in _twice_and_half(now.team, now.engine_threads):
            yield self._with(now, team=team)

    def _batch(self, now: Setting) -> Iterator[Setting]:
        own, rows = self._own_batch(now), now.batch or self._own_batch(now)
        for batch in _twice_and_half(rows, BATCH_FACTOR_MAX * own):
            if batch * BATCH_FACTOR_MAX >= own:
                yield replace(now, batch=batch)

    def _with(self, now: Setting, **changes: int) -> Setting:
        """The batch stays as many times the engine's own as it was."""
        made = replace(now, **changes)
        made = replace(made, team=min(made.team, made.engine_threads))
        return (
            made
            if now.batch is None
            else replace(made, batch=now.batch * self._own_batch(made) // self._own_batch(now))
        )


class GpuAxes:
    """Of lanes on GPUs, each with a stream of its own; each GPU has `cores` for decoding, and a largest batch."""

    def __init__(self, cores: int, batch_max: int) -> None:
        self._cores, self._batch_max = cores, batch_max
        self.coarse: list[Axis] = [self._hardware, self._lanes, self._batch, self._decode, _lead]
        self.fine: list[Axis] = []

    def _hardware(self, now: Setting) -> Iterator[Setting]:
        for share in (now.hardware_share - 0.15, now.hardware_share + 0.15):
            if 0 <= share <= 1:
                yield replace(now, hardware_share=round(share, 2))

    def _lanes(self, now: Setting) -> Iterator[Setting]:
        for lanes in _twice_and_half(now.lanes, min(GPU_LANES_MAX, self._cores)):
            yield replace(now, lanes=lanes, decode_threads=max(1, now.decode_threads * now.lanes // lanes))

    def _batch(self, now: Setting) -> Iterator[Setting]:
        for batch in _twice_and_half(now.batch or self._batch_max, self._batch_max):
            yield replace(now, batch=batch)

    def _decode(self, now: Setting) -> Iterator[Setting]:
        for threads in _twice_and_half(now.decode_threads, self._cores // now.lanes):
            yield replace(now, decode_threads=threads)


def _lead(now: Setting) -> Iterator[Setting]:
    for batches in _twice_and_half(now.lead_batches, LEAD_BATCHES_MAX):
        yield replace(now, lead_batches=batches)


def _twice_and_half(number: int, most: int) -> list[int]:
    return [other for other in (2 * number, number // 2) if 1 <= other <= most]
