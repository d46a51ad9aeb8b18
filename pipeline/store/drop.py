"""Drops what a check found broken, so that the next run embeds exactly that again.

One transaction takes broken vectors and files out of the manifest and turns their inputs to "rebuild". Broken files
stay on the disk while a kept generation names them: readers that hold one open are not disturbed, and a kill at any
instant leaves either the old manifest or the new one. Whoever calls this holds the writer's lock.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from pipeline.store.ann import FOLDER
from pipeline.store.check import PLACED, Broken
from pipeline.store.manifest import bump_state, forget_basis, transaction
from pipeline.store.publish import shown_generation, sweep, switch


def drop_broken(out: Path, db: sqlite3.Connection, broken: Broken) -> list[tuple[str, str, str, str]]:
    """Forget it, durably, and put the links right. Returns the sources that have pictures to embed again: kind, root,
    options in JSON, and the name of the space they are indexed in."""
    for name in broken.lists:  # first, so that no later publish takes it for sound; readers have it mapped
        if name.startswith(f"{FOLDER}/"):
            (out / name).unlink(missing_ok=True)
    with transaction(db):
        db.execute("CREATE TEMP TABLE broken_row(shard INTEGER, row INTEGER, PRIMARY KEY(shard, row)) WITHOUT ROWID")
        db.executemany("INSERT INTO broken_row VALUES (?, ?)", sorted(broken.rows))
        db.executemany("DELETE FROM shard WHERE id = ?", [(number,) for number in sorted(broken.shards)])
        db.executemany("DELETE FROM vector WHERE content_hash = ? AND space = ?", sorted(broken.contents))
        gone = db.execute(  # vectors of the files that have just gone are placed nowhere
            f"DELETE FROM vector WHERE NOT ({PLACED}) "
            "OR EXISTS(SELECT 1 FROM broken_row b WHERE b.shard = vector.shard AND b.row = vector.row)"
        ).rowcount
        db.execute("DROP TABLE broken_row")
        lost = db.execute(
            "UPDATE input SET status = 'rebuild' WHERE status = 'embedded' AND NOT EXISTS("
            "SELECT 1 FROM vector v WHERE v.content_hash = input.content_hash "
            "AND v.space = (SELECT space FROM source WHERE source.id = input.scope))"
        ).rowcount
        if gone or lost or broken.contents or broken.republish:
            bump_state(db)
            forget_basis(db)  # what is wrong may be in the last generation: nothing of it is taken over
    newest = db.execute("SELECT max(number) FROM generation").fetchone()[0]
    if newest is not None:
        switch(db, out, newest)
    return db.execute(
        "SELECT kind, root, options, space.name FROM source JOIN space ON space.id = source.space WHERE EXISTS("
        "SELECT 1 FROM input i WHERE i.scope = source.id AND i.status = 'rebuild') ORDER BY source.id"
    ).fetchall()


def drop_generations(out: Path, db: sqlite3.Connection, broken: Broken) -> None:
    """Forget broken generations that readers do not see any more, with the files that only they name."""
    shown, _ = shown_generation(db, out)
    with transaction(db):
        db.executemany(
            "DELETE FROM generation WHERE number = ?",
            [(number,) for number in sorted(broken.generations) if number != shown],
        )
    sweep(db, out)
