"""Keeps approximate search in step with the vectors: called by `publish` for every generation.

    small index                   no lists: exact search is as fast, and always right
    a few new rows                nothing is written; they are the generation's `tail`, which is searched exactly
    more                          they are sorted into the lists of near centroids, in a file of their own, with what is
                                  in files that are not much larger: so there are few, and a night writes little
    a file that is mostly dead    is written anew without its dead rows
    four times as many rows       new centroids, and all lists anew, once there is time for all of them
    no time left                  what is in no list stays in the tail until the next night, changed or not
    a repair                      files that were broken, or hold codes of a broken vector, are made anew

Files are immutable. They live as long as a kept generation names them. Recall against exact search is measured on every
publish, for stored vectors as queries: the fewest entries with which a search reaches the wanted recall are what
readers look at. Centroids are those of k-means by cosine (Lloyd 1982; Dhillon and Modha 2001) over a sample.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
import numpy.typing as npt

from pipeline.store.centroids import LISTS_EACH, train, two_lists
from pipeline.store.files import DIGEST_BYTES, StoreDamaged, commit_file, digest_file, sync, temporary
from pipeline.store.generation import Block, Distrusted, content_of
from pipeline.store.hdf5 import new_h5
from pipeline.store.lists import Codes, Keys, ListFile, Lists, Lookup, OwnFile, content_keys, encode, read_centroids
from pipeline.store.scan import Rows, Scan, Scores
from pipeline.store.shards import PIECE_ROWS, ShardInfo, Vectors, map_embeddings

log = logging.getLogger("nightjar")
Answer = TypeVar("Answer")

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
TIMED = 3  # queries that tell what is faster, exact search or lists
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
class Contents:
    """What there is to be found, each once."""

    keys: Keys  # ascending
    row_of: Rows  # the first row that has it
    rows_of: Rows  # how many have it
    covered: npt.NDArray[np.bool_]  # whether it is in a list

    @property
    def tail(self) -> int:
        """Rows that are in no list."""
        return int(self.rows_of[~self.covered].sum())


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
    entry: dict[str, Any] | None = content_of(home).get("ann")
    return {**entry, "distrusted": Distrusted.read(home)} if entry and "lists" in entry else None


def is_complete(home: Path) -> bool:
    """Whether the generation in this folder has all the lists it should, and their recall is settled."""
    entry = last_entry(home)
    if entry is not None:
        return bool(entry.get("complete")) and not any(entry["distrusted"])
    content = content_of(home)
    return bool(content) and bool(2 * content["rows"] * content["dim"] < VECTOR_BYTES_MIN)


def _update(
    out: Path, draft: Path, number: int, scan: Scan, last: dict[str, Any] | None, turn: Turn
) -> dict[str, Any] | None:
    with h5py.File(draft / "index.h5", "r", locking=False) as file:
        keys_n = content_keys(file["content_hash"][:].reshape(-1, DIGEST_BYTES))
    order = np.argsort(keys_n, kind="stable")  # equal keys stay in the order of their rows
    map_2n = np.stack([keys_n[order], order.astype(np.uint64)])
    keys, first_of = np.unique(map_2n[0], return_index=True)
    row_of = order[first_of]  # the first row of a content lies in a data file, its repetitions in index.h5
    rows_of = np.diff(first_of, append=len(order))  # how many rows each content has
    rng = np.random.default_rng(number)
    contents = Contents(keys, row_of, rows_of, np.zeros(len(keys), np.bool_))
    centroids, files, covered = _sorted(out, number, scan, contents, last, rng, turn)
    if centroids is None or not files:
        return None
    _tidy(out, number, {centroids.file.name, *(file.file.file.name for file in files)})
    tail = np.sort(map_2n[1][~np.repeat(covered, rows_of)].astype(np.int64))
    path = draft / "ann.npy"
    with path.open("wb") as stream:
        # Not np.save, nor tofile: of a full disk numpy does not notice where it comes with the last 4 KB.
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(map_2n))
        stream.write(map_2n.data)
    sync(path)
    lookup = Lookup(centroids.vectors_ld, [file.lists for file in files], map_2n, tail, scan, PROBED)
    first = max(PROBED, last["probed"]) if last and turn.out_of_time() else PROBED
    measured, settled = _measure(lookup, scan, row_of, rng, first, turn)
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
        "complete": settled and len(tail) <= _few(scan),
        **measured,
    }


def _sorted(
    out: Path, number: int, scan: Scan, contents: Contents, last: dict[str, Any] | None, rng: np.random.Generator,
    turn: Turn,
) -> tuple[Centroids | None, list[Written], npt.NDArray[np.bool_]]:  # fmt: skip
    """The best lists that time allows, and which contents they cover: those of the last generation with what is new;
    where they are outgrown new ones, if these cover as much."""
    rows = len(contents.keys)
    centroids, files = _usable(out, last, contents)
    fits = centroids is not None and centroids.rows / OUTGROWN <= rows <= centroids.rows * OUTGROWN
    if centroids is not None and (files or fits):
        files = _sort_in(out, number, scan, centroids, files, contents, turn)
    if fits or turn.out_of_time():
        return centroids, files, contents.covered
    trained = _train(out, number, scan, contents.row_of, rng, turn)
    anew = replace(contents, covered=np.zeros(rows, np.bool_))
    if not files or not turn.out_of_time():
        files_anew = _sort_in(out, number, scan, trained, [], anew, turn)
        if not files or anew.tail <= max(contents.tail, _few(scan)):
            return trained, files_anew, anew.covered
    return centroids, files, contents.covered


def _few(scan: Scan) -> int:
    """Rows that may stay outside of all lists."""
    return TAIL_BYTES_MAX // (2 * scan.dim)


def _tidy(out: Path, number: int, named: set[str]) -> None:
    """Delete what was written for this generation and is not taken: what new centroids have replaced, or could not."""
    for path in (out / FOLDER).glob(f"{number:06d}*.h5"):
        if f"{FOLDER}/{path.name}" not in named:
            path.unlink()


def _usable(out: Path, last: dict[str, Any] | None, contents: Contents) -> tuple[Centroids | None, list[Written]]:
    """What the last generation has, is there and can be trusted; its contents are covered. The rest is made anew."""
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
    distrusted: Distrusted = last["distrusted"]
    dropped = np.array(distrusted.keys, np.uint64)
    for file in map(ListFile.from_json, last["lists"]):
        try:
            file.file.check(out / file.file.name, digest=False)
            lists = Lists.open(out / file.file.name)
        except StoreDamaged as error:
            log.warning("a file of lists is made anew: %s", error)
            continue
        if file.file.name in distrusted.files or np.isin(dropped, lists.keys).any():
            log.warning("a file of lists is made anew: %s was found broken, or vectors in it", file.file.name)
            continue
        if len(live := _cover(contents.covered, contents.keys, lists.keys)):
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


def _train(out: Path, number: int, scan: Scan, row_of: Rows, rng: np.random.Generator, turn: Turn) -> Centroids:
    start_s = time.monotonic()
    vectors_ld = train(scan, row_of, rng, turn.out_of_time)
    path = out / FOLDER / f"{number:06d}.h5"
    path.parent.mkdir(exist_ok=True)
    with new_h5(temporary(path)) as (file, check):
        file.create_dataset("centroids", data=vectors_ld)
        check()
    log.info("ann: %s centroids in %.0f s", f"{len(vectors_ld):,}", time.monotonic() - start_s)
    return Centroids(_commit(path), len(row_of), vectors_ld)


def _sort_in(
    out: Path, number: int, scan: Scan, centroids: Centroids, files: list[Written], contents: Contents, turn: Turn
) -> list[Written]:
    """The files of lists after everything that time allows is in one; it is covered then."""
    keys, row_of, vectors_ld = contents.keys, contents.row_of, centroids.vectors_ld
    todo = np.flatnonzero(~contents.covered)
    few = contents.tail <= _few(scan)
    most = FILE_BYTES // scan.dim
    joined, kept = _joined(files, 0 if few else LISTS_EACH * len(todo), most)
    if (few and not joined) or (files and turn.out_of_time()):
        return files  # new centroids get their first rows whatever the time, or every night would train them in vain
    todo = todo[np.argsort(row_of[todo])]  # in the order of the data files, so that what is left is one stretch
    total, start_s = len(todo), time.monotonic()
    last_line_s = start_s
    while joined or len(todo):
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
        new, paths = todo[:rows], (out / FOLDER / f"{number:06d}-{made:06d}.h5" for made in itertools.count(1))
        path = next(path for path in paths if not path.exists())
        sources = [_again(file) for file in joined]
        if rows:
            sources.append(_new(scan, keys[new], row_of[new], np.concatenate(list_of), vectors_ld))
        kept.append(_write(out, path, scan.dim, len(vectors_ld), sources))
        contents.covered[new] = True
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


def _measure(
    lookup: Lookup, scan: Scan, row_of: Rows, rng: np.random.Generator, first: int, turn: Turn
) -> tuple[dict[str, Any], bool]:
    """The narrowest search, from `first` entries on, that finds enough of the k best by distance (ties count as found),
    what it takes, and whether the question is settled: time may be over before. Lists slower than exact search are not
    asked by readers, so they are not widened."""
    sample = np.sort(rng.choice(row_of, min(QUERIES, len(row_of)), replace=False))
    queries = scan.gather(sample)
    wanted = scan.kth_scores(queries, RECALL_K + 1) - 1e-5  # the query itself is stored; two kernels round differently
    exact_ms = float(np.median([_timed(partial(scan.nearest, query, RECALL_K))[1] for query in queries[:TIMED]]))
    tails: list[tuple[tuple[Rows, Scores], float]] = []  # found once, whatever is probed: a large tail is a scan
    for probed in itertools.count():
        lookup.probed = int(first * PROBED_STEP**probed)
        found: list[float] = []
        ann_ms: list[float] = []
        for number, (query, worst) in enumerate(zip(queries, wanted, strict=True)):
            if number == len(tails):
                tails.append(_timed(partial(lookup.tail, query, RECALL_K + 1)))
            tail, tail_ms = tails[number]
            if number < TIMED:  # what comes from the disk once says nothing of the day that follows
                lookup.nearest(query, RECALL_K + 1, tail)
            answer, ms = _timed(partial(lookup.nearest, query, RECALL_K + 1, tail))
            ann_ms.append(ms + tail_ms)
            scores = scan.nearest(query, RECALL_K + 1)[1] if answer is None else answer[1]
            found.append(min(int(np.count_nonzero(scores >= worst)) - 1, RECALL_K) / RECALL_K)
            slow = len(found) >= TIMED and not _pays(float(np.median(ann_ms)), exact_ms)
            if slow:
                break
        recall = float(np.mean(found))
        settled = slow or recall >= RECALL_MIN or lookup.probed >= lookup.entries
        if settled or turn.out_of_time():
            break
    return {
        "probed": lookup.probed,
        "recall": round(recall, 4),
        "recall_k": RECALL_K,
        "queries": len(found),
        "ann_ms": round(float(np.median(ann_ms)), 3),
        "exact_ms": round(exact_ms, 3),
    }, settled


def _pays(ann_ms: float, exact_ms: float) -> bool:
    return ann_ms < exact_ms


def _timed(ask: Callable[[], Answer]) -> tuple[Answer, float]:
    """What it answers, and in how many milliseconds."""
    start_s = time.perf_counter()
    answer = ask()
    return answer, 1000 * (time.perf_counter() - start_s)
