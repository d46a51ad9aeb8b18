"""Which cores this process may use, in the order of what they share, and how to divide them between lanes.

A lane that is bound to cores of its own keeps its threads, its weights and its batches in their caches and in the
memory beside them. Cores are whole: the hardware threads of one always belong to the same lane.
"""

from __future__ import annotations

import os
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

CPUS = Path("/sys/devices/system/cpu")


class Core(NamedTuple):
    """Sorts by distance: neighbours in a sorted list share most."""

    node: int  # of memory (NUMA)
    cache: int  # of the last level
    package: int
    number: int  # within the package
    cpus: tuple[int, ...]  # hardware threads that this process may use


def usable_cores(cpus: Path = CPUS) -> list[Core]:
    """Sorted; a host that does not tell its topology is one cache and one memory of single-threaded cores."""
    found: dict[tuple[int, int, int, int], list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        home = cpus / f"cpu{cpu}"
        node = next((int(path.name[4:]) for path in home.glob("node[0-9]*")), 0)
        cache = _number(home / "cache" / "index3" / "id", 0)
        package = _number(home / "topology" / "physical_package_id", 0)
        found.setdefault((node, cache, package, _number(home / "topology" / "core_id", cpu)), []).append(cpu)
    return sorted(Core(*place, tuple(threads)) for place, threads in found.items())


def nodes(cores: list[Core]) -> int:
    """Memories that these cores have beside them."""
    return len({core.node for core in cores})


def divide(cores: list[Core], lanes: int) -> list[list[Core]]:
    """The cores of each lane; no two lanes share one, and no lane spans two memories where that can be had.

    With more lanes than cores nobody is bound: none for each.
    """
    if lanes > len(cores):
        return [[]] * lanes
    per_node = [list(group) for _, group in groupby(cores, key=lambda core: core.node)]
    parts = per_node if lanes % len(per_node) == 0 and lanes // len(per_node) <= min(map(len, per_node)) else [cores]
    each = lanes // len(parts)
    return [part[first:last] for part in parts for first, last in shares(len(part), each)]


def shares(number: int, parts: int) -> list[tuple[int, int]]:
    """Where each of `parts` begins and ends when `number` is divided as evenly as whole ones go."""
    ends = [number * part // parts for part in range(parts + 1)]
    return list(pairwise(ends))


def _number(path: Path, otherwise: int) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not told here
        return otherwise
