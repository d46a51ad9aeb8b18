"""Where files are: a local folder or any fsspec URL, behind one small interface.

A name is the raw bytes of a path below the place's root. `place_at` is the only spot where local and remote part:
local files go through the operating system on bytes (fsspec takes 2.5x the time per file and trips over names that
are no UTF-8), everything else through fsspec.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import BinaryIO, Protocol

import msgspec

from pipeline.sources import Damage, SourceError

MAX_READ_BYTES = 2 << 30  # no picture file is larger; a mistaken 40 GB file must not take the memory with it
_QUERY = re.compile(r"[?&]([\w.-]+)=")  # "?" alone is a wildcard
_SIGNATURE = re.compile(r"(://[^\s?'\"]*\?)[^\s'\"]+")
UNKNOWN = "unknown-"  # begins the etag of a file whose server tells neither etag nor date: equal to no other etag


class Found(msgspec.Struct, frozen=True, gc=False):
    name: bytes  # relative to the place's root
    size_bytes: int
    mtime_ns: int
    etag: str  # "" from a local walk: there size and mtime tell


class Place(Protocol):
    def walk(self, under: bytes = b"") -> Iterator[Found | Damage]:
        """Every regular file below, sorted by the raw bytes of its whole name."""

    def is_folder(self) -> bool:
        """Whether the root itself is a folder that is there."""

    def names_like(self, pattern: str) -> list[bytes]:
        """Sorted names of the files below that match the glob, or of the one file that is called so."""

    def find(self, name: bytes) -> Found:
        """One file, with an etag; raises OSError when it cannot be had."""

    def head(self, name: bytes, count: int) -> bytes | None:
        """The first bytes, or None where asking costs a request."""

    def open(self, name: bytes) -> BinaryIO: ...

    def read(self, name: bytes, size_bytes: int) -> bytes:
        """The whole file; raises BadImage."""

    def read_part(self, name: bytes, start: int, size_bytes: int, etag_digest: bytes) -> bytes:
        """A part of a file that has to be the one that was listed; raises BadImage."""

    def uri(self, name: bytes) -> str: ...


def is_url(root: str) -> bool:
    return "://" in root and not root.startswith("file://")


def canonical_root(root: str) -> str:
    """Absolute path or URL without a slash at its end. Links stay: a root may be a link that is moved on."""
    refuse_secrets(root)
    if is_url(root):
        return root.rstrip("/")
    path = os.path.abspath(os.path.expanduser(root.removeprefix("file://")))
    try:
        path.encode()
    except UnicodeEncodeError:
        raise SourceError(f"root {path!r} is not valid UTF-8; rename the folder or link to it") from None
    return path


def refuse_secrets(root: str) -> None:
    """A root is printed, logged and stored in every generation, which other people read: no password may be in it.

    Raises:
        SourceError: one is; not repeated.
    """
    if not is_url(root):
        return
    scheme, _, rest = root.partition("://")
    user, at, host = rest.partition("/")[0].rpartition("@")
    if ":" in user or (at and not user):
        raise SourceError(
            f"root {scheme}://***@{host}/... has a password in it, and a root is stored in the index; leave it out and "
            f"set FSSPEC_{scheme.upper()}_USERNAME and FSSPEC_{scheme.upper()}_PASSWORD, or what fsspec's {scheme} "
            "file system takes"
        )
    if query := _QUERY.search(rest):
        raise SourceError(
            f"root {scheme}://{host}/... has a query in it ({query[1]}=***), which may be a signature, and a root is "
            f"stored in the index; leave it out and give the access by the environment, such as FSSPEC_{scheme.upper()}"
        )


@lru_cache(maxsize=8)
def place_at(root: str) -> Place:
    """One per root and process; `root` is canonical."""
    if is_url(root):
        from pipeline.sources.place_remote import RemotePlace

        return RemotePlace(root)
    from pipeline.sources.place_local import LocalPlace

    return LocalPlace(root)


def same_file(one: Found, other: Found) -> bool:
    """Whether nothing tells two looks at a file apart. Where the server tells nothing, the size has to do."""
    if one.etag.startswith(UNKNOWN):
        return one.size_bytes == other.size_bytes
    return one.size_bytes == other.size_bytes and one.etag == other.etag


def digest_of(etag: str) -> bytes:
    """Eight hex digits that stand for an etag inside a locator."""
    return blake2b(etag.encode(), digest_size=4).hexdigest().encode()


def words_of(error: BaseException) -> str:
    """An error in one line, without a path in it: the key says which file.

    A server may send us on to an address that is signed: what stands behind its "?" is not for logs and pages.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _SIGNATURE.sub(r"\1***", f"{type(error).__name__}: {' '.join(str(error).split())}")
