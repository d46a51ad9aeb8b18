"""The accuracy gate: an engine must give the stored fp32 Hugging Face vectors on the stored golden pixels or ids.

    measured = check(engine, artifact)      # raises GateFailed, which carries the numbers

Errors are counted relative to the spread of the golden set, because plain cosine hides them: with random weights two
different pictures already have cosine 0.99. Vectors are compared before they are rounded for storage: rounding alone is
.0004 to .0008, hundreds of times the error of an fp32 engine (2e-6 on B/32). The gate also moves every row to another
place, with other neighbours and padding, and counts rows whose stored bits change: an index must not depend on how the
work was cut.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from engines import Engine
from engines.spec import Artifact, Precision, Tower

# Mean error / spread. fp16 keeps 11 bits of mantissa, bf16 8; int8 quantises activations too.
SPREAD_ERROR_MAX: dict[Precision, float] = {"fp32": 0.001, "fp16": 0.01, "bf16": 0.06, "int8": 0.25}
# int8 moves vectors visibly; what counts then is that a query still finds the same nine.
OVERLAP_K, OVERLAP_MIN = 9, 0.95
GOLDEN_NAMES: dict[Tower, tuple[str, str]] = {
    "vision": ("pixels", "image_vectors"),
    "text": ("ids", "text_vectors"),
}


class ExactEngine(Engine, Protocol):
    """An engine that can also show its vectors before they are rounded for storage."""

    def result_fp32(self, slot: int) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True)
class Parity:
    rows: int
    error_over_spread: float
    error_allowed: float
    top9_overlap: float  # -1 where it is not asked for
    moved_rows_changed: int  # rows whose stored bits (on a GPU: vectors, by more than the bar) depend on their place

    @property
    def failures(self) -> list[str]:
        found = []
        if not self.error_over_spread <= self.error_allowed:  # this way round, so that NaN fails
            found.append(f"error/spread {self.error_over_spread:.5f}, allowed {self.error_allowed}")
        if 0 <= self.top9_overlap < OVERLAP_MIN:
            found.append(f"top-{OVERLAP_K} overlap {self.top9_overlap:.3f}, needed {OVERLAP_MIN}")
        if self.moved_rows_changed:
            found.append(f"{self.moved_rows_changed} of {self.rows} vectors change with their place in the batch")
        return found

    def as_numbers(self) -> dict[str, float]:
        return {name: float(value) for name, value in asdict(self).items()}


class GateFailed(Exception):
    def __init__(self, engine: str, parity: Parity) -> None:
        super().__init__(f"{engine} missed its accuracy bar: {'; '.join(parity.failures)}")
        self.parity = parity


def check(engine: ExactEngine, artifact: Artifact) -> Parity:
    """Measure `engine` on the golden set of `artifact`; raise `GateFailed` where it misses its bar."""
    parity = measure(engine, *golden(artifact, engine.card.tower))
    if parity.failures:
        card = engine.card
        raise GateFailed(f"{card.tower} {card.runtime} {card.precision}", parity)
    return parity


def golden(artifact: Artifact, tower: Tower) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """(inputs as the tower takes them, the vectors Hugging Face gave for them in fp32)."""
    inputs_name, vectors_name = GOLDEN_NAMES[tower]
    with np.load(artifact.golden_npz) as stored:
        return stored[inputs_name], stored[vectors_name]


def measure(engine: ExactEngine, inputs: npt.NDArray[Any], want_nd: npt.NDArray[np.float32]) -> Parity:
    precision, rows = engine.card.precision, len(inputs)
    # Forwards, then backwards, ending in a short batch: rows meet other places, other neighbours and padding.
    turn = np.arange(max(rows, engine.card.batch) + 1) % rows
    order = np.concatenate([turn, turn[::-1]])
    exact_nd, stored_nd = encode(engine, inputs[order])
    got_nd = exact_nd[:rows]
    if isinstance(engine.input(0), np.ndarray):
        changed = (stored_nd.view(np.uint16) != stored_nd[order].view(np.uint16)).any(axis=1)
    else:  # a GPU's matrix products may add in another order at another place; a row that leans on others is far off
        changed = row_distances(exact_nd[order], exact_nd, want_nd) > SPREAD_ERROR_MAX[precision]
    return Parity(
        rows=rows,
        error_over_spread=spread_error(got_nd, want_nd),
        error_allowed=SPREAD_ERROR_MAX[precision],
        top9_overlap=top_overlap(got_nd, want_nd) if precision == "int8" else -1.0,
        moved_rows_changed=len(set(order[changed])),
    )


def encode(engine: ExactEngine, inputs: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float16]]:
    """Vectors of all `inputs`, exact and as stored, in full batches and a short last one, over rotating slots."""
    exact, stored = [], []
    for turn, start in enumerate(range(0, len(inputs), engine.card.batch)):
        rows, slot = inputs[start : start + engine.card.batch], turn % engine.slots
        fill(engine, slot, rows)
        engine.launch(slot, len(rows))
        exact.append(engine.result_fp32(slot))
        stored.append(engine.result(slot))
    return np.concatenate(exact), np.concatenate(stored)


def fill(engine: Engine, slot: int, rows: npt.NDArray[Any]) -> None:
    """Copy `rows` from the host into the first rows of `slot`, wherever that lies, and wait until they are there."""
    target = engine.input(slot)
    if isinstance(target, np.ndarray):
        target[: len(rows)] = rows
    else:
        target.rows(len(rows)).fill(rows, cast(Any, engine).stream)


def spread_error(got_nd: npt.NDArray[Any], want_nd: npt.NDArray[Any]) -> float:
    """Mean distance between got and wanted rows, in units of the mean distance of the wanted rows from their centre."""
    if got_nd.shape != want_nd.shape or len(want_nd) < 2:
        raise ValueError(f"golden set: need two equal (n >= 2, d) sets, got {got_nd.shape}, wanted {want_nd.shape}")
    return float(row_distances(got_nd, want_nd, want_nd).mean())


def row_distances(
    got_nd: npt.NDArray[Any], want_nd: npt.NDArray[Any], golden_nd: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """(n,) distance between got and wanted rows, in units of the mean distance of the golden rows from their centre."""
    distances: npt.NDArray[np.float64] = np.linalg.norm(got_nd.astype(np.float64) - want_nd, axis=1)
    return distances / spread(golden_nd)


def spread(golden_nd: npt.NDArray[Any]) -> float:
    """Mean distance of the rows from their centre: the unit of every error."""
    golden = golden_nd.astype(np.float64)
    found = float(np.linalg.norm(golden - golden.mean(axis=0), axis=1).mean())
    if not found > 0:
        raise ValueError(f"golden set: the wanted vectors have a spread of {found}, so nothing can be told apart")
    return found


def top_overlap(got_nd: npt.NDArray[np.float32], want_nd: npt.NDArray[np.float32]) -> float:
    """Share of the true nearest nine of every golden row that are still found among the engine's vectors."""
    if len(want_nd) < 2 * OVERLAP_K:
        words = f"top-{OVERLAP_K} overlap needs at least {2 * OVERLAP_K} rows, there are {len(want_nd)}"
        raise ValueError(f"golden set: {words}")

    def nearest(candidates_nd: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
        scores = want_nd @ candidates_nd.T
        np.fill_diagonal(scores, -np.inf)  # a row finds itself in any case
        return np.argpartition(-scores, OVERLAP_K, axis=1)[:, :OVERLAP_K]

    pairs = zip(nearest(got_nd), nearest(want_nd), strict=True)
    return float(np.mean([len(np.intersect1d(got, want)) / OVERLAP_K for got, want in pairs]))
