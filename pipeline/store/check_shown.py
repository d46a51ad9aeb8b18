"""What readers see against the manifest and the data files: links, kept generations, every row of index.h5.

A run that was killed leaves generations behind the manifest. That is no damage: the next run makes them level.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt

from pipeline.store.ann import names_of
from pipeline.store.check import Contents, Health, Prints, among, few, look_at, prints, read_shards
from pipeline.store.check_ann import check_lists
from pipeline.store.files import GENERATION_SCHEMA, StoreDamaged, StoreError, digest_file
from pipeline.store.generation import Generation
from pipeline.store.manifest import LIVE, read_state
from pipeline.store.publish import pinned
from pipeline.store.shards import ShardInfo

Ids: TypeAlias = npt.NDArray[np.int64]
PIECE_ROWS = 65_536
AGAIN = "python -m pipeline.verify --repair publishes it again"
DROP = "python -m pipeline.verify --repair drops this old generation"
UNPIN = "Show another one, python -m pipeline.generations --show newest, and then python -m pipeline.verify --repair"


class ShownDamaged(StoreError):
    """Readers cannot open what they see."""


@dataclass(slots=True)
class Table:
    """Rows of index.h5 in the order of their ids, 25 bytes each."""

    ids: Ids
    prints: Prints
    keys: Ids  # Python's hash of each key: equal within one process
    seen: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Kept:
    """A generation by the manifest."""

    number: int
    space: int
    state: int
    files: frozenset[str]


def open_shown(out: Path) -> None:
    """Open what readers see, as they do: a few milliseconds, for no byte of it is read.

    Raises:
        ShownDamaged: with what helps.
    """
    try:
        Generation.open(out).close()
    except (StoreError, OSError, ValueError, KeyError, TypeError) as error:
        found = str(error)
        if isinstance(error, StoreDamaged):  # what helps comes below
            found = f"{error.path}: expected {error.expected}, found {error.found}"
        raise ShownDamaged(
            f"readers cannot open what they see: {found}. Run: python -m pipeline.verify --repair --out {out}"
        ) from error


def check_generations(out: Path, db: sqlite3.Connection, contents: Contents, health: Health) -> None:
    kept = [
        Kept(number, space, state, frozenset(json.loads(files)))
        for number, space, state, files in db.execute("SELECT * FROM generation ORDER BY number")
    ]
    shown = _check_links(out, db, [entry.number for entry in kept], health)
    shards, spaces = read_shards(db)
    infos = {shard.info.name: shard.info for shard in shards}
    bad = {shard.info.name for shard in shards if shard.number in health.broken.shards}
    table = None
    for entry in kept:
        is_shown = entry.number == shown
        remedy = UNPIN if entry.number == pinned(db) else AGAIN if is_shown else DROP
        content = _read_json(out, entry, spaces[entry.space], remedy, health)
        if content is None:
            continue
        _check_files(out, entry, content, infos, bad, remedy, health)
        check_lists(out, entry.number, content, is_shown, remedy, health)
        if not is_shown:
            continue
        try:
            found = _read_table(out, entry.number, content, bad, health)
        except (OSError, KeyError, ValueError) as error:
            health.broken.generations.add(entry.number)
            health.add("index out of step", content["index"]["name"], "a readable table", str(error), AGAIN)
            continue
        if entry.state == read_state(db):
            table = found
        elif not health.behind:
            health.behind = f"generation {shown} is older than the manifest"
        _check_inputs(db, contents, entry.space, table, content["index"]["name"], health)
    if shown is None:
        _check_inputs(db, contents, -1, None, "", health)
    health.generation = shown
    health.broken.republish |= not health.broken.generations.isdisjoint({shown, *(entry.number for entry in kept[-1:])})


def _check_links(out: Path, db: sqlite3.Connection, kept: Sequence[int], health: Health) -> int | None:
    """The number of the generation that readers see; None where there is none or the link leads nowhere."""
    current, index = out / "current", out / "index.h5"
    target = os.readlink(current) if current.is_symlink() else None
    if not kept:
        health.behind = "nothing was published yet"
        return None
    wanted = pinned(db) or kept[-1]
    # A run may be killed when it has written a generation and not yet shown it.
    before = next((number for number in reversed(kept) if number < wanted), None)
    by_name = {f"generations/{number}": number for number in kept}
    number = by_name.get(target) if target else None
    if target is None and len(kept) == 1 and not index.is_symlink():
        health.behind = f"generation {wanted} is written and not shown yet"
    elif number == before and number is not None:
        health.behind = f"generation {wanted} is written and {number} is shown"
    elif number != wanted:
        health.broken.republish = True
        found = "no link" if target is None else f"a link to {target}"
        health.add("wrong link", "current", f"a link to generations/{wanted}", found, AGAIN)
    if number is not None and not (index.is_symlink() and os.readlink(index) == "current/index.h5"):
        health.broken.republish = True
        found = f"a link to {os.readlink(index)}" if index.is_symlink() else "no link"
        health.add("wrong link", "index.h5", "a link to current/index.h5", found, AGAIN)
    return number


def _read_json(out: Path, entry: Kept, space: str, remedy: str, health: Health) -> dict[str, Any] | None:
    where = f"generations/{entry.number}/generation.json"
    try:
        content: dict[str, Any] = json.loads((out / where).read_text(encoding="utf-8"))
        named = {*(file["name"] for file in content["files"]), *names_of(content.get("ann"))}
        got = (content["schema"], content["number"], content["space"], named)
    except (OSError, ValueError, KeyError, TypeError) as error:
        health.broken.generations.add(entry.number)
        health.add("generation", where, "the JSON of a generation", f"{type(error).__name__}: {error}", remedy)
        return None
    wanted = (GENERATION_SCHEMA, entry.number, space, set(entry.files))
    if got[2] != space:
        health.broken.generations.add(entry.number)
        health.add("wrong space", where, f"vectors of {space}", f"vectors of {got[2]}", remedy)
    elif got != wanted:
        health.broken.generations.add(entry.number)
        health.add("generation", where, f"schema, number, space and files {wanted}", str(got), remedy)
    return content


def _check_files(
    out: Path, entry: Kept, content: dict[str, Any], infos: dict[str, ShardInfo], bad: set[str], remedy: str,
    health: Health,
) -> None:  # fmt: skip
    """Files that the manifest names are known by now; those that were folded since are looked at here."""
    for file in [*content["files"], content["index"]]:
        info = ShardInfo(**{name: value for name, value in file.items() if name != "runs"})
        where = f"generations/{entry.number}/generation.json"
        if info.name in bad:
            health.broken.generations.add(entry.number)
        elif info.name in infos:
            if info != infos[info.name]:
                health.broken.generations.add(entry.number)
                health.add("generation", where, f"{infos[info.name]}", f"{info}", remedy)
        elif problem := look_at(out / info.name, info).problem if file is not content["index"] else _own(out, info):
            bad.add(info.name)
            health.broken.generations.add(entry.number)
            health.add(problem[0], info.name, problem[1], problem[2], remedy)
            health.files += 1
        health.bytes += info.bytes if info.name not in infos else 0


def _own(out: Path, info: ShardInfo) -> Any:
    """index.h5 holds other data sets than a shard: its bytes alone are looked at."""
    path = out / info.name
    if not path.is_file():
        return "missing file", f"a file of {info.bytes:,} bytes", "no file"
    if (size := path.stat().st_size) != info.bytes:
        return "truncated file" if size < info.bytes else "damaged file", f"{info.bytes:,} bytes", f"{size:,} bytes"
    digest = digest_file(path)
    return None if digest == info.digest else ("damaged file", f"digest {info.digest}", f"digest {digest}")


def _read_table(out: Path, number: int, content: dict[str, Any], bad: set[str], health: Health) -> Table | None:
    """index.h5 of the shown generation, compared with its data files. None: it is not what was written."""
    name = content["index"]["name"]
    if name in bad:
        return None
    rows = content["rows"]
    table = Table(np.empty(rows, np.int64), np.empty(rows, np.uint64), np.empty(rows, np.int64), np.zeros(rows, bool))
    with h5py.File(out / name, "r", locking=False) as file:
        if len(file["id"]) != rows:
            raise ValueError(f"{len(file['id'])} rows, generation.json says {rows}")
        for first in range(0, rows, PIECE_ROWS):
            part = slice(first, min(first + PIECE_ROWS, rows))
            table.ids[part] = file["id"][part]
            table.prints[part] = prints(file["content_hash"][part].tobytes())
            table.keys[part] = np.fromiter(map(hash, file["key"][part]), np.int64, part.stop - part.start)
    at = 0
    for entry in content["files"]:
        runs = np.array(entry["runs"], np.int64).reshape(-1, 2)
        live = int(runs[:, 1].sum())
        if entry["name"] not in bad:
            with h5py.File(out / entry["name"], "r", locking=False) as file:
                stored = prints(file["content_hash"][:].tobytes())
            positions = np.concatenate([np.arange(start, start + count) for start, count in runs.tolist()])
            if wrong := (at + np.flatnonzero(stored[positions] != table.prints[at : at + live])).tolist():
                health.broken.generations.add(number)
                expected = f"the contents of {entry['name']} in rows {at} to {at + live - 1}"
                examples = [f"row {row} has another" for row in wrong[:3]]
                health.add("index out of step", name, expected, few(len(wrong), examples), AGAIN)
        at += live
    order = np.argsort(table.ids, kind="stable")
    table.ids, table.prints, table.keys = table.ids[order], table.prints[order], table.keys[order]
    if again := table.ids[1:][np.diff(table.ids) == 0].tolist():
        health.broken.generations.add(number)
        found = few(len(again), [f"id {number} again" for number in again[:3]])
        health.add("duplicate id", name, "every input once", found, AGAIN)
    return table


def _check_inputs(
    db: sqlite3.Connection, contents: Contents, shown_space: int, table: Table | None, name: str, health: Health
) -> None:
    """One walk over the inputs: which have no vector, which are not shown, or shown as something else."""
    space_of = dict(db.execute("SELECT id, space FROM source"))
    none = np.empty(0, np.uint64)
    lost: list[str] = []
    unnamed: list[str] = []
    wrong: list[str] = []
    count_lost = count_unnamed = count_wrong = 0
    cursor = db.execute(
        "SELECT i.id, i.scope, i.status = 'embedded', CAST(i.key AS BLOB), i.content_hash FROM input i "
        f"WHERE {LIVE} AND i.content_hash IS NOT NULL ORDER BY i.id"
    )
    while part := cursor.fetchmany(PIECE_ROWS):
        ids, scopes, embedded, keys, hashes = zip(*part, strict=True)
        found = prints(b"".join(hashes))
        space = np.array([space_of[scope] for scope in scopes])
        has_in = {one: among(found, contents.known.get(one, none)) for one in {shown_space, *space_of.values()}}
        has = np.select([space == one for one in has_in], list(has_in.values()))
        for row in np.flatnonzero(np.array(embedded, np.bool_) & ~has).tolist():
            key = keys[row].decode(errors="replace")
            place = contents.unnamed.get((int(space[row]), int(found[row])))
            if place:
                count_unnamed += 1
                unnamed.append(f"that of {key} in {place}")
            else:
                count_lost += 1
                lost.append(key)
        del lost[3:], unnamed[3:]
        if table is None:
            continue
        there = has_in[shown_space]
        number = np.array(ids, np.int64)
        at = np.minimum(np.searchsorted(table.ids, number), max(len(table.ids) - 1, 0))
        same = np.zeros(len(part), np.bool_)
        if len(table.ids):
            same_id = table.ids[at] == number
            table.seen[at[there & same_id]] = True
            same_key = table.keys[at] == np.fromiter(map(hash, keys), np.int64, len(keys))
            same = same_id & same_key & (table.prints[at] == found)
        health.inputs += int(np.count_nonzero(there))
        for row in np.flatnonzero(there & ~same).tolist():
            count_wrong += 1
            wrong.append(f"{keys[row].decode(errors='replace')} (id {ids[row]}) is missing or another")
        del wrong[3:]
    if count_lost:
        health.add("input without vector", "manifest.sqlite, table input", "a vector for every embedded input",
                   few(count_lost, lost))  # fmt: skip
    if count_unnamed:
        health.add("shard row without manifest row", "manifest.sqlite, table vector", "a row for every vector",
                   few(count_unnamed, unnamed))  # fmt: skip
    if count_wrong:
        health.broken.republish = True
        expected = "key, id and content of every embedded input"
        health.add("index out of step", name, expected, few(count_wrong, wrong), AGAIN)
    if table is not None and (more := table.ids[~table.seen].tolist()):
        health.broken.republish = True
        found_words = few(len(more), [f"id {number}" for number in more[:3]])
        health.add("index out of step", name, "nothing that the manifest does not show", found_words, AGAIN)
