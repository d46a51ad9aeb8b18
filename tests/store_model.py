"""What the tests of the store share: a small coordinator, and pictures whose vector follows from their bytes.

Because a vector can be told from the content alone, `assert_shows` checks every row of an index against the pictures
that should be there, however it came about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from pipeline.batch import Item
from pipeline.store import Committed, Generation, Outcome, Scope, Store, Turn, content_hash, write_shard

DIM = 8
SPACE = "space-a"
PHOTOS = Scope("folder", "/photos")
BAD = b"bad"  # contents that start so are quarantined


def vector_of(content: bytes, space: str = SPACE) -> npt.NDArray[np.float16]:
    seed = int.from_bytes(hashlib.sha256(space.encode() + content).digest()[:8], "little")
    wide = np.random.default_rng(seed).standard_normal(DIM)
    return (wide / np.linalg.norm(wide)).astype(np.float16)


def item(key: str, content: bytes, **extra: Any) -> Item:
    """A listed picture; its mtime stands for its content, as it does on a disk where nobody cheats."""
    mtime = int.from_bytes(hashlib.sha256(content).digest()[:4], "little")
    return Item(key, b"at:" + key.encode(), len(content), **{"mtime_ns": mtime, **extra})


def embed(
    store: Store, pictures: Mapping[str, bytes], space: str = SPACE, chunk: int = 50, engine: str = ""
) -> list[Committed]:
    """What lanes and coordinator do together: read what is pending, compute what is new, commit chunk by chunk."""
    committed = []
    while todo := store.pending(chunk):
        contents = [pictures[entry.key] for entry in todo]
        known = store.has_vectors([content_hash(content) for content in contents])
        done: dict[bytes, Outcome] = {}
        outcomes = []
        for entry, content, has in zip(todo, contents, known, strict=True):
            digest = content_hash(content)
            if content.startswith(BAD):
                outcomes.append(Outcome(entry.id, "quarantined", digest, "corrupt", words="no such marker"))
            elif has or digest in done:
                outcomes.append(Outcome(entry.id, "copied", digest))
            else:
                done[digest] = Outcome(entry.id, "embedded", digest, mark="damaged" if b"torn" in content else "")
        shard = None
        if done:
            by_hash = {content_hash(content): content for content in contents}
            vectors = np.stack([vector_of(by_hash[digest], space) for digest in done])
            ids = np.array([outcome.id for outcome in done.values()], np.int64)
            shard = write_shard(store.shard_path(), vectors, ids, list(done), {"space": space, "engine": engine})
        committed.append(store.commit_chunk(shard, [*done.values(), *outcomes]))
    return committed


def run(
    out: Path,
    pictures: Mapping[str, bytes],
    *,
    scope: Scope = PHOTOS,
    space: str = SPACE,
    chunk: int = 50,
    metadata: Mapping[str, Mapping[str, Any]] | None = None,
    engine: str = "",
    turn: Turn | None = None,
) -> int:
    """One whole run; returns the number of the generation."""
    with Store.open(out, space, DIM) as store:
        store.begin_run(scope)
        listed = [item(key, content, metadata=(metadata or {}).get(key, {})) for key, content in pictures.items()]
        for start in range(0, len(listed), 1000):
            store.observe(listed[start : start + 1000])
        store.finish_listing()
        embed(store, pictures, space, chunk, engine)
        number = store.publish({"tower": "test"}, {}, turn=turn)
    assert number is not None, "another model's generation is shown"
    return number


def shown(out: Path) -> dict[str, npt.NDArray[np.float16]]:
    """Key -> vector, by our own reader."""
    with Generation.open(out) as generation:
        return by_key(generation)


def by_key(generation: Generation) -> dict[str, npt.NDArray[np.float16]]:
    found: dict[str, npt.NDArray[np.float16]] = {}
    rows = 0
    for block in generation.blocks():
        index_rows = block.index_rows
        live = np.flatnonzero(index_rows >= 0)
        assert len(live) == block.live
        rows += len(live)
        for key, position in zip(generation.keys(index_rows[live]), live, strict=True):
            assert key not in found, f"{key!r} is shown twice"
            found[key] = np.array(block.emb_nd[position])
    assert rows == generation.rows
    return found


def shown_by_h5py(path: Path) -> dict[str, npt.NDArray[np.float16]]:
    """Key -> vector, as any h5py user reads it."""
    with h5py.File(path) as file:
        assert file["embeddings"].dtype == np.dtype("<f2")
        return dict(zip(file["key"].asstr()[:], file["embeddings"][:], strict=True))


def assert_shows(out: Path, pictures: Mapping[str, bytes], space: str = SPACE) -> None:
    want = {key: vector_of(content, space) for key, content in pictures.items() if not content.startswith(BAD)}
    for got in (shown(out), shown_by_h5py(out / "index.h5")):
        assert got.keys() == want.keys()
        wrong = [key for key in want if not np.array_equal(got[key], want[key])]
        assert not wrong, f"{len(wrong)} keys show another vector, such as {wrong[0]!r}"


def some(count: int, start: int = 0) -> dict[str, bytes]:
    return {f"dir/{number:05d}.jpg": b"picture %d" % number for number in range(start, start + count)}
