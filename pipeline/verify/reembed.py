"""Pictures embedded again and compared with the vectors that are stored for them.

The road is that of a run: the source reads, the stages of a lane decode and resize, an engine gives vectors. A row that
this very engine made on a CPU, in a run with the libraries that are here now, must come out with the same bits. All
others are judged by the parity contract across devices (docs/design.md, section 6): error in units of the spread of the
golden vectors, for which every engine of the artifact has passed its own bar.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engines import Engine
from engines.gate import SPREAD_ERROR_MAX, golden, spread
from engines.spec import EngineCard, Precision
from pipeline.batch import BadImage, Batch, DeviceUnavailable
from pipeline.devices import Devices, EngineWish, lane_specs, open_lane_engine, open_stages
from pipeline.lanes import ENGINE_SLOTS_MAX, Board, see_only
from pipeline.progress import LinePace
from pipeline.run_record import versions
from pipeline.run_reports import read_report
from pipeline.store import content_hash
from pipeline.store.check import open_readonly
from pipeline.store.shards import ShardInfo
from pipeline.verify.sample import Drawn, Row, Sources, Space, read_files, read_rows, read_vectors

log = logging.getLogger("nightjar")

STORED_ERROR = 0.01  # float16 keeps 11 bits: in units of the spread of a set of similar vectors, up to this
# The bar of an engine is on the mean; no golden row is three times the mean away, and a vector of another picture is
# about 1.4 spreads away.
ROW_FACTOR = 3.0
READ_THREADS = 8
GROUP_ROWS = 4096  # whose keys, places and vectors are held at once
DECODERS = ("nightjar", "numpy", "pillow", "pillow-heif", "simplejpeg")  # packages that make pixels of bytes


@dataclass(frozen=True, slots=True)
class Off:
    """A row that is not what its picture gives."""

    where: str  # data file and row
    key: str
    content_hash: bytes
    words: str


@dataclass(slots=True)
class Comparison:
    """What became of the rows: rows = compared + changed + unreadable. Errors are in spreads."""

    rows: int
    away: int  # pictures of sources that are not there: none of the rows is of them
    there: int  # all others, of which the rows were drawn
    engine: str = ""
    error_allowed: float = 0.0  # of the mean
    row_error_allowed: float = 0.0
    compared: int = 0
    same_bits: int = 0
    bits_due: int = 0  # of those compared: made by this engine with these libraries, so the bits must be the same
    changed: int = 0  # the file holds other bytes now: the next run embeds them
    unreadable: int = 0
    error: float = 0.0  # mean of the compared rows that are not off
    off: list[Off] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of all the pictures, the part that those compared speak for."""
        return self.compared / max(1, self.rows) * self.there / max(1, self.there + self.away)


@dataclass(slots=True)
class _Group:
    """Some pictures and what is stored for them."""

    rows: list[Row]
    stored_nd: npt.NDArray[np.float16]
    bits_due: npt.NDArray[np.bool_]  # (n,) whether a row must come out with the same bits


def compare_on(
    devices: Devices, wish: EngineWish, index: Path, space: Space, drawn: Drawn, sources: Sources
) -> Comparison:
    """Embed what was drawn again, on the first of `devices`.

    Raises:
        EngineUnavailable, DeviceUnavailable: no such engine here.
    """
    device = devices.names[0]
    log.info("embedded again on %s: %s", device, devices.reason)
    if device == "cpu":
        return compare(devices, wish, index, space, drawn, sources)
    # One process sees one GPU, and this one has counted them all.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, see_only, (device,)) as pool:
        try:
            return pool.submit(compare, devices, wish, index, space, drawn, sources).result()
        except BrokenProcessPool:
            raise DeviceUnavailable(
                f"{device} took the process down that embedded pictures again; try --devices cpu, and make gpu-check"
            ) from None


def compare(
    devices: Devices, wish: EngineWish, index: Path, space: Space, drawn: Drawn, sources: Sources
) -> Comparison:
    """As `compare_on`, in this process."""
    artifact = wish.artifact
    with closing(open_readonly(index)) as db, ThreadPoolExecutor(READ_THREADS) as pool:
        spec = lane_specs(devices, next(iter(sources.values())), wish, Path(os.devnull))[0]
        engine, board = open_lane_engine(spec), Board(spec.decode_threads + ENGINE_SLOTS_MAX)
        stages = open_stages(spec, board, engine)
        made_by: list[Precision] = [card.precision for _, card in artifact.cards() if card.tower == "vision"]
        # Another host may have made a row with an engine that was not built here; none but int8 is less exact than bf16
        allowed = max(SPREAD_ERROR_MAX[p] for p in [*made_by, "bf16"]) + SPREAD_ERROR_MAX[engine.card.precision]
        allowed += STORED_ERROR
        found = Comparison(
            len(drawn.ids), drawn.away, drawn.there, f"{engine.card.runtime} {engine.card.precision}", allowed,
            ROW_FACTOR * allowed,
        )  # fmt: skip
        unit, errors, pace = spread(golden(artifact, "vision")[1]), 0.0, LinePace()
        files = read_files(db, space)
        same = _same_engine(index, files, engine.card) if spec.kind == "cpu" else set()
        for first in range(0, found.rows, GROUP_ROWS):
            rows = read_rows(db, space, drawn.ids[first : first + GROUP_ROWS])
            group = _Group(rows, read_vectors(index, files, rows), np.array([row.file in same for row in rows]))
            batches = _batches(group, sources, engine.card.batch, pool, found)
            for batch in _embed(engine, stages, batches):
                errors += _judge(group, batch, unit, found)
                if pace.due():
                    done = first + int(batch.ids.max()) + 1
                    log.info("embedded again: %s of %s rows", f"{done:,}", f"{found.rows:,}")
        stages.close()
    found.error = errors / max(1, found.compared - len(found.off))
    return found


def _same_engine(index: Path, files: dict[str, ShardInfo], card: EngineCard) -> set[str]:
    """Data files whose vectors this engine made with the libraries that are here now.

    Decoders are in no card, and a new release may decode to other levels; the record of a run says what it had. A
    segment holds vectors of many runs, so nothing is known of it.
    """
    now = {package: version for package, version in versions().items() if package in DECODERS}
    run_of = {
        name: int(name.removeprefix("shards/").partition("-")[0])
        for name, info in files.items()
        if info.engine == card.identity and name.startswith("shards/")
    }
    same = set()
    for run in set(run_of.values()):
        then = (read_report(index, run) or {}).get("versions", {})
        if {package: version for package, version in then.items() if package in DECODERS} == now:
            same.add(run)
    return {name for name, run in run_of.items() if run in same}


def _batches(
    group: _Group, sources: Sources, size: int, pool: ThreadPoolExecutor, found: Comparison
) -> Iterator[Batch]:
    """Full batches of the pictures that still have their bytes; their ids are places in the group."""

    def read(row: Row) -> bytes | None:
        try:
            return sources[row.scope].read(row.locator, row.size_bytes)
        except BadImage:
            return None

    fresh: list[tuple[int, bytes]] = []
    for first in range(0, len(group.rows), size):
        for at, encoded in enumerate(pool.map(read, group.rows[first : first + size]), first):
            if encoded is None:
                found.unreadable += 1
            elif content_hash(encoded) != group.rows[at].content_hash:
                found.changed += 1
            else:
                fresh.append((at, encoded))
        while len(fresh) >= size:
            yield _batch(fresh[:size])
            del fresh[:size]
    if fresh:
        yield _batch(fresh)


def _batch(fresh: list[tuple[int, bytes]]) -> Batch:
    return Batch(ids=np.array([at for at, _ in fresh], np.int64), encoded=[encoded for _, encoded in fresh])


def _embed(engine: Engine, stages: object, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The next batch is read and decoded while the engine has one."""
    assert callable(stages)
    running: deque[Batch] = deque()
    for turn, batch in enumerate(batches):
        batch.slot = turn % engine.slots
        batch = stages(batch, engine.input(batch.slot))
        engine.launch(batch.slot, len(batch.ids))
        running.append(batch)
        if len(running) == min(2, engine.slots):
            yield _settle(engine, running.popleft())
    while running:
        yield _settle(engine, running.popleft())


def _settle(engine: Engine, batch: Batch) -> Batch:
    batch.emb_nd = engine.result(batch.slot)
    return batch


def _judge(group: _Group, batch: Batch, unit: float, found: Comparison) -> float:
    """Adds a batch to what was found; the sum of its errors, without the rows that are off."""
    assert batch.emb_nd is not None
    got, stored = batch.emb_nd, group.stored_nd[batch.ids]
    found.compared += len(got)
    same_bits, bits_due = (got.view(np.uint16) == stored.view(np.uint16)).all(axis=1), group.bits_due[batch.ids]
    found.same_bits += int(np.count_nonzero(same_bits))
    found.bits_due += int(np.count_nonzero(bits_due))
    errors = np.linalg.norm(got.astype(np.float32) - stored.astype(np.float32), axis=1) / unit
    total = 0.0
    for place, at in enumerate(batch.ids.tolist()):
        if place in batch.failed:
            words = f"does not decode any more: {batch.failed[place].reason}, {batch.failed[place].words}"
        elif not errors[place] <= found.row_error_allowed:  # this way round, so that NaN is off
            words = f"error/spread {errors[place]:.3f}"
        elif bits_due[place] and not same_bits[place]:
            words = f"other bits of the same engine, {found.engine}: error/spread {errors[place]:.5f}"
        else:
            total += float(errors[place])
            continue
        row = group.rows[at]
        found.off.append(Off(f"{row.file}, row {row.row}", row.key, row.content_hash, words))
    return total
