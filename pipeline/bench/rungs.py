"""The rungs of the ladder: named configurations, each one change away from an earlier one.

The first ones are Hugging Face's, as a published study climbed them (`docs/benchmarks/seed.py` runs them); the last are
ours, `python -m pipeline.index`. What this host cannot run is in the table too, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from engines import RUNTIMES, device_of
from engines.hardware import has_bf16, has_int8, host_id
from engines.memory_gpu import gpus
from engines.spec import Artifact, Precision
from pipeline.bench.published import BATCHES, SEED_THREADS
from pipeline.devices import gpu_trouble

BATCH = 32
RATE_GUESS, TIMES_MAX = 15, 400  # images/s of what gets `images`; faster ones get more, for similar times
BATCHES_MIN = 8  # of an index: nothing overlaps the first one, and the last waits of a lane are never told
FEW_CORES = 4  # up to here producers and threads share the cores; beyond, each has its own, as in the study
PRODUCERS = (3, 1, 5, 10)  # the study's best first
GPU_REPLICAS = (1, 2, 4)
COMPILED: tuple[Precision, ...] = ("fp32", "bf16", "int8")
BY_BITS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class Rung:
    """`config` is what the runner takes: of seed.py, or the options of `pipeline.index`."""

    name: str
    change: str
    figure: str  # of the published study that it belongs to
    images: int
    runner: str = "seed"  # or "index"
    config: dict[str, Any] = field(default_factory=dict)
    precision: Precision = "fp32"
    device: str = "cpu"
    core: bool = False  # one of the ladder proper: repeated in every round
    absent: str = ""  # why it cannot be run here


def rungs(artifact: Artifact, cores: int, images: int) -> list[Rung]:
    """In the order in which they are measured: when time runs out, the last ones are missing.

    `images` is what a core rung at 15 images/s gets; faster ones get more.
    """
    base: dict[str, Any] = {"batch": 1, "threads": cores}
    one = Rung("hf one by one", "the start", "5", images, config=base, core=True)
    batched = replace(one, name=f"hf batches of {BATCH}", change=f"batches of {BATCH}", config={**base, "batch": BATCH})
    batched = replace(batched, figure="6", images=_whole(images, BATCH))
    producers, threads = producers_and_threads(cores)[0]
    parallel = replace(
        batched, name=f"hf {producers} producers", change=f"{producers} processes decode and preprocess", figure="7",
        config={**batched.config, "producers": producers, "threads": threads},
    )  # fmt: skip
    shared = [_shared(parallel, policy, cores) for policy in ("static", "dynamic")]
    each = max(1, cores // 2)
    replicas = replace(
        parallel, name="hf 2 replicas", change="two models share the cores", figure="9",
        config={**parallel.config, "devices": ["cpu", "cpu"], "threads": each},
    )  # fmt: skip
    ours = replace(
        replicas, name="hf + our preprocessing", change="our decode and resize", figure="10",
        config={**replicas.config, "preprocess": "ours"},
    )  # fmt: skip
    core = [one, batched, parallel, *shared, replicas, ours, *_indexes(artifact, images)]
    steps = [*_threads(batched), *_grid(parallel, cores), *_more_replicas(parallel, cores), *_sweep(one, images)]
    on_gpu = [_on_gpu(one), _on_gpu(batched), *_gpu_replicas(parallel), *_sweep(_on_gpu(one), images)]
    return [*core, *_our_sharing(artifact, cores, images), *steps, *on_gpu]


def _shared(parallel: Rung, policy: str, cores: int) -> Rung:
    config = {**parallel.config, "devices": ["cuda:0", "cpu"], "sharing": policy}
    change = "a CPU and a GPU model, split by speed" if policy == "static" else "one queue for both"
    return replace(
        parallel, name=f"hf {policy} cpu+gpu", change=change, figure="8", config=config, device="cpu+gpu",
        absent=gpu_trouble(),
    )  # fmt: skip


def _on_gpu(rung: Rung, models: int = 1) -> Rung:
    """The same rung of Hugging Face's with its models on a GPU."""
    return replace(
        rung, name=f"{rung.name}, gpu", change="on a GPU", config={**rung.config, "devices": ["cuda:0"] * models},
        device="gpu", core=False, absent=gpu_trouble(),
    )  # fmt: skip


def _gpu_replicas(parallel: Rung) -> Iterator[Rung]:
    for count in GPU_REPLICAS:
        named = replace(parallel, name=f"hf {count} replica{'s' * (count > 1)}", figure="9")
        yield replace(_on_gpu(named, count), change=f"{count} on a GPU")


def _indexes(artifact: Artifact, images: int) -> Iterator[Rung]:
    """`pipeline.index` with every engine of this host, and what is missing of fp32, bf16, int8 and a GPU."""
    here = [host_id(), *(gpu.identity for gpu in gpus())]
    cards = [card for _, card in artifact.cards() if card.tower == "vision" and card.host in here and card.verified]
    cards.sort(key=lambda card: (list(RUNTIMES).index(card.runtime), BY_BITS.index(card.precision)))
    for before, card in zip([None, *cards], cards, strict=False):
        device = device_of(card.runtime)
        config = {"--runtime": card.runtime, "--precision": card.precision, "--devices": device.replace("gpu", "gpu:0")}
        # Whole batches, as the others get: a padded one at the end would weigh more here than in a night.
        count = max(round(images * min(card.rows_per_s / RATE_GUESS, TIMES_MAX)), images, BATCHES_MIN * card.batch)
        name, change = f"nightjar {card.runtime} {card.precision}", f"our pipeline, {card.runtime} {card.precision}"
        if before:
            pairs = ((card.runtime, before.runtime), (card.precision, before.precision))
            change = ", ".join(f"{now} instead of {then}" for now, then in pairs if now != then)
        yield Rung(name, change, "10", _whole(count, card.batch), "index", config, card.precision, device, core=True)
    missing = {
        "bf16": "" if has_bf16() else "this CPU does not multiply bf16",
        "int8": "" if has_int8() else "this CPU has neither VNNI nor AMX",
    }
    for precision in COMPILED:
        if not any(card.precision == precision and device_of(card.runtime) == "cpu" for card in cards):
            reason = missing.get(precision) or f"not built: make engines PRECISION={precision}"
            yield Rung(f"nightjar compiled {precision}", "", "10", 0, "index", precision=precision, absent=reason)
    if not any(device_of(card.runtime) == "gpu" for card in cards):
        reason = gpu_trouble() or "not built: make engines LANE=gpu-cu13"
        yield Rung("nightjar gpu", "", "10", 0, "index", precision="fp16", device="gpu", absent=reason)


def _our_sharing(artifact: Artifact, cores: int, images: int) -> Iterator[Rung]:
    """Ours with the CPU's own engine in two lanes, and beside a GPU with either policy. Not of the ladder proper."""
    cards = [card for _, card in artifact.cards() if card.tower == "vision" and card.host == host_id()]
    if not cards:
        return
    card = max(cards, key=lambda card: card.rows_per_s * (card.precision != "int8"))
    count = _whole(max(round(images * card.rows_per_s / RATE_GUESS), BATCHES_MIN * card.batch), 2 * card.batch)
    lanes = Rung(
        "nightjar 2 lanes", f"{card.runtime} {card.precision} in two lanes", "9", count, "index",
        {"--runtime": card.runtime, "--precision": card.precision, "--devices": "cpu,cpu"}, card.precision,
        absent="" if cores > 1 else "one core",
    )  # fmt: skip
    yield lanes
    for policy in ("static", "dynamic"):
        yield Rung(
            f"nightjar {policy} cpu+gpu", "a CPU lane beside a GPU lane", "8", TIMES_MAX * images, "index",
            {"--devices": "gpu:0,cpu", "--sharing": policy}, max("fp16", card.precision, key=BY_BITS.index), "cpu+gpu",
            absent=gpu_trouble(),
        )  # fmt: skip


def _threads(batched: Rung) -> Iterator[Rung]:
    for threads in SEED_THREADS:
        config = {**batched.config, "threads": threads}
        yield replace(
            batched, name=f"hf {threads} threads", change=f"{threads} threads", figure="4", config=config, core=False
        )


def _grid(parallel: Rung, cores: int) -> Iterator[Rung]:
    for producers, threads in producers_and_threads(cores)[1:]:  # the first is a rung of the ladder
        config = {**parallel.config, "producers": producers, "threads": threads}
        name = f"hf {producers} producers x {threads} threads"
        yield replace(parallel, name=name, change=name[3:], config=config, core=False)


def producers_and_threads(cores: int) -> list[tuple[int, int]]:
    """What the ladder tries, the one it climbs on first."""
    if cores > FEW_CORES:
        return [(producers, cores - producers) for producers in PRODUCERS if producers < cores]
    halves = sorted({max(1, cores // 2), cores})
    pairs = [(producers, threads) for producers in (1, cores, cores + 1) for threads in halves]
    return list(dict.fromkeys([(cores, cores), *pairs]))


def _more_replicas(parallel: Rung, cores: int) -> Iterator[Rung]:
    for count in (1, 3, 4):
        config = {"devices": ["cpu"] * count, "threads": max(1, cores // count)}
        name = f"hf {count} replica{'s' * (count > 1)}"
        yield replace(
            parallel, name=name, change=name[3:], figure="9", config={**parallel.config, **config}, core=False
        )


def _sweep(one: Rung, images: int) -> Iterator[Rung]:
    for batch in BATCHES:
        if batch not in (1, BATCH):
            name, config = f"hf batches of {batch}{', gpu' * (one.device == 'gpu')}", {**one.config, "batch": batch}
            yield replace(
                one, name=name, change=f"batches of {batch}", figure="6", config=config, images=_whole(images, batch),
                core=False,
            )  # fmt: skip


def _whole(images: int, batch: int) -> int:
    return batch * -(-images // batch)
