"""Keeps approximate search in step with the vectors: called by `publish` for every generation.

    small index                   no graphs: exact search is as fast, and always right
    a few new rows                nothing is built; they are the generation's `tail`, which is searched exactly
    more                          they are inserted into a copy of the smallest graph, or fill graphs of their own
    a graph that is mostly dead   is left out, its live rows are inserted anew
    no time left                  what is not inserted stays in the tail until the next night

Graphs are immutable files of at most GRAPH_ROWS rows, so a night copies one of them at most, however large the index.
They live as long as a kept generation names them. Recall against exact search is measured on every publish, for stored
vectors as queries: the narrowest search that reaches the wanted recall is the one that readers use.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt

from pipeline.store.files import DIGEST_BYTES, StoreDamaged, StoreError, commit_file, digest_file, sync, temporary
from pipeline.store.generation import Block
from pipeline.store.graphs import EXPANSIONS, GraphFile, Graphs, OwnFile, content_keys, view_graph
from pipeline.store.scan import CORES, Rows, Scan
from pipeline.store.shards import ShardInfo, map_embeddings

if TYPE_CHECKING:
    from pipeline.store.usearch_lib import Index

log = logging.getLogger("nightjar")

FOLDER = "ann"
VECTOR_BYTES_MIN = 64 << 20  # of live vectors. Below, exact search answers in some milliseconds
TAIL_BYTES_MAX = 4 << 20  # of vectors in no graph: scoring them costs half a millisecond
GRAPH_ROWS = 400_000  # of one graph: 0.5 GB at d = 512, which is the memory that building takes
DEAD_SHARE_MAX = 0.25  # of a graph's rows
ADD_ROWS = 2048  # inserted between two looks at the clock: about a second
SEED_ROWS = 2048  # of a graph, by one thread: two that meet in a nearly empty graph leave rows no link leads to
CONNECTIVITY, EXPANSION_ADD = 16, 128
RECALL_K, RECALL_MIN, QUERIES = 10, 0.985, 48  # half a percent above what is promised, for 48 queries are a sample
LINE_EVERY_S = 10.0

Keys = npt.NDArray[np.uint64]


def _never() -> bool:
    return False


def _no_clock(_: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Turn:
    """What a run says about the building of graphs: when to leave off, and whose clock it counts on."""

    out_of_time: Callable[[], bool] = _never
    phase: Callable[[str], AbstractContextManager[None]] = _no_clock


def update(
    out: Path,
    draft: Path,
    number: int,
    files: Sequence[tuple[Path, ShardInfo, Rows]],
    last: dict[str, Any] | None,
    turn: Turn,
) -> dict[str, Any] | None:
    """Graphs for generation `number`, whose index.h5 lies in `draft`; what generation.json remembers of them.

    `files` are its data files with their stretches of live rows, in their order, and then index.h5 with the repeated
    vectors. `last` is what the last generation of this model remembered.
    None: the index is too small, or there was no time for the first graph. New files lie under final names and are
    garbage until a generation names them.
    """
    blocks: list[Block] = []
    rows = 0
    for path, info, runs in files:
        if info.rows:
            blocks.append(Block(info.name, map_embeddings(path, info), rows, runs))
            rows += blocks[-1].live
    if not blocks or 2 * rows * blocks[0].emb_nd.shape[1] < VECTOR_BYTES_MIN:
        return None
    scan = Scan(blocks)
    try:
        with turn.phase("ann"):
            return _update(out, draft, number, scan, _usable(out, last), turn)
    finally:
        scan.close()


def names_of(entry: dict[str, Any] | None) -> list[str]:
    """The files of an entry that lie outside the generation's folder."""
    graphs = [GraphFile.from_json(file) for file in entry["graphs"]] if entry else []
    return [own.name for file in graphs for own in (file.graph, file.keys)]


def last_entry(home: Path) -> dict[str, Any] | None:
    """Of the generation in this folder; None where it has no graphs, or cannot be read: then they are built anew."""
    try:
        content: dict[str, Any] = json.loads((home / "generation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    entry: dict[str, Any] | None = content.get("ann")
    return entry


def _usable(out: Path, last: dict[str, Any] | None) -> list[tuple[GraphFile, Keys]]:
    """Graphs of the last generation whose files are there, with their keys. One that is not is built anew."""
    found = []
    for file in map(GraphFile.from_json, last["graphs"] if last else []):
        try:
            file.graph.check(out / file.graph.name, digest=False)
            file.keys.check(out / file.keys.name, digest=True)
        except StoreDamaged as error:
            log.warning("a graph is built anew: %s", error)
            continue
        found.append((file, np.fromfile(out / file.keys.name, "<u8")))
    return found


def _update(
    out: Path, draft: Path, number: int, scan: Scan, known: list[tuple[GraphFile, Keys]], turn: Turn
) -> dict[str, Any] | None:
    from pipeline.store.usearch_lib import version

    with h5py.File(draft / "index.h5", "r", locking=False) as file:
        keys_n = content_keys(file["content_hash"][:].reshape(-1, DIGEST_BYTES))
    order = np.argsort(keys_n, kind="stable")  # equal keys stay in the order of their rows
    map_2n = np.stack([keys_n[order], order.astype(np.uint64)])
    keys, first_of = np.unique(map_2n[0], return_index=True)
    row_of = order[first_of]  # the first row of a content lies in a data file, its repetitions in index.h5
    covered = np.zeros(len(keys), np.bool_)
    files: list[tuple[GraphFile, Keys]] = []
    for file_, own in known:
        live = _mark(covered.copy(), keys, own)
        if np.count_nonzero(live & ~covered) < (1 - DEAD_SHARE_MAX) * file_.rows:
            log.info("ann: %s is %s rows, too few of them live: they are inserted anew", file_.graph.name, file_.rows)
            continue
        covered |= live
        files.append((file_, own))
    todo = np.flatnonzero(~covered)
    if len(todo) * scan.dim * 2 > TAIL_BYTES_MAX:
        todo = todo[np.argsort(row_of[todo])]  # in the order of the data files, so that what is left is one stretch
        files = _build(out, number, scan, files, keys, row_of, todo, turn)
        for _, own in files:
            _mark(covered, keys, own)
    if not files:
        return None
    tail = np.sort(map_2n[1][~np.repeat(covered, np.diff(first_of, append=len(order)))].astype(np.int64))
    path = draft / "ann.npy"
    with path.open("wb") as stream:
        # Not np.save, nor tofile: of a full disk numpy does not notice where it comes with the last 4 KB.
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(map_2n))
        stream.write(map_2n.data)
    sync(path)
    views = [view_graph(out / file_.graph.name) for file_, _ in files]
    graphs = Graphs(views, map_2n, tail, scan, EXPANSIONS[0])
    try:
        measured = _measure(graphs, scan, row_of, np.random.default_rng(number))
    finally:
        graphs.close()
    log.info(
        "ann: %s rows in %d graphs, %s beside them; recall@%d %.3f, %.1f ms, exact %.1f ms",
        f"{int(covered.sum()):,}", len(files), f"{len(tail):,}", RECALL_K, measured["recall"], measured["ann_ms"],
        measured["exact_ms"],
    )  # fmt: skip
    if measured["recall"] < RECALL_MIN:
        log.warning("ann: recall@%d is %.3f at the widest search", RECALL_K, measured["recall"])
    own_map = OwnFile(f"generations/{number}/{path.name}", path.stat().st_size, digest_file(path))
    return {
        "graphs": [asdict(file_) for file_, _ in files],
        "map": asdict(own_map),
        "tail": _runs(tail),
        **measured,
        "usearch": version,
    }


def _mark(covered: npt.NDArray[np.bool_], keys: Keys, own: Keys) -> npt.NDArray[np.bool_]:
    """Sets `covered` where the ascending `keys` are among the ascending `own`."""
    at = np.minimum(np.searchsorted(own, keys), max(len(own) - 1, 0))
    covered |= own[at] == keys if len(own) else False
    return covered


def _runs(rows: Rows) -> list[list[int]]:
    """First row and count of each stretch of ascending rows."""
    if not len(rows):
        return []
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    counts = np.diff(starts, append=len(rows))
    return [[int(rows[start]), int(count)] for start, count in zip(starts, counts, strict=True)]


def _build(
    out: Path, number: int, scan: Scan, files: list[tuple[GraphFile, Keys]], keys: Keys, row_of: Rows, todo: Rows,
    turn: Turn,
) -> list[tuple[GraphFile, Keys]]:  # fmt: skip
    """The graphs after everything of `todo` that time allows is inserted; `keys[todo]` are in none of `files`."""
    from pipeline.store.usearch_lib import Index

    start_s = last_line_s = time.monotonic()
    total, done, made = len(todo), 0, 0
    while len(todo) and not turn.out_of_time():
        made += 1
        path = out / FOLDER / f"{number:06d}-{made:06d}.usearch"
        grown = min(files, key=lambda known: known[0].rows, default=None)
        graph = Index(
            ndim=scan.dim, metric="ip", dtype="f16", connectivity=CONNECTIVITY, expansion_add=EXPANSION_ADD,
            enable_key_lookups=False,
        )  # fmt: skip
        own = np.empty(0, np.uint64)
        if grown is not None and grown[0].rows + len(todo) <= GRAPH_ROWS:
            graph.load(out / grown[0].graph.name)
            own = grown[1]
            files = [known for known in files if known is not grown]
        room, rows = GRAPH_ROWS - len(own), 0
        while rows < min(room, len(todo)) and not (rows and turn.out_of_time()):
            part = todo[rows : min(rows + ADD_ROWS, room)]
            graph.add(keys[part], scan.gather(row_of[part]), threads=CORES if len(own) + rows >= SEED_ROWS else 1)
            rows += len(part)
            if time.monotonic() - last_line_s > LINE_EVERY_S:
                last_line_s = time.monotonic()
                took_s = last_line_s - start_s
                log.info("ann: %s of %s rows inserted in %.0f s", f"{done + rows:,}", f"{total:,}", took_s)
        own = np.sort(np.concatenate([own, keys[todo[:rows]]]))
        files = [*files, (_save(out, path, graph, own), own)]
        todo, done = todo[rows:], done + rows
    if len(todo):
        log.info("ann: no time is left; %s rows are searched exactly until the next run", f"{len(todo):,}")
    return files


def _save(out: Path, path: Path, graph: Index, own: Keys) -> GraphFile:
    (out / FOLDER).mkdir(exist_ok=True)
    keys = path.with_suffix(".keys")
    try:
        graph.save(temporary(path))
    except RuntimeError as error:  # what USearch makes of a full disk
        raise StoreError(f"{temporary(path)} cannot be written: {error}. Make room, and run the same command") from None
    if (size := temporary(path).stat().st_size) != graph.serialized_length:
        raise StoreError(f"{temporary(path)} has {size} bytes of {graph.serialized_length}. Make room, and run again")
    temporary(keys).write_bytes(own.astype("<u8").data)
    return GraphFile(len(own), _commit(path), _commit(keys))


def _commit(path: Path) -> OwnFile:
    draft = temporary(path)
    own = OwnFile(f"{FOLDER}/{path.name}", draft.stat().st_size, digest_file(draft))
    commit_file(path)
    return own


def _measure(graphs: Graphs, scan: Scan, row_of: Rows, rng: np.random.Generator) -> dict[str, Any]:
    """The narrowest search that finds enough of the k best by distance, and what it takes; ties count as found."""
    sample = np.sort(rng.choice(row_of, min(QUERIES, len(row_of)), replace=False))
    queries = scan.gather(sample)
    wanted = scan.kth_scores(queries, RECALL_K + 1) - 1e-5  # the query itself is stored; two kernels round differently
    exact_ms: list[float] = []
    for query in queries[:3]:
        start_s = time.perf_counter()
        scan.nearest(query, RECALL_K)
        exact_ms.append(1000 * (time.perf_counter() - start_s))
    recall, ann_ms = 0.0, [0.0]
    for expansion in EXPANSIONS:
        graphs.expansion = expansion
        found: list[float] = []
        ann_ms = []
        for query, worst in zip(queries, wanted, strict=True):
            start_s = time.perf_counter()
            answer = graphs.nearest(query, RECALL_K + 1)
            ann_ms.append(1000 * (time.perf_counter() - start_s))
            scores = scan.nearest(query, RECALL_K + 1)[1] if answer is None else answer[1]
            found.append(min(int(np.count_nonzero(scores >= worst)) - 1, RECALL_K) / RECALL_K)
        recall = float(np.mean(found))
        if recall >= RECALL_MIN:
            break
    return {
        "expansion": graphs.expansion,
        "recall": round(recall, 4),
        "recall_k": RECALL_K,
        "queries": len(queries),
        "ann_ms": round(float(np.median(ann_ms)), 3),
        "exact_ms": round(float(np.median(exact_ms)), 3),
    }
