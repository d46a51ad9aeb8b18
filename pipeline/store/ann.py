"""Keeps approximate search in step with the vectors: called by `publish` for every generation.

    small index                   no lists: exact search is as fast, and always right
    a few new rows                nothing is written; they are the generation's `tail`, which is searched exactly
    more                          they are sorted into the lists of near centroids, in a file of their own, with what is
                                  in files that are not much larger: so there are few, and a night writes little
    a file that is mostly dead    is written anew without its dead rows
    four times as many rows       new centroids, and all lists anew, once there is time for all of them
    no time left                  what is in no list stays in the tail until the next night, changed or not
    a repair                      files that were broken, or hold codes of a broken vector, are made anew

Files are immutable. They live as long as a kept generation names them. What is to be found is in `contents`, how files
are written in `list_files`, how much of them a search looks at is measured by `recall` on every publish.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.store import recall
from pipeline.store.centroids import LISTS_EACH, ListNumbers, sizes, train, two_lists
from pipeline.store.contents import Contents, pieces, write_map
from pipeline.store.files import StoreDamaged, digest_file, temporary
from pipeline.store.generation import Block, Distrusted, content_of
from pipeline.store.hdf5 import new_h5
from pipeline.store.list_files import FOLDER, Written, commit, new_rows, write_lists, written_before
from pipeline.store.lists import ListFile, Lists, Lookup, OwnFile, read_centroids, read_map
from pipeline.store.scan import Rows, Scan
from pipeline.store.shards import ShardInfo, Vectors, map_embeddings

log = logging.getLogger("nightjar")

VECTOR_BYTES_MIN = 64 << 20  # of live vectors. Below, exact search answers in some milliseconds
TAIL_BYTES_MAX = 4 << 20  # of vectors in no list: scoring them costs half a millisecond
FILE_BYTES = 2 << 30  # of codes in one file of lists: what a night copies at most beside what is new
OUTGROWN = 4  # times more or fewer rows than the centroids were made for
LIVE_MIN = 0.75  # of a file's entries
MERGE_RATIO = 2  # a file joins what is written if it has at most so many times its entries
ASSIGN_ROWS = 16_384  # between two looks at the clock: about a second at d = 512 and 4,000 lists
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
class Job:
    """What everything that is done for one generation needs to know."""

    out: Path
    number: int
    scan: Scan
    turn: Turn
    rng: np.random.Generator

    @property
    def few(self) -> int:
        """Rows that may stay outside of all lists."""
        return TAIL_BYTES_MAX // (2 * self.scan.dim)


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
            return _update(Job(out, number, scan, turn, np.random.default_rng(number)), draft, last)
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


def _update(job: Job, draft: Path, last: dict[str, Any] | None) -> dict[str, Any] | None:
    out, number, scan, turn = job.out, job.number, job.scan, job.turn
    path = draft / "ann.npy"
    write_map(draft / "index.h5", path)
    map_2n = read_map(path, scan.rows)
    centroids, files, contents = _sorted(job, Contents.of(map_2n), last)
    if centroids is None or not files:
        path.unlink()
        return None
    _tidy(out, number, {centroids.file.name, *(file.file.file.name for file in files)})
    tail = contents.tail_rows()
    lookup = Lookup(centroids.vectors_ld, [file.lists for file in files], map_2n, tail, scan, recall.PROBED)
    first = max(recall.PROBED, last["probed"]) if last and turn.out_of_time() else recall.PROBED
    count = len(contents)
    sample = contents.rows_of(job.rng.choice(count, min(recall.QUERIES, count), replace=False))
    measured, settled = recall.measure(lookup, scan, scan.gather(np.sort(sample)), first, turn.out_of_time)
    log.info(
        "ann: %s rows in %d files of %s lists, %s beside them; recall@%d %.3f with %s entries looked at, %.1f ms, "
        "exact %.1f ms", f"{count - contents.new:,}", len(files), f"{len(centroids.vectors_ld):,}", f"{len(tail):,}",
        recall.RECALL_K, measured["recall"], f"{measured['probed']:,}", measured["ann_ms"], measured["exact_ms"],
    )  # fmt: skip
    own_map = OwnFile(f"generations/{number}/{path.name}", path.stat().st_size, digest_file(path))
    return {
        "centroids": asdict(centroids.file),
        "centroids_rows": centroids.rows,
        "lists": [asdict(file.file) for file in files],
        "map": asdict(own_map),
        "tail": _runs(tail),
        "complete": settled and len(tail) <= job.few,
        **measured,
    }


def _sorted(
    job: Job, contents: Contents, last: dict[str, Any] | None
) -> tuple[Centroids | None, list[Written], Contents]:
    """The best lists that time allows, and which contents they cover: those of the last generation with what is new;
    where they are outgrown new ones, if these cover as much."""
    rows = len(contents)
    centroids, files = _usable(job, last, contents)
    fits = centroids is not None and centroids.rows / OUTGROWN <= rows <= centroids.rows * OUTGROWN
    if centroids is not None and (files or fits):
        files = _sort_in(job, centroids, files, contents)
    if fits or job.turn.out_of_time():
        return centroids, files, contents
    trained = _train(job, contents)
    anew = contents.uncovered()
    if not files or not job.turn.out_of_time():
        files_anew = _sort_in(job, trained, [], anew)
        if not files or anew.tail <= max(contents.tail, job.few):
            return trained, files_anew, anew
    return centroids, files, contents


def _tidy(out: Path, number: int, named: set[str]) -> None:
    """Delete what was written for this generation and is not taken: what new centroids have replaced, or could not."""
    for path in (out / FOLDER).glob(f"{number:06d}*.h5"):
        if f"{FOLDER}/{path.name}" not in named:
            path.unlink()


def _usable(
    job: Job, last: dict[str, Any] | None, contents: Contents
) -> tuple[Centroids | None, list[Written]]:
    """What the last generation has, is there and can be trusted; its contents are covered. The rest is made anew."""
    if last is None:
        return None, []
    out = job.out
    files: list[Written] = []
    try:
        own = OwnFile(**last["centroids"])
        own.check(out / own.name, digest=True)
        centroids = Centroids(own, last["centroids_rows"], read_centroids(out / own.name, job.scan.dim))
    except StoreDamaged as error:
        log.warning("all lists are made anew: %s", error)
        return None, []
    distrusted: Distrusted = last["distrusted"]
    dropped = np.array(distrusted.keys, np.uint64)
    for file in map(ListFile.from_json, last["lists"]):
        try:
            file.file.check(out / file.file.name, digest=False)
            lists = Lists.open(out / file.file.name, centroids.vectors_ld.shape)
        except StoreDamaged as error:
            log.warning("a file of lists is made anew: %s", error)
            continue
        harmed = any(np.isin(lists.keys[part], dropped).any() for part in pieces(len(lists.keys)))
        if harmed or file.file.name in distrusted.files:
            log.warning("a file of lists is made anew: %s was found broken, or vectors in it", file.file.name)
            continue
        is_live = contents.cover(lists.keys)
        if live := int(np.count_nonzero(is_live)):
            files.append(Written(file, lists, is_live, live))
    return centroids, files


def _runs(rows: Rows) -> list[list[int]]:
    """First row and count of each stretch of ascending rows."""
    if not len(rows):
        return []
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    counts = np.diff(starts, append=len(rows))
    return [[int(rows[start]), int(count)] for start, count in zip(starts, counts, strict=True)]


def _train(job: Job, contents: Contents) -> Centroids:
    start_s = time.monotonic()
    lists, size = sizes(len(contents))
    sample = contents.rows_of(job.rng.choice(len(contents), size, replace=False))
    vectors_ld = train(job.scan.gather(np.sort(sample)), lists, job.rng, job.turn.out_of_time)
    path = job.out / FOLDER / f"{job.number:06d}.h5"
    path.parent.mkdir(exist_ok=True)
    with new_h5(temporary(path)) as (file, check):
        file.create_dataset("centroids", data=vectors_ld)
        check()
    log.info("ann: %s centroids in %.0f s", f"{lists:,}", time.monotonic() - start_s)
    return Centroids(commit(path), len(contents), vectors_ld)


def _sort_in(job: Job, centroids: Centroids, files: list[Written], contents: Contents) -> list[Written]:
    """The files of lists after everything that time allows is in one; it is covered then."""
    scan, out_of_time, shape_ld = job.scan, job.turn.out_of_time, centroids.vectors_ld.shape
    few = contents.tail <= job.few
    most = FILE_BYTES // scan.dim
    joined, kept = _joined(files, 0 if few else LISTS_EACH * contents.new, most)
    if (few and not joined) or (files and out_of_time()):
        return files  # new centroids get their first rows whatever the time, or every night would train them in vain
    todo = contents.todo()
    total, start_s = len(todo), time.monotonic()
    last_line_s = start_s
    while joined or len(todo):
        room = (most - sum(file.live for file in joined)) // LISTS_EACH
        list_of: list[ListNumbers] = []
        rows = 0
        while rows < min(room, len(todo)) and not (rows and out_of_time()):
            part = todo[rows : min(rows + ASSIGN_ROWS, room)]
            list_of.append(two_lists(scan.gather(contents.rows[part].astype(np.int64)), centroids.vectors_ld))
            rows += len(part)
            if time.monotonic() - last_line_s > LINE_EVERY_S:
                last_line_s = time.monotonic()
                done = total - len(todo) + rows
                log.info("ann: %s of %s rows sorted in %.0f s", f"{done:,}", f"{total:,}", last_line_s - start_s)
        names = (f"{job.number:06d}-{made:06d}.h5" for made in itertools.count(1))
        path = next(path for name in names if not (path := job.out / FOLDER / name).exists())
        sources = [written_before(file) for file in joined]
        if rows:
            new, new_lists = todo[:rows], np.concatenate(list_of)
            row_of = contents.rows[new].astype(np.int64)
            sources.append(new_rows(scan, contents.keys[new], row_of, new_lists, centroids.vectors_ld))
            contents.covered[new] = True
        kept.append(write_lists(job.out, path, shape_ld, sources))
        todo, joined = todo[rows:], []
        if out_of_time():
            break
    if len(todo):
        log.info("ann: no time is left; %s rows are searched exactly until the next run", f"{len(todo):,}")
    return kept


def _joined(files: Sequence[Written], new: int, most: int) -> tuple[list[Written], list[Written]]:
    """Files that are written anew together with `new` entries, and those that stay. An entry is copied log n times
    before its file has as many as it may have (the merges of a log-structured store, O'Neil et al. 1996)."""
    joined: list[Written] = []
    entries = 0
    dead = [file for file in files if file.live < LIVE_MIN * file.file.entries]
    near = [file for file in files if file not in dead] if new else []
    for file in [*dead, *sorted(near, key=lambda file: file.live)]:
        fits = entries + file.live <= most - min(new, most)
        if fits and (file in dead or file.live <= MERGE_RATIO * (entries + new)):
            joined.append(file)
            entries += file.live
    return joined, [file for file in files if file not in joined]
