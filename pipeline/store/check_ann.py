"""Lists against the generation that names them: every byte, every key, every row.

The files of all kept generations are looked at by size and digest. For the one that readers see it is also compared
what they say: keys of the generation lead to the rows that have them, a content is in two lists of a file, its codes
are those of its vector, and every live row is in a list or in the tail. A generation whose lists a repair has put aside
is searched exactly: there is nothing left to be wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.store.centroids import LISTS_EACH
from pipeline.store.check import Health, What, few
from pipeline.store.contents import key_order
from pipeline.store.files import StoreDamaged
from pipeline.store.generation import Distrusted, Generation
from pipeline.store.lists import Keys, ListFile, Lists, OwnFile, read_centroids, read_map
from pipeline.store.scan import Scan
from pipeline.store.shards import PIECE_ROWS

WHAT: What = "ann out of step"
# Between a vector and what its codes say. A picture that went and came back may have its vector from another engine and
# its codes from the first: three times the widest bar (int8, .25 of a spread of .7, as CLIP has) is .53 for one row,
# rounding to codes .02. Another picture is about 1 away.
APART_MAX = 0.55


def check_lists(out: Path, number: int, content: dict[str, Any], shown: bool, remedy: str, health: Health) -> None:
    """What is wrong goes to `health`; broken files are named, so that a repair makes them anew."""
    entry = content.get("ann")
    if entry is None or "lists" not in entry or Distrusted.read(out / "generations" / str(number)).files:
        return
    try:
        files = [ListFile.from_json(file).file for file in entry["lists"]]
        centroids, own = OwnFile(**entry["centroids"]), OwnFile(**entry["map"])
        whole = [_sound(out, number, one, remedy, health) for one in (centroids, *files)]
        if _sound(out, number, own, remedy, health) and all(whole) and shown:
            _compare(out, number, content, centroids, files, own, remedy, health)
    except StoreDamaged as error:
        _wrong(number, str(error.path.relative_to(out)), error.expected, error.found, remedy, health)
    except (KeyError, TypeError, ValueError, OSError) as error:
        where = f"generations/{number}/ann.npy"
        _wrong(number, where, "readable lists beside it", f"{type(error).__name__}: {error}", remedy, health)


def _sound(out: Path, number: int, own: OwnFile, remedy: str, health: Health) -> bool:
    """Is the file what was written? One that several generations name is told once, and counts for each."""
    path = out / own.name
    if own.name not in health.broken.lists:
        health.files += 1
        health.bytes += own.bytes
        try:
            own.check(path, digest=True)
            return True
        except StoreDamaged as error:
            health.broken.lists.add(own.name)
            health.add(WHAT, own.name, error.expected, error.found, remedy)
    health.broken.generations.add(number)
    return False


def _compare(
    out: Path, number: int, content: dict[str, Any], centroids: OwnFile, files: list[OwnFile], own: OwnFile,
    remedy: str, health: Health,
) -> None:  # fmt: skip
    keys_n, order = key_order(out / content["index"]["name"])
    map_2n = read_map(out / own.name, len(order))
    centroids_ld = read_centroids(out / centroids.name, content["dim"])
    all_lists = {file.name: Lists.open(out / file.name, centroids_ld.shape) for file in files}
    wanted = np.stack([keys_n[order], order.view(np.uint64)])
    if len(bad := np.flatnonzero((map_2n != wanted).any(axis=0))):
        examples = [f"row {wanted[1, at]}" for at in bad[:3].tolist()]
        _wrong(number, own.name, "the keys of index.h5 in its rows", few(len(bad), examples), remedy, health)
    covered = np.zeros(len(keys_n), np.bool_)
    for first, count in content["ann"]["tail"]:
        covered[first : first + count] = True
    for name, lists in all_lists.items():
        covered |= np.isin(keys_n, lists.keys)
        held, times = np.unique(lists.keys, return_counts=True)
        if len(odd := np.flatnonzero(times != min(LISTS_EACH, len(centroids_ld)))):
            found = few(len(odd), [f"key {held[at]:016x}" for at in odd[:3].tolist()])
            _wrong(number, name, f"each content in {LISTS_EACH} lists", found, remedy, health)
    if not (health.broken.shards or health.broken.rows):  # else it is not known which of the two is wrong
        _compare_vectors(out, number, centroids_ld.astype(np.float32), all_lists, wanted, remedy, health)
    if len(lost := np.flatnonzero(~covered)):
        found = few(len(lost), [f"row {row}" for row in lost[:3].tolist()])
        _wrong(number, own.name, "every live row in a list, or in the tail of generation.json", found, remedy, health)


def _compare_vectors(
    out: Path, number: int, centroids_ld: npt.NDArray[np.float32], all_lists: dict[str, Lists], map_2n: Keys,
    remedy: str, health: Health,
) -> None:  # fmt: skip
    """What a list says of a vector is near what the vector in the index gives."""
    with Generation.at(out, number) as generation:
        scan = Scan(list(generation.blocks()))
        for name, lists in all_lists.items():
            wrong, list_of = 0, lists.list_of
            for first in range(0, len(lists.keys), PIECE_ROWS):
                part = slice(first, first + PIECE_ROWS)
                at = np.minimum(np.searchsorted(map_2n[0], lists.keys[part]), map_2n.shape[1] - 1)
                live = map_2n[0][at] == lists.keys[part]
                wide_nd = scan.gather(map_2n[1][at[live]].astype(np.int64)).astype(np.float32)
                told_nd = lists.codes_nd[part][live] * lists.scales[part][live, None]
                told_nd += centroids_ld[list_of[part][live]]
                near = np.linalg.norm(told_nd - wide_nd, axis=1) <= APART_MAX  # this way round, so that NaN is wrong
                wrong += int(np.count_nonzero(~near))
            if wrong:
                _wrong(number, name, "the codes of the index's vectors", f"{wrong:,} others", remedy, health)
        scan.close()


def _wrong(number: int, where: str, expected: str, found: str, remedy: str, health: Health) -> None:
    """`where` is the file that is not to be used any more."""
    health.broken.generations.add(number)
    health.broken.lists.add(where)
    health.add(WHAT, where, expected, found, remedy)
