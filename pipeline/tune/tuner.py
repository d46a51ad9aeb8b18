"""`python -m pipeline.tune`: finds how many lanes, threads and rows at a time are fastest on this host, and keeps it.

    sample of the user's pictures -> search (halving) by short runs of real lanes (trial) -> tuned.json

Three minutes at most. What is found belongs to one engine on one host; `pipeline.index` uses it and says so.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from engines import Choice, Device, EngineUnavailable
from engines.aoti import RUNS_PER_WORKER
from engines.hardware import host_id, physical_cores
from engines.plan import write_whole
from engines.spec import ArtifactMissing
from pipeline.batch import DeviceUnavailable
from pipeline.config import UsageError
from pipeline.devices import default_lanes, lane_specs, plan
from pipeline.exits import DONE, FAILED, USAGE
from pipeline.setting import (
    OTHERS_MAX,
    SCHEMA,
    Setting,
    Tuned,
    default_setting,
    lane_bytes,
    memory_limit_bytes,
    tuned_path,
)
from pipeline.sources import SourceError
from pipeline.tune.config import TuneConfig, parse_tune
from pipeline.tune.halving import CpuAxes, Found, GpuAxes, Measured, find
from pipeline.tune.trial import LIST_S, Rehearsal, sample

log = logging.getLogger("nightjar")

LIMIT_S = 170.0
WINDOW_S, WINDOW_BATCHES = 1.5, 3  # the shortest measurement, and what it must have seen
BESIDE_S = 25.0  # of the limit, for lanes on the GPUs and the CPU together to start and be measured. A guess


class TuneFailed(Exception):
    """Nothing could be measured; says why."""


FAILURES = (UsageError, SourceError, ArtifactMissing, DeviceUnavailable, EngineUnavailable, TuneFailed, OSError)


@dataclass(frozen=True)
class Tuning:
    """What a search needs to know of the host, the model and the pictures."""

    cfg: TuneConfig
    choice: Choice
    rehearsal: Rehearsal
    folder: Path
    start_s: float

    @property
    def kind(self) -> Device:
        return "cpu" if self.cfg.devices == ("cpu",) else "gpu"

    @property
    def window_s(self) -> float:
        """The shortest measurement that says something."""
        return max(WINDOW_S, WINDOW_BATCHES * self.choice.card.batch / max(self.choice.card.rows_per_s, 1e-3))

    def measure(self, setting: Setting, seconds: float, beside: tuple[str, ...] = ()) -> Measured:
        """The lanes of `setting`, and one more on each device of `beside`."""
        cfg = self.cfg
        need_bytes = setting.lanes * lane_bytes(self.choice.card, setting.batch) if self.kind == "cpu" else 0
        if need_bytes > cfg.max_memory_bytes:
            found = Measured(0.0, 0.0, need_bytes, f"not tried, it would need about {need_bytes / 1e9:.1f} GB")
        else:
            lanes = plan((*cfg.devices, *beside), cfg.wish, "tuned", trial=setting)
            found = self.rehearsal.measure(lane_specs(lanes, cfg.source, cfg.wish, self.folder / "logs"), seconds)
            if found.peak_bytes > cfg.max_memory_bytes:
                found = found._replace(problem=f"it takes {found.peak_bytes / 1e9:.2f} GB")
        told = found.problem or f"{found.rows_per_s:.1f} images/s, {found.peak_bytes / 1e9:.2f} GB"
        if not found.problem and not found.seconds:
            told = "cut, the time is over"
        words = " + ".join([setting.words(self.kind), *beside])
        log.info("%3.0f s  %s: %s", time.monotonic() - self.start_s, words, told)
        return found

    def default(self) -> Setting:
        lanes = default_lanes(self.cfg.devices, self.cfg.wish)
        return default_setting(self.kind, lanes, max(1, physical_cores() // (lanes * len(self.cfg.devices))))

    def axes(self) -> CpuAxes | GpuAxes:
        card = self.choice.card
        if self.kind == "gpu":
            return GpuAxes(max(1, physical_cores() // len(self.cfg.devices)), card.batch)
        by_thread = card.runtime == "aoti-cpu"

        def own_batch(setting: Setting) -> int:
            runs = setting.engine_threads // setting.team * RUNS_PER_WORKER
            return card.compiled_rows * runs if by_thread else card.batch

        return CpuAxes(physical_cores(), own_batch, teams=by_thread)


def tune(cfg: TuneConfig, limit_s: float = LIMIT_S) -> Tuned:
    """The best setting, written beside the engine's card.

    Raises:
        TuneFailed: no picture could be read, or not even the default setting could be measured.
    """
    start_s = time.monotonic()
    choice = cfg.wish.choice("cpu" if cfg.devices == ("cpu",) else "gpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("shards", "logs"):
            (folder / part).mkdir()
        if not (rows := sample(cfg.source)):
            raise TuneFailed(
                f"{cfg.source.root}: no picture that can be read was listed within {LIST_S:.0f} s, and tune measures "
                "with yours; --source and --root are those of pipeline.index"
            )
        log.info("%s pictures of %s; %s", len(rows), cfg.source.root, choice.reason)
        tuning = Tuning(cfg, choice, Rehearsal(rows, folder, start_s + limit_s), folder, start_s)
        found, beside_rows_per_s = _search(tuning, limit_s)
    best = found.trials[found.setting]
    if not best.rows_per_s:
        why = best.problem or f"the {limit_s:.0f} s were over before it had done {tuning.window_s:.0f} s of work"
        default = tuning.default().words(tuning.kind)
        raise TuneFailed(f"not even the default setting could be measured ({default}): {why}")
    tuned = Tuned(
        schema=SCHEMA, host=host_id(), cores=physical_cores(), memory_bytes=memory_limit_bytes(),
        max_memory_bytes=cfg.max_memory_bytes, weights_digest=choice.card.weights_digest,
        engine_digest=choice.card.file_digest, devices=cfg.devices, setting=found.setting,
        rows_per_s=round(found.rows_per_s, 2), default_rows_per_s=round(found.start_rows_per_s, 2),
        beside_cpu_rows_per_s=beside_rows_per_s, peak_bytes=best.peak_bytes,
        others=round(max(trial.others for trial in found.trials.values()), 3), date=time.strftime("%Y-%m-%d"),
        seconds=round(time.monotonic() - tuning.start_s, 1),
        pictures=f"{len(rows)} of {cfg.source.root}",
        trials=[trial.as_json() for trial in found.trials.values()],
    )  # fmt: skip
    write_whole(tuned_path(choice), tuned.to_json())
    if tuned.others > OTHERS_MAX:
        log.warning(
            "other processes took up to %.0f %% of the CPU during a measurement, so this is no more than a guess: "
            "run it again on a quiet host", 100 * tuned.others,
        )  # fmt: skip
    return tuned


def _search(tuning: Tuning, limit_s: float) -> tuple[Found, float | None]:
    """What was found, and the speed with a CPU lane beside the GPUs; None where that was not measured."""
    end_s, beside = tuning.start_s + limit_s, False
    if tuning.kind == "gpu":
        with suppress(EngineUnavailable):
            tuning.cfg.wish.choice("cpu")
            beside, end_s = True, end_s - BESIDE_S
    found = find(tuning.measure, tuning.window_s, tuning.default(), tuning.axes(), lambda: end_s - time.monotonic())
    if not beside:
        return found, None
    together = tuning.measure(found.setting, 2 * tuning.window_s, ("cpu",))
    return found, round(together.rows_per_s, 2) if together.seconds and not together.problem else None


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        cfg = parse_tune(argv)
        if cfg.json_only:
            logging.getLogger().setLevel(logging.WARNING)
        tuned = tune(cfg)
    except FAILURES as error:
        log.error("error: %s", error)
        code = FAILED if isinstance(error, TuneFailed | OSError) else USAGE
        print(json.dumps({"schema": SCHEMA, "error": str(error), "exit": code}), flush=True)
        return code
    summary = {name: value for name, value in asdict(tuned).items() if name != "trials"}
    print(json.dumps({**summary, "measured": len(tuned.trials), "exit": DONE}), flush=True)
    return DONE
