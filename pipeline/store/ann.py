"""Keeps approximate search in step with the vectors: called by `publish` for every generation.

    small index                   no lists: exact search is as fast, and always right
    a few new rows                nothing is written; they are the generation's `tail`, which is searched exactly
    more                          they are sorted into the lists of near centroids, in a file of their own, with what is
                                  in files that are not much larger: so there are few, and a night writes little
    a file that is mostly dead    is written anew without its dead rows
    four times as many rows       new centroids, and all lists anew
    no time left                  what is in no list stays in the tail until the next night

Files are immutable. They live as long as a kept generation names them. Recall against exact search is measured on every
publish, for stored vectors as queries: the fewest entries with which a search reaches the wanted recall are what
readers look at. Centroids are those of k-means by cosine (Lloyd 1982; Dhillon and Modha 2001) over a sample.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from pipeline.store.centroids import LISTS_EACH, train, two_lists
from pipeline.store.files import DIGEST_BYTES, StoreDamaged, commit_file, digest_file, sync, temporary
from pipeline.store.generation import Block
from pipeline.store.hdf5 import new_h5
from pipeline.store.lists import Codes, Keys, ListFile, Lists, Lookup, OwnFile, content_keys, encode, read_centroids
from pipeline.store.scan import Rows, Scan, Scores
from pipeline.store.shards import PIECE_ROWS, ShardInfo, Vectors, map_embeddings

log = logging.getLogger("nightjar")

FOLDER = "ann"
VECTOR_BYTES_MIN = 64 << 20  # of live vectors. Below, exact search answers in some milliseconds
TAIL_BYTES_MAX = 4 << 20  # of vectors in no list: scoring them costs half a millisecond
FILE_BYTES = 2 << 30  # of codes in one file of lists: what a night copies at most beside what is new
OUTGROWN = 4  # times more or fewer rows than the centroids were made for
LIVE_MIN = 0.75  # of a file's entries
MERGE_RATIO = 2  # a file joins what is written if it has at most so many times its entries
ASSIGN_ROWS = 16_384  # between two looks at the clock: about a second at d = 512 and 4,000 lists
# A percent above what is promised: 48 queries are a sample, and what is stored is found more easily than what is asked
# from outside (.9875 and .975 were seen in one index of a million rows).
RECALL_K, RECALL_MIN, QUERIES = 10, 0.99, 48
PROBED, PROBED_STEP = 1024, 1.5  # entries the narrowest search that is tried looks at, and how the next ones widen
LINE_EVERY_S = 10.0


def _never() -> bool:
    return False


def _no_clock(_: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Turn:
    """What a run says about the making of lists: when to leave off, and whose clock it counts on."""

    out_of_time: Callable[[], bool] = _never
    phase: Callable[[str], AbstractContextManager[None]] = _no_clock


@dataclass(frozen=True)
class Centroids:
    file: OwnFile
    rows: int  # of the index they were made for
    vectors_ld: Vectors


@dataclass(frozen=True, eq=False)
class Written:
    """A file of lists, and where in it are the entries of what this generation has and no file before it."""

    file: ListFile
    lists: Lists
    live: Rows


@dataclass(frozen=True)
class Source:
    """Entries that go into a new file."""

    keys: Keys
    list_of: npt.NDArray[np.int64]
    codes: Callable[[Rows], tuple[Codes, Scores]]  # of these positions


def update(
    out: Path,
    draft: Path,
    number: int,
    files: Sequence[tuple[Path, ShardInfo, Rows]],
    last: dict[str, Any] | None,
    turn: Turn,
) -> dict[str, Any] | None:
    """Lists for generation `number`, whose index.h5 lies in `draft`; what generation.json remembers of them.

    `files` are its data files with their stretches of live rows, in their order, and then index.h5 with the repeated
    vectors. `last` is what the last generation of this model remembered.
    None: the index is too small, or there was no time for the first lists. New files lie under final names and are
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
            return _update(out, draft, number, scan, last, turn)
    finally:
        scan.close()


def names_of(entry: dict[str, Any] | None) -> list[str]:
    """The files of an entry that lie outside the generation's folder."""
    if entry is None:
        return []
    # The USearch graphs of earlier versions are not asked any more, and go with their generation.
    old = [own["name"] for file in entry.get("graphs", []) for own in (file["graph"], file["keys"])]
    own = [entry["centroids"]["name"]] if "centroids" in entry else []
    return [*old, *own, *(content["file"]["name"] for content in entry.get("lists", []))]


def last_entry(home: Path) -> dict[str, Any] | None:
    """Of the generation in this folder; None where it has no lists, or cannot be read: then they are made anew."""
    try:
        content: dict[str, Any] = json.loads((home / "generation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    entry: dict[str, Any] | None = content.get("ann")
    return entry if entry and "lists" in entry else None


def _update(
    out: Path, draft: Path, number: int, scan: Scan, last: dict[str, Any] | None, turn: Turn
) -> dict[str, Any] | None:
    with h5py.File(draft / "index.h5", "r", locking=False) as file:
        keys_n = content_keys(file["content_hash"][:].reshape(-1, DIGEST_BYTES))
    order = np.argsort(keys_n, kind="stable")  # equal keys stay in the order of their rows
    map_2n = np.stack([keys_n[order], order.astype(np.uint64)])
    keys, first_of = np.unique(map_2n[0], return_index=True)
    row_of = order[first_of]  # the first row of a content lies in a data file, its repetitions in index.h5
    covered = np.zeros(len(keys), np.bool_)
    rng = np.random.default_rng(number)
    centroids, files = _usable(out, last, keys, covered)
    if centroids is None or not centroids.rows / OUTGROWN <= len(keys) <= centroids.rows * OUTGROWN:
        if turn.out_of_time():
            centroids = centroids if files else None
        else:
            centroids, files = _train(out, number, scan, row_of, rng), []
            covered[:] = False
    if centroids is None:
        return None
    files = _sort_in(out, number, scan, centroids, files, keys, row_of, covered, turn)
    if not files:
        return None
    tail = np.sort(map_2n[1][~np.repeat(covered, np.diff(first_of, append=len(order)))].astype(np.int64))
    path = draft / "ann.npy"
    with path.open("wb") as stream:
        # Not np.save, nor tofile: of a full disk numpy does not notice where it comes with the last 4 KB.
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(map_2n))
        stream.write(map_2n.data)
    sync(path)
    lookup = Lookup(centroids.vectors_ld, [file.lists for file in files], map_2n, tail, scan, PROBED)
    measured = _measure(lookup, scan, row_of, rng)
    log.info(
        "ann: %s rows in %d files of %s lists, %s beside them; recall@%d %.3f with %s entries looked at, %.1f ms, "
        "exact %.1f ms", f"{int(covered.sum()):,}", len(files), f"{len(centroids.vectors_ld):,}", f"{len(tail):,}",
        RECALL_K, measured["recall"], f"{measured['probed']:,}", measured["ann_ms"], measured["exact_ms"],
    )  # fmt: skip
    own_map = OwnFile(f"generations/{number}/{path.name}", path.stat().st_size, digest_file(path))
    return {
        "centroids": asdict(centroids.file),
        "centroids_rows": centroids.rows,
        "lists": [asdict(file.file) for file in files],
        "map": asdict(own_map),
        "tail": _runs(tail),
        **measured,
    }


def _usable(
    out: Path, last: dict[str, Any] | None, keys: Keys, covered: npt.NDArray[np.bool_]
) -> tuple[Centroids | None, list[Written]]:
    """What the last generation has and is there; `covered` says which of the ascending `keys` it holds. A file that is
    not is made anew."""
    if last is None:
        return None, []
    files: list[Written] = []
    try:
        own = OwnFile(**last["centroids"])
        own.check(out / own.name, digest=True)
        centroids = Centroids(own, last["centroids_rows"], read_centroids(out / own.name))
    except StoreDamaged as error:
        log.warning("all lists are made anew: %s", error)
        return None, []
    for file in map(ListFile.from_json, last["lists"]):
        try:
            file.file.check(out / file.file.name, digest=False)
            lists = Lists.open(out / file.file.name)
        except StoreDamaged as error:
            log.warning("a file of lists is made anew: %s", error)
            continue
        if len(live := _cover(covered, keys, lists.keys)):
            files.append(Written(file, lists, live))
    return centroids, files


def _cover(covered: npt.NDArray[np.bool_], keys: Keys, held: Keys) -> Rows:
    """Positions in `held` of what is among the ascending `keys` and was not covered; now it is."""
    at = np.minimum(np.searchsorted(keys, held), len(keys) - 1)
    live = np.flatnonzero((keys[at] == held) & ~covered[at])
    covered[at[live]] = True
    return live


def _runs(rows: Rows) -> list[list[int]]:
    """First row and count of each stretch of ascending rows."""
    if not len(rows):
        return []
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    counts = np.diff(starts, append=len(rows))
    return [[int(rows[start]), int(count)] for start, count in zip(starts, counts, strict=True)]


def _train(out: Path, number: int, scan: Scan, row_of: Rows, rng: np.random.Generator) -> Centroids:
    start_s = time.monotonic()
    vectors_ld = train(scan, row_of, rng)
    path = out / FOLDER / f"{number:06d}.h5"
    path.parent.mkdir(exist_ok=True)
    with new_h5(temporary(path)) as (file, check):
        file.create_dataset("centroids", data=vectors_ld)
        check()
    log.info("ann: %s centroids in %.0f s", f"{len(vectors_ld):,}", time.monotonic() - start_s)
    return Centroids(_commit(path), len(row_of), vectors_ld)


def _sort_in(
    out: Path, number: int, scan: Scan, centroids: Centroids, files: list[Written], keys: Keys, row_of: Rows,
    covered: npt.NDArray[np.bool_], turn: Turn,
) -> list[Written]:  # fmt: skip
    """The files of lists after everything that time allows is in one; `covered` follows."""
    todo, vectors_ld = np.flatnonzero(~covered), centroids.vectors_ld
    few = 2 * scan.dim * len(todo) <= TAIL_BYTES_MAX
    most = FILE_BYTES // scan.dim
    joined, kept = _joined(files, 0 if few else LISTS_EACH * len(todo), most)
    if (few and not joined) or (files and turn.out_of_time()):
        return files  # new centroids get their first rows whatever the time, or every night would train them in vain
    todo = todo[np.argsort(row_of[todo])]  # in the order of the data files, so that what is left is one stretch
    total, made, start_s = len(todo), 0, time.monotonic()
    last_line_s = start_s
    while joined or len(todo):
        made += 1
        room = (most - sum(len(file.live) for file in joined)) // LISTS_EACH
        list_of: list[npt.NDArray[np.int64]] = []
        rows = 0
        while rows < min(room, len(todo)) and not (rows and turn.out_of_time()):
            part = todo[rows : min(rows + ASSIGN_ROWS, room)]
            list_of.append(two_lists(scan.gather(row_of[part]), vectors_ld))
            rows += len(part)
            if time.monotonic() - last_line_s > LINE_EVERY_S:
                last_line_s = time.monotonic()
                done = total - len(todo) + rows
                log.info("ann: %s of %s rows sorted in %.0f s", f"{done:,}", f"{total:,}", last_line_s - start_s)
        new, path = todo[:rows], out / FOLDER / f"{number:06d}-{made:06d}.h5"
        sources = [_again(file) for file in joined]
        if rows:
            sources.append(_new(scan, keys[new], row_of[new], np.concatenate(list_of), vectors_ld))
        kept.append(_write(out, path, scan.dim, len(vectors_ld), sources))
        covered[new] = True
        todo, joined = todo[rows:], []
        if turn.out_of_time():
            break
    if len(todo):
        log.info("ann: no time is left; %s rows are searched exactly until the next run", f"{len(todo):,}")
    return kept


def _joined(files: Sequence[Written], new: int, most: int) -> tuple[list[Written], list[Written]]:
    """Files that are written anew together with `new` entries, and those that stay. An entry is copied log n times
    before its file has as many as it may have (the merges of a log-structured store, O'Neil et al. 1996)."""
    joined: list[Written] = []
    entries = 0
    dead = [file for file in files if len(file.live) < LIVE_MIN * file.file.entries]
    near = [file for file in files if file not in dead] if new else []
    for file in [*dead, *sorted(near, key=lambda file: len(file.live))]:
        fits = entries + len(file.live) <= most - min(new, most)
        if fits and (file in dead or len(file.live) <= MERGE_RATIO * (entries + new)):
            joined.append(file)
            entries += len(file.live)
    return joined, [file for file in files if file not in joined]


def _again(file: Written) -> Source:
    """What lives of a file, in its order."""
    lists, live = file.lists, file.live
    return Source(lists.keys[live], lists.list_of[live], lambda at: (lists.codes_nd[live[at]], lists.scales[live[at]]))


def _new(scan: Scan, keys: Keys, row_of: Rows, list_of: npt.NDArray[np.int64], centroids_ld: Vectors) -> Source:
    """Rows that are in no file yet; `list_of` (n, lists of each)."""
    each = list_of.shape[1]

    def codes(at: Rows) -> tuple[Codes, Scores]:
        centroids_nd = centroids_ld[list_of.ravel()[at]].astype(np.float32)
        return encode(scan.gather(row_of[at // each]).astype(np.float32) - centroids_nd)

    return Source(np.repeat(keys, each), list_of.ravel(), codes)


def _write(out: Path, path: Path, dim: int, lists: int, sources: Sequence[Source]) -> Written:
    """One file of all sources, list after list; codes pass through memory some megabytes at a time."""
    list_of = np.concatenate([source.list_of for source in sources])
    order = np.argsort(list_of, kind="stable")
    sizes = [len(source.keys) for source in sources]
    source_of = np.repeat(np.arange(len(sources)), sizes)[order]
    at_of = np.concatenate([np.arange(size) for size in sizes])[order]
    with new_h5(temporary(path)) as (file, check):
        file.create_dataset("starts", data=np.cumsum([0, *np.bincount(list_of, minlength=lists)]), dtype="<i8")
        file.create_dataset("keys", data=np.concatenate([source.keys for source in sources])[order], dtype="<u8")
        all_codes = file.create_dataset("codes", (len(order), dim), "i1")
        all_scales = file.create_dataset("scales", (len(order),), "<f4")
        for first in range(0, len(order), PIECE_ROWS):
            part = slice(first, min(first + PIECE_ROWS, len(order)))
            codes_nd, scales = np.empty((part.stop - first, dim), np.int8), np.empty(part.stop - first, np.float32)
            for number, source in enumerate(sources):
                mine = np.flatnonzero(source_of[part] == number)
                codes_nd[mine], scales[mine] = source.codes(at_of[part][mine])
            all_codes[part], all_scales[part] = codes_nd, scales
            check()
    own = ListFile(len(order), _commit(path))
    return Written(own, Lists.open(out / own.file.name), np.arange(len(order)))


def _commit(path: Path) -> OwnFile:
    draft = temporary(path)
    own = OwnFile(f"{FOLDER}/{path.name}", draft.stat().st_size, digest_file(draft))
    commit_file(path)
    return own


def _measure(lookup: Lookup, scan: Scan, row_of: Rows, rng: np.random.Generator) -> dict[str, Any]:
    """The narrowest search that finds enough of the k best by distance, and what it takes; ties count as found."""
    sample = np.sort(rng.choice(row_of, min(QUERIES, len(row_of)), replace=False))
    queries = scan.gather(sample)
    wanted = scan.kth_scores(queries, RECALL_K + 1) - 1e-5  # the query itself is stored; two kernels round differently
    exact_ms: list[float] = []
    for query in queries[:3]:
        start_s = time.perf_counter()
        scan.nearest(query, RECALL_K)
        exact_ms.append(1000 * (time.perf_counter() - start_s))
    recall, ann_ms, probed = 0.0, [0.0], float(PROBED)
    while recall < RECALL_MIN:
        lookup.probed = int(probed)
        found: list[float] = []
        ann_ms = []
        for query, worst in zip(queries, wanted, strict=True):
            start_s = time.perf_counter()
            answer = lookup.nearest(query, RECALL_K + 1)
            ann_ms.append(1000 * (time.perf_counter() - start_s))
            scores = scan.nearest(query, RECALL_K + 1)[1] if answer is None else answer[1]
            found.append(min(int(np.count_nonzero(scores >= worst)) - 1, RECALL_K) / RECALL_K)
        recall = float(np.mean(found))
        if probed >= lookup.entries:
            break
        probed *= PROBED_STEP
    return {
        "probed": lookup.probed,
        "recall": round(recall, 4),
        "recall_k": RECALL_K,
        "queries": len(queries),
        "ann_ms": round(float(np.median(ann_ms)), 3),
        "exact_ms": round(float(np.median(exact_ms)), 3),
    }
