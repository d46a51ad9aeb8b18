"""How lanes are made on this host: a `Setting`, by default or as `python -m pipeline.tune` found it.

What was found lies beside the engine it was found for, `engines/<tower>-<runtime>-<precision>-<host>/tuned.json`, with
every measurement. It is for one engine, one host and one memory limit; anything else is refused, with the reason.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from engines import Choice, Device
from engines.hardware import cgroup_files, host_id, physical_cores
from engines.spec import EngineCard

SCHEMA = 1
FILE = "tuned.json"
# Batches read ahead. The coordinator answers no claim while it commits, 50 ms for 16,384 rows on a quiet disk; on a GPU
# that embeds 15,000 images/s, 8 of 256 pictures last .14 s.
LEAD_BATCHES = {"cpu": 2, "gpu": 8}
HARDWARE_SHARE = 0.65  # see pipeline.decode_gpu; NVIDIA's DALI uses this value
OTHERS_MAX = 0.1  # of the CPU time: a search beside more than that found a good setting by luck
MEMORY_TOLERANCE = 0.05  # the same virtual machine reports a little more or less after each start
CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of cgroup v2, v1
# Of one lane in RAM: weights as mapped and as the engine holds them, its input buffers, and all the rest.
WEIGHT_COPIES, INPUT_BUFFERS, REST_BYTES = 2, 3, 200 << 20


@dataclass(frozen=True)
class Setting:
    """Numbers are of one lane, except `lanes`."""

    lanes: int  # on each device, each with an engine of its own
    engine_threads: int  # that run the model, on a CPU
    decode_threads: int
    lead_batches: int  # read ahead and waiting to be decoded
    team: int = 1  # of the engine threads, so many work on one run together; only aoti-cpu can tell them apart
    batch: int | None = None  # rows; None for what suits the engine and its threads
    hardware_share: float = HARDWARE_SHARE  # of a GPU's JPEGs, decoded by its hardware engine

    def words(self, kind: Device) -> str:
        lanes = f"{self.lanes} lane{'s' * (self.lanes > 1)} on each" if kind == "gpu" else f"{self.lanes} x"
        engine = "" if kind == "gpu" else f"{self.engine_threads} engine threads (teams of {self.team}), "
        share = f", {100 * self.hardware_share:.0f} % to the hardware decoder" if kind == "gpu" else ""
        batch = f"batches of {self.batch}" if self.batch else "the engine's own batch"
        return f"{lanes} {engine}{self.decode_threads} decode threads, {batch}, {self.lead_batches} read ahead{share}"


def default_setting(kind: Device, lanes: int, cores: int) -> Setting:
    """For a lane that has `cores` of the host's cores: as many threads of either kind.

    Decoding and encoding take turns on them (`engines.turns`), whichever has work: how long a picture takes to decode
    is only known when the user's own have been seen, and a thread that waits costs nothing.
    """
    return Setting(lanes, engine_threads=cores, decode_threads=cores, lead_batches=LEAD_BATCHES[kind])


def lane_bytes(card: EngineCard, batch: int | None) -> int:
    """About what one CPU lane takes. B/32 on 2 cores: .97 GB with fp32, .45 with int8."""
    values = 1
    for edge in card.row_shape:
        values *= edge
    return WEIGHT_COPIES * card.bytes + INPUT_BUFFERS * (batch or card.batch) * values * 4 + REST_BYTES


def memory_limit_bytes() -> int:
    """Of this host, or of the container or unit this process is in."""
    limits = [path.read_text().strip() for name in CGROUP_LIMITS for path in cgroup_files(name)]
    return min([psutil.virtual_memory().total, *(int(limit) for limit in limits if limit.isdigit())])


@dataclass(frozen=True)
class Tuned:
    """The best setting that was found for one engine, and what it was found from."""

    schema: int
    host: str
    cores: int
    memory_bytes: int  # what the host had
    max_memory_bytes: int  # what the lanes together were allowed
    weights_digest: str
    engine_digest: str
    devices: tuple[str, ...]  # each of them once
    setting: Setting
    rows_per_s: float
    default_rows_per_s: float  # of the default setting, in the same search
    beside_cpu_rows_per_s: float | None  # GPUs with this setting, and a CPU lane beside them; None: not measured
    peak_bytes: int  # of all lanes together
    others: float  # share of the host's CPU time that other processes took during the worst measurement
    date: str
    seconds: float
    pictures: str  # what it was measured on
    trials: list[dict[str, Any]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Tuned:
        raw: dict[str, Any] = json.loads(text)
        return cls(setting=Setting(**raw.pop("setting")), devices=tuple(raw.pop("devices")), **raw)

    def refusal(self, card: EngineCard, devices: tuple[str, ...]) -> str:
        """Why it is not for this engine on this host; empty where it is."""
        here = {
            "schema": SCHEMA, "host": host_id(), "cores": physical_cores(), "weights_digest": card.weights_digest,
            "engine_digest": card.file_digest, "devices": devices,
        }  # fmt: skip
        for name, value in here.items():
            if (then := getattr(self, name)) != value:
                return f"{name.replace('_', ' ')} was {_short(then)}, is {_short(value)}"
        if abs((now := memory_limit_bytes()) - self.memory_bytes) > MEMORY_TOLERANCE * self.memory_bytes:
            return f"memory was {self.memory_bytes / 1e9:.1f} GB, is {now / 1e9:.1f} GB"
        return ""


def tuned_path(choice: Choice) -> Path:
    return choice.path.parent / FILE


def tuned_for(choice: Choice, devices: tuple[str, ...]) -> tuple[Tuned | None, str]:
    """What was found for the engine on these devices, or why there is nothing to go by."""
    path = tuned_path(choice)
    try:
        tuned = Tuned.from_json(path.read_text())
    except FileNotFoundError:
        return None, "never tuned here (python -m pipeline.tune)"
    except (ValueError, TypeError, KeyError) as error:
        return None, f"{path} is none of this version ({error}): run python -m pipeline.tune again"
    if why := tuned.refusal(choice.card, devices):
        return None, f"{path} does not hold any more: {why}; run python -m pipeline.tune again"
    words = f"tuned {tuned.date} on {tuned.pictures}: {tuned.rows_per_s:.1f} images/s, {tuned.default_rows_per_s:.1f}"
    words += " by default"
    if tuned.others > OTHERS_MAX:
        words += f", beside others that took up to {100 * tuned.others:.0f} % of the CPU"
    return tuned, words


def _short(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)[:40]
