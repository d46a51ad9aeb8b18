"""The search for the best setting, without a lane or a clock of its own: who is measured next, and for how long.

From where it stands it looks one step along each axis, and lets those neighbours race by successive halving: all are
measured briefly, the faster half for twice as long, and so on. It goes on from the winner until no step helps or the
time is over. A measurement is kept: the same setting is measured again only to know it better. In the end the winner
has to beat the setting that the search started from once more, both measured anew, in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

from pipeline.setting import Setting

CLEAR = 1.1  # ahead by a tenth: longer measurements would not change that
WORTH = 1.03  # times the start: by less, two measurements of one setting differ too
FINAL_TURNS = 4
LEAD_BATCHES_MAX = 8
GPU_LANES_MAX = 4  # on one GPU: each has weights and buffers of its own there
BATCH_FACTOR_MAX = 4  # of the engine's own batch; larger ones take memory and were never seen to pay


class Measured(NamedTuple):
    rows_per_s: float  # of all lanes together
    seconds: float  # 0: nothing was seen
    peak_bytes: int  # of all lanes together
    problem: str = ""  # why it cannot be had; then nothing else counts
    others: float = 0.0  # share of the host's CPU time that other processes took meanwhile


@dataclass
class Trial:
    """All measurements of one setting."""

    setting: Setting
    each: list[Measured] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.each)

    @property
    def problem(self) -> str:
        return self.each[-1].problem if self.each else ""

    @property
    def rows_per_s(self) -> float:
        if self.problem or not self.seconds:
            return 0.0
        return sum(one.rows_per_s * one.seconds for one in self.each) / self.seconds

    @property
    def peak_bytes(self) -> int:
        return max((one.peak_bytes for one in self.each), default=0)

    @property
    def others(self) -> float:
        """The largest share that other processes took."""
        return max((one.others for one in self.each), default=0.0)

    def as_json(self) -> dict[str, Any]:
        each = [one._replace(rows_per_s=round(one.rows_per_s, 2), others=round(one.others, 3)) for one in self.each]
        return {
            "setting": asdict(self.setting),
            "rows_per_s": round(self.rows_per_s, 2),
            "each": [one._asdict() for one in each],
        }


Measure: TypeAlias = Callable[[Setting, float], Measured]  # a setting, for about so many seconds
Axis: TypeAlias = Callable[[Setting], Iterator[Setting]]  # the neighbours of a setting


class Found(NamedTuple):
    """The winner and the setting that the search started from, as they were measured against each other."""

    setting: Setting
    rows_per_s: float
    start_rows_per_s: float
    trials: dict[Setting, Trial]


def find(
    measure: Measure, window_s: float, start: Setting, axes: CpuAxes | GpuAxes, left_s: Callable[[], float]
) -> Found:
    """The fastest setting found in the time that `left_s` tells; `start`, unless another one is worth leaving it."""
    search = Search(measure, window_s, left_s)
    return search.final(search.best(search.best(start, axes.coarse), axes.fine), start)


class Search:
    """`window_s` is the shortest measurement that says something; `left_s` tells how long there is still to search."""

    def __init__(self, measure: Measure, window_s: float, left_s: Callable[[], float]) -> None:
        self.trials: dict[Setting, Trial] = {}
        self._measure, self._window_s, self._left_s = measure, window_s, left_s
        self._start_s = 0.0  # of lanes, at most, before they can be measured

    def best(self, start: Setting, axes: Sequence[Axis]) -> Setting:
        """The fastest found; `start` is always among those that were measured."""
        best, still = start, 0  # axes in a row that led nowhere
        while still < len(axes) and not self._over():
            for axis in axes:
                still += 1
                while (winner := self.race([best, *axis(best)], self._window_s)) != best:
                    best, still = winner, 0
        return best

    def final(self, best: Setting, start: Setting) -> Found:
        """`best`, if it is still worth leaving `start` for when both are measured anew: start, best, best, start.

        So neither a lucky moment counts nor that the host was slower, or faster, when `start` had its first turn.
        """
        anew = {setting: Trial(setting) for setting in (start, best)}
        self.trials.setdefault(start, Trial(start))  # there may have been no time at all
        for pair in [(start, best), (best, start)] if best != start else [(start,)]:
            if self._left_s() > 0:
                for setting in pair:
                    anew[setting].each.append(self._look(setting, self._window_s))
        seen = anew if all(trial.seconds for trial in anew.values()) else self.trials
        by_start, by_best = seen[start].rows_per_s, seen[best].rows_per_s
        if by_best > WORTH * by_start:
            return Found(best, by_best, by_start, self.trials)
        return Found(start, by_start, by_start, self.trials)

    def race(self, field: Sequence[Setting], window_s: float) -> Setting:
        """The fastest of `field`, by measurements that last longer the fewer are left, until one is clearly ahead."""
        while True:
            for setting in field:
                trial = self.trials.setdefault(setting, Trial(setting))
                if trial.seconds < window_s and not trial.problem and not self._over():
                    self._look(setting, window_s - trial.seconds)
            by_speed = sorted(field, key=lambda setting: -self.trials[setting].rows_per_s)
            rates = [self.trials[setting].rows_per_s for setting in by_speed]
            if len(field) == 1 or rates[0] > CLEAR * rates[1] or self._over():
                return by_speed[0]
            field, window_s = by_speed[: len(field) - len(field) // 2], 2 * window_s

    def _look(self, setting: Setting, seconds: float) -> Measured:
        before_s = self._left_s()
        found = self._measure(setting, seconds)
        self.trials.setdefault(setting, Trial(setting)).each.append(found)
        if not found.problem:
            self._start_s = max(self._start_s, before_s - self._left_s() - found.seconds)
        return found

    def _over(self) -> bool:
        """What is left is for the final, and for a measurement that takes longer than thought."""
        return self._left_s() < (FINAL_TURNS + 1) * (self._start_s + self._window_s)


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
