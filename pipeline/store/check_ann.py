"""Graphs against the generation that names them: every byte, every key, every row.

The files of all kept generations are looked at by size and digest. For the one that readers see it is also compared
what they say: a graph holds the keys that lie beside it, keys of the generation lead to the rows that have them, and
every live row is in a graph or in the tail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pipeline.store.check import Health, What, few
from pipeline.store.files import DIGEST_BYTES, StoreDamaged
from pipeline.store.graphs import GraphFile, OwnFile, content_keys, view_graph

WHAT: What = "ann out of step"


def check_graphs(out: Path, number: int, content: dict[str, Any], shown: bool, remedy: str, health: Health) -> None:
    """What is wrong goes to `health`; broken graphs are named, so that a repair builds them anew."""
    entry = content.get("ann")
    if entry is None:
        return
    try:
        files = [GraphFile.from_json(file) for file in entry["graphs"]]
        own = OwnFile(**entry["map"])
        whole = [_sound(out, number, one, remedy, health) for file in files for one in (file.graph, file.keys)]
        if _sound(out, number, own, remedy, health) and all(whole) and shown:
            _compare(out, number, content, files, own, remedy, health)
    except (KeyError, TypeError, ValueError, OSError, StoreDamaged) as error:
        _wrong(number, f"generations/{number}", "readable graphs", f"{type(error).__name__}: {error}", remedy, health)


def _sound(out: Path, number: int, own: OwnFile, remedy: str, health: Health) -> bool:
    """Is the file what was written? One that several generations name is told once, and counts for each."""
    path = out / own.name
    if own.name not in health.broken.graphs:
        health.files += 1
        health.bytes += own.bytes
        try:
            own.check(path, digest=True)
            return True
        except StoreDamaged as error:
            health.broken.graphs.add(own.name)
            health.add(WHAT, own.name, error.expected, error.found, remedy)
    health.broken.generations.add(number)
    return False


def _compare(
    out: Path, number: int, content: dict[str, Any], files: list[GraphFile], own: OwnFile, remedy: str, health: Health
) -> None:
    with h5py.File(out / content["index"]["name"], "r", locking=False) as file:
        keys_n = content_keys(file["content_hash"][:].reshape(-1, DIGEST_BYTES))
    order = np.argsort(keys_n, kind="stable")
    map_2n = np.load(out / own.name, mmap_mode="r")
    wanted = np.stack([keys_n[order], order.astype(np.uint64)])
    if map_2n.shape != wanted.shape:
        _wrong(number, own.name, f"keys of {len(keys_n):,} rows", f"{map_2n.shape[-1]:,}", remedy, health)
    elif len(bad := np.flatnonzero((map_2n != wanted).any(axis=0))):
        examples = [f"row {wanted[1, at]}" for at in bad[:3].tolist()]
        _wrong(number, own.name, "the keys of index.h5 in its rows", few(len(bad), examples), remedy, health)
    covered = np.zeros(len(keys_n), np.bool_)
    for first, count in content["ann"]["tail"]:
        covered[first : first + count] = True
    for graph in files:
        listed = np.fromfile(out / graph.keys.name, "<u8")
        held = np.sort(np.asarray(view_graph(out / graph.graph.name, keys=True).keys))
        if not np.array_equal(listed, held):
            health.broken.graphs.add(graph.graph.name)
            words = f"{len(np.setxor1d(listed, held)):,} are in one of them alone"
            _wrong(number, graph.graph.name, f"the {len(listed):,} keys of {graph.keys.name}", words, remedy, health)
        covered |= np.isin(keys_n, listed)
    if len(lost := np.flatnonzero(~covered)):
        found = few(len(lost), [f"row {row}" for row in lost[:3].tolist()])
        where = f"generations/{number}/generation.json"
        _wrong(number, where, "every live row in a graph or in the tail", found, remedy, health)


def _wrong(number: int, where: str, expected: str, found: str, remedy: str, health: Health) -> None:
    health.broken.generations.add(number)
    health.add(WHAT, where, expected, found, remedy)
