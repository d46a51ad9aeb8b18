"""Files behind any fsspec URL (s3://, gs://, http://, memory://, ...), folder by folder, so memory stays bounded.

One request per folder when listing, one per picture when reading. What tells that a file changed is its etag, or its
date where the server gives no etag. Where it gives neither, the file gets a new etag every time: it is read again
every run, which is slow and said in the log, but misses no change.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from pipeline.batch import BadImage
from pipeline.sources import Damage, SourceError
from pipeline.sources.keys import encode_key
from pipeline.sources.places import MAX_READ_BYTES, UNKNOWN, Found, words_of

log = logging.getLogger(__name__)

# What file systems call it, the surest first.
_EVIDENCE = (
    "ETag",
    "etag",
    "md5Hash",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "updated",
    "mtime",
    "modified",
    "created",
)


class RemotePlace:
    def __init__(self, root: str) -> None:
        import fsspec

        try:
            # The listings cache would keep every folder in memory and show a long-lived process yesterday's files.
            self._fs, path = fsspec.core.url_to_fs(root, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise SourceError(f"root {root!r} cannot be opened: {error}") from error
        self._base = path.rstrip("/")
        self._root = root

    def _path(self, name: bytes) -> str:
        return f"{self._base}/{name.decode(errors='surrogateescape')}".rstrip("/")

    def uri(self, name: bytes) -> str:
        return f"{self._root}/{encode_key(name)}"

    def is_folder(self) -> bool:
        return bool(self._fs.isdir(self._base))

    def names_like(self, pattern: str) -> list[bytes]:
        path = f"{self._base}/{pattern}"
        paths = [path] if self._fs.isfile(path) else self._fs.glob(path)
        return sorted(self._name(path) for path in paths)

    def find(self, name: bytes) -> Found:
        return self._found(name, self._fs.info(self._path(name)))

    def walk(self, under: bytes = b"") -> Iterator[Found | Damage]:
        without_evidence = 0
        open_folders = [iter(self._entries(under))]
        while open_folders:
            entry = next(open_folders[-1], None)
            if entry is None:
                open_folders.pop()
            elif isinstance(entry, Damage):
                yield entry
            elif entry[0].endswith(b"/"):
                if not entry[0].rpartition(b"/")[0].rpartition(b"/")[2].startswith(b"."):
                    open_folders.append(iter(self._entries(entry[0][:-1])))
            else:
                found = self._found_or_damage(*entry)
                without_evidence += isinstance(found, Found) and found.etag.startswith(UNKNOWN)
                yield found
        if without_evidence:
            log.warning(
                "%s: the server tells neither etag nor date of %d files, so each run reads them again",
                self._root,
                without_evidence,
            )

    def _entries(self, folder: bytes) -> list[tuple[bytes, dict[str, Any]] | Damage]:
        """Sorted, folders with a slash at their end: then the names of the whole walk come out sorted too."""
        path = self._path(folder)
        try:
            listed = self._fs.ls(path, detail=True)
        except Exception as error:  # each file system has its own types: botocore, aiohttp, paramiko
            log.debug("folder %s cannot be listed", path, exc_info=True)
            return [Damage(encode_key(folder + b"/" if folder else b""), words_of(error))]
        entries: list[tuple[bytes, dict[str, Any]]] = []
        for info in listed:
            name = self._name(info["name"].rstrip("/"))
            if name != folder:  # an object store may list a folder's own marker
                entries.append((name + b"/" if info["type"] == "directory" else name, info))
        return [*sorted(entries, key=lambda entry: entry[0])]

    def _found_or_damage(self, name: bytes, info: dict[str, Any]) -> Found | Damage:
        if info.get("size") is not None:
            return self._found(name, info)
        try:
            return self.find(name)  # a web server's folder page tells no sizes: one more request per file
        except Exception as error:  # see _entries
            log.debug("%s cannot be looked up", self._path(name), exc_info=True)
            return Damage(encode_key(name), words_of(error))

    def _found(self, name: bytes, info: dict[str, Any]) -> Found:
        evidence = next((str(info[field]) for field in _EVIDENCE if info.get(field)), None)
        return Found(name, info.get("size") or 0, 0, evidence or f"{UNKNOWN}{time.time_ns()}")

    def _name(self, path: str) -> bytes:
        return path.removeprefix(self._base).lstrip("/").encode(errors="surrogateescape")

    def head(self, name: bytes, count: int) -> bytes | None:
        return None

    def open(self, name: bytes) -> BinaryIO:
        return cast(BinaryIO, self._fs.open(self._path(name), "rb"))

    def read(self, name: bytes, size_bytes: int) -> bytes:
        if size_bytes > MAX_READ_BYTES:
            raise BadImage("too_large", f"{size_bytes} bytes; at most {MAX_READ_BYTES} are read")
        try:
            encoded: bytes = self._fs.cat_file(self._path(name))
        except Exception as error:  # see _entries
            raise BadImage("read_error", words_of(error)) from error
        if size_bytes and len(encoded) != size_bytes:  # 0: the server did not tell a size
            raise BadImage("read_error", f"{len(encoded)} bytes came, {size_bytes} were listed")
        return encoded

    def read_part(self, name: bytes, start: int, size_bytes: int, etag_digest: bytes) -> bytes:
        """Trusts that the file is the one that was listed: asking again would double the requests."""
        if size_bytes > MAX_READ_BYTES:
            raise BadImage("too_large", f"{size_bytes} bytes; at most {MAX_READ_BYTES} are read")
        try:
            encoded: bytes = self._fs.cat_file(self._path(name), start=start, end=start + size_bytes)
        except Exception as error:  # see _entries
            raise BadImage("read_error", words_of(error)) from error
        if len(encoded) != size_bytes:
            raise BadImage("read_error", f"{len(encoded)} of {size_bytes} bytes came")
        return encoded
