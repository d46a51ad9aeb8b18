"""Durable files and the errors of the store: what is written here survives a power cut, or never existed.

Write order everywhere: temporary name, flush, fsync file, rename, fsync folder. An fsync costs about 1 ms on an SSD, so
files are few and large; nothing here is called per picture.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from blake3 import blake3

DIGEST_BYTES = 16  # BLAKE3, 128 bits: no two of 1e15 files collide by chance
GENERATION_SCHEMA = 1  # of generation.json, written by `publish` and read by `generation`
READ_BYTES = 1 << 20
TEMPORARY = ".tmp"  # suffix of a file that does not exist yet


class StoreError(Exception):
    """The store cannot do what was asked; the message says why and what helps."""


class Locked(StoreError):
    """Another process writes to this index."""


class NoIndex(StoreError):
    """Nothing was published here yet."""


class StoreDamaged(StoreError):
    """A file is not what the manifest or the generation says. Never answered with zeros or NaN."""

    def __init__(self, path: Path, expected: str, found: str, remedy: str) -> None:
        super().__init__(f"{path}: expected {expected}, found {found}. {remedy}")
        self.path, self.expected, self.found = path, expected, found


def digest_file(path: Path) -> str:
    # Plain reads, not a mapping: mapped pages would count as memory of this process.
    hasher = blake3()
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest(length=DIGEST_BYTES)


def content_hash(encoded: bytes) -> bytes:
    return blake3(encoded).digest(length=DIGEST_BYTES)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary(path: Path) -> Path:
    return path.with_name(path.name + TEMPORARY)


def commit_file(path: Path) -> None:
    """Give `temporary(path)` its name, durably."""
    sync(temporary(path))
    temporary(path).replace(path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    temporary(path).write_text(text, encoding="utf-8")
    commit_file(path)


def point_link(link: Path, target: str) -> None:
    """Make `link` point at `target` in one step: a reader sees the old one or the new one."""
    temporary(link).unlink(missing_ok=True)
    temporary(link).symlink_to(target)
    temporary(link).replace(link)
    sync(link.parent)


def take_lock(path: Path) -> int:
    """An exclusive flock; it ends with the process, so it cannot go stale. Returns the descriptor that holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Locked(
            f"another run writes to {path.parent} (it holds {path.name}); wait for it to end, "
            "or index into another folder with --out"
        ) from None
    return fd
