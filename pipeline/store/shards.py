"""Shards: immutable HDF5 files of vectors that can also be memory-mapped.

    /embeddings    (n, d) float16, unit norm
    /id            (n,) int64, ids of the manifest
    /content_hash  (n, 16) uint8, BLAKE3-128 of the picture's bytes

All three are contiguous, unfiltered and little-endian, so /embeddings is one byte range: `map_embeddings` maps it
without HDF5. No compression on purpose: float16 unit vectors shrink by about 7 % and would cost the mapping.
Attributes: `space`, and `engine`, the identity of what made the vectors, so that a check may demand the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.store.files import DIGEST_BYTES, StoreDamaged, commit_file, digest_file, temporary
from pipeline.store.hdf5 import new_h5

F16: TypeAlias = np.dtype[np.float16]
Vectors: TypeAlias = npt.NDArray[np.float16]

NORM_TOLERANCE = 0.01  # float16 rounding moves a norm by at most 0.001; more is a bug of the engine
PIECE_ROWS = 8192  # rows copied at once: 8 MB at d = 512


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What the manifest and a generation remember of a data file."""

    name: str  # relative to the index folder
    rows: int
    dim: int
    bytes: int
    digest: str  # BLAKE3-128 of the whole file, hex
    offset: int  # of /embeddings in the file
    engine: str = ""  # `EngineCard.identity` of what made all its vectors; several, with commas between; "" unknown


Piece: TypeAlias = tuple[Vectors, npt.NDArray[np.int64], npt.NDArray[np.uint8]]  # vectors, ids, content hashes


def write_shard(
    path: Path,
    emb_nd: Vectors,
    ids: npt.NDArray[np.int64],
    content_hashes: Sequence[bytes],
    attrs: Mapping[str, Any],
) -> ShardInfo:
    """Write one chunk's vectors, durably. A chunk without a vector has no file."""
    if emb_nd.ndim != 2 or not len(emb_nd):
        raise ValueError(f"emb_nd has shape {emb_nd.shape}, expected (n >= 1, d); an empty chunk writes no shard")
    rows, dim = emb_nd.shape
    return write_pieces(path, rows, dim, [(emb_nd, ids, hash_rows(content_hashes))], attrs)


def write_pieces(path: Path, rows: int, dim: int, pieces: Iterable[Piece], attrs: Mapping[str, Any]) -> ShardInfo:
    """The file gets its name only when every row has come; an error leaves nothing."""
    draft = temporary(path)
    try:
        with new_h5(draft) as (file, check):
            file.attrs.update(attrs)
            embeddings = file.create_dataset("embeddings", (rows, dim), "<f2")
            row_ids = file.create_dataset("id", (rows,), "<i8")
            row_hashes = file.create_dataset("content_hash", (rows, DIGEST_BYTES), "u1")
            at = 0
            for emb_nd, ids, hashes in pieces:
                check_vectors(emb_nd, dim)
                if not len(emb_nd) == len(ids) == len(hashes):
                    raise ValueError(f"{len(emb_nd)} vectors, {len(ids)} ids, {len(hashes)} hashes; they must match")
                part = slice(at, at + len(emb_nd))
                embeddings[part], row_ids[part], row_hashes[part] = emb_nd, ids, hashes
                at = part.stop
                check()
            assert at == rows, f"{path.name} was planned for {rows} rows, {at} came"
            offset = embeddings.id.get_offset()
        name, size, engine = f"{path.parent.name}/{path.name}", draft.stat().st_size, str(attrs.get("engine", ""))
        info = ShardInfo(name, rows, dim, size, digest_file(draft), offset, engine)
        commit_file(path)
    except BaseException:
        with suppress(OSError):  # the disk that failed may refuse this too: the sweep of the next run takes it
            draft.unlink(missing_ok=True)
        raise
    return info


def hash_rows(content_hashes: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    if wrong := {*map(len, content_hashes)} - {DIGEST_BYTES}:
        raise ValueError(f"a content hash has {wrong.pop()} bytes, expected {DIGEST_BYTES} (BLAKE3-128)")
    return np.frombuffer(b"".join(content_hashes), np.uint8).reshape(-1, DIGEST_BYTES)


def check_vectors(emb_nd: Vectors, dim: int) -> None:
    """The public contract, checked once where vectors enter: float16, (n, dim), finite, unit norm."""
    if emb_nd.dtype != np.float16 or emb_nd.ndim != 2 or emb_nd.shape[1] != dim:
        raise ValueError(f"vectors are {emb_nd.dtype} {emb_nd.shape}, expected float16 (n, {dim})")
    wide = emb_nd.astype(np.float32)
    off = np.abs(np.sqrt(np.einsum("nd,nd->n", wide, wide)) - 1)
    bad = np.flatnonzero(~(off <= NORM_TOLERANCE))  # the negation also catches NaN
    if len(bad):
        norm = float(np.linalg.norm(wide[bad[0]]))
        raise ValueError(
            f"row {bad[0]} has norm {norm:.4f} ({len(bad)} of {len(emb_nd)} rows are off), expected 1 within "
            f"{NORM_TOLERANCE}; the engine must normalise its vectors"
        )


def check_file(path: Path, info: ShardInfo, digest: bool) -> None:
    """A data file must be what it was when it was written: there, of the same size and, if asked, the same bytes."""
    remedy = (
        "python -m pipeline.verify --repair makes it again, from the pictures where they are needed; without them "
        "restore it from a backup"
    )
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise StoreDamaged(path, f"a file of {info.bytes} bytes", "no file", remedy) from None
    if size != info.bytes:
        raise StoreDamaged(path, f"{info.bytes} bytes", f"{size} bytes", remedy)
    if digest and (found := digest_file(path)) != info.digest:
        raise StoreDamaged(path, f"digest {info.digest}", f"digest {found}", remedy)


def map_embeddings(path: Path, info: ShardInfo, digest: bool = False) -> np.memmap[Any, F16]:
    """The vectors of a data file as a read-only mapping; it stays valid after the file is unlinked."""
    check_file(path, info, digest)
    return np.memmap(path, np.dtype("<f2"), "r", info.offset, (info.rows, info.dim))
