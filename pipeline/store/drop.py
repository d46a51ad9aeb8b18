"""Drops what a check found broken, so that the next run embeds exactly that again.

One transaction takes broken vectors and files out of the manifest and turns their inputs to "rebuild". Broken files
stay on the disk while a kept generation names them: readers that hold one open are not disturbed, and a kill at any
instant leaves either the old manifest or the new one. A generation whose lists are broken is searched exactly from then
on (`generation.Distrusted`). Whoever calls this holds the writer's lock.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from pipeline.store.ann import last_entry
from pipeline.store.check import PLACED, Broken
from pipeline.store.generation import Distrusted
from pipeline.store.lists import key_of
from pipeline.store.manifest import bump_state, forget_basis, transaction
from pipeline.store.publish import folder, shown_generation, sweep, switch


def drop_broken(out: Path, db: sqlite3.Connection, broken: Broken) -> list[tuple[str, str, str, str]]:
    """Forget it, durably, and put the links right. Returns the sources that have pictures to embed again: kind, root,
    options in JSON, and the name of the space they are indexed in."""
    with transaction(db):
        db.execute("CREATE TEMP TABLE broken_row(shard INTEGER, row INTEGER, PRIMARY KEY(shard, row)) WITHOUT ROWID")
        db.executemany("INSERT INTO broken_row VALUES (?, ?)", sorted(broken.rows))
        db.executemany("DELETE FROM shard WHERE id = ?", [(number,) for number in sorted(broken.shards)])
        db.executemany("DELETE FROM vector WHERE content_hash = ? AND space = ?", sorted(broken.contents))
        gone = db.execute(  # vectors of the files that have just gone are placed nowhere
            f"DELETE FROM vector WHERE NOT ({PLACED}) "
            "OR EXISTS(SELECT 1 FROM broken_row b WHERE b.shard = vector.shard AND b.row = vector.row) "
            "RETURNING content_hash, space"
        ).fetchall()
        db.execute("DROP TABLE broken_row")
        lost = db.execute(
            "UPDATE input SET status = 'rebuild' WHERE status = 'embedded' AND NOT EXISTS("
            "SELECT 1 FROM vector v WHERE v.content_hash = input.content_hash "
            "AND v.space = (SELECT space FROM source WHERE source.id = input.scope))"
        ).rowcount
        if gone or lost or broken.contents or broken.republish:
            bump_state(db)
            forget_basis(db)  # what is wrong may be in the last generation: nothing of it is taken over
        # Before the commit: after a kill in between lists are made again that were sound, never the other way round.
        _distrust(out, db, broken.lists, {*broken.contents, *gone})
    newest = db.execute("SELECT max(number) FROM generation").fetchone()[0]
    if newest is not None:
        switch(db, out, newest)
    return db.execute(
        "SELECT kind, root, options, space.name FROM source JOIN space ON space.id = source.space WHERE EXISTS("
        "SELECT 1 FROM input i WHERE i.scope = source.id AND i.status = 'rebuild') ORDER BY source.id"
    ).fetchall()


def _distrust(out: Path, db: sqlite3.Connection, files: set[str], dropped: set[tuple[bytes, int]]) -> None:
    """Note beside each kept generation which of its files of lists are broken; beside the newest of each space, whose
    lists the next one takes over, which codes may be those of a broken vector."""
    newest = dict(db.execute("SELECT space, max(number) FROM generation GROUP BY space"))
    for (number,) in db.execute("SELECT number FROM generation").fetchall():
        home = folder(out, number)
        named = json.dumps(last_entry(home))
        before = Distrusted.read(home)
        wrong = {name for name in files if f'"{name}"' in named}
        keys = {key_of(content) for content, where in dropped if number == newest.get(where) and named != "null"}
        now = Distrusted(sorted({*before.files, *wrong}), sorted({*before.keys, *keys}))
        if now != before:
            now.write(home)


def drop_generations(out: Path, db: sqlite3.Connection, broken: Broken) -> None:
    """Forget broken generations that readers do not see any more, with the files that only they name."""
    shown, _ = shown_generation(db, out)
    with transaction(db):
        db.executemany(
            "DELETE FROM generation WHERE number = ?",
            [(number,) for number in sorted(broken.generations) if number != shown],
        )
    sweep(db, out)
