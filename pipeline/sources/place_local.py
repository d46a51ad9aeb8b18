"""Local files, through the operating system on bytes paths: any name works, and a walk makes no object per file.

The folder source lists 125,000 files per second of CPU time from a warm cache, half of it in the system's `stat`.
A walk holds the names of the folders it is in, nothing else: about 100 bytes for each name of the largest one.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

from pipeline.batch import BadImage
from pipeline.sources import Damage
from pipeline.sources.keys import encode_key
from pipeline.sources.places import MAX_READ_BYTES, Found, digest_of, words_of

log = logging.getLogger(__name__)

INDEX = (b"manifest.sqlite", b"generations/")  # what a folder holds that is an index of ours

# Never waits: a pipe that took a picture's name is opened at once, and its status tells what it is.
_READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class LocalPlace:
    def __init__(self, root: str) -> None:
        self._root = os.fsencode(root)

    def _path(self, name: bytes) -> bytes:
        return self._root + b"/" + name

    def uri(self, name: bytes) -> str:
        return f"{os.fsdecode(self._root)}/{encode_key(name)}"

    def is_folder(self) -> bool:
        return os.path.isdir(self._root)

    def names_like(self, pattern: str) -> list[bytes]:
        if os.path.isfile(self._path(os.fsencode(pattern))):
            return [os.fsencode(pattern)]
        return sorted(glob.glob(os.fsencode(pattern), root_dir=self._root, recursive=True))

    def find(self, name: bytes) -> Found:
        status = os.stat(self._path(name))
        return Found(name, status.st_size, status.st_mtime_ns, _etag(status))

    def walk(self, under: bytes = b"") -> Iterator[Found | Damage]:
        """Follows links; a link back to a folder we are in is left out, as `find -L` does, so the walk ends.

        Hidden folders (version control, caches, waste bins) and indexes are left out. A link that leads nowhere is
        listed, with size 0: it is a picture somebody expects, and reading it says what is wrong.
        """
        hidden = odd = 0
        open_folders: list[_OpenFolder] = []
        entering: bytes | None = under + b"/" if under else b""
        while entering is not None or open_folders:
            prefix = entering if entering is not None else open_folders[-1].prefix
            try:
                # Not kept open while in a folder further down: a deep tree would run out of descriptors.
                with _descriptor(self._path(prefix), os.O_DIRECTORY) as folder:
                    if entering is not None:
                        entering = None
                        names = _names_in(self._path(prefix))
                        if all(name in names for name in INDEX):
                            log.info("%s is left out: it is an index, not pictures", self.uri(prefix))
                            continue
                        opened = _OpenFolder(prefix, iter(names), _identity(folder))
                        if any(opened.identity == above.identity for above in open_folders):
                            odd += 1
                            continue
                        open_folders.append(opened)
                    for name in open_folders[-1].names:
                        if name.endswith(b"/"):
                            if not name.startswith(b"."):
                                entering = prefix + name
                                break
                            hidden += 1
                        elif (found := _look_at(folder, prefix, name)) is not None:
                            yield found
                        else:
                            odd += 1
                    else:
                        open_folders.pop()
            except OSError as error:
                yield _unreadable(prefix, error)
                entering = None
                if open_folders and open_folders[-1].prefix == prefix:
                    open_folders.pop()
        left_out = ((hidden, "hidden folders"), (odd, "pipes, sockets, devices or links back up"))
        if told := [f"{count} {what}" for count, what in left_out if count]:
            log.info("%s: left out %s", self.uri(under), " and ".join(told))

    def head(self, name: bytes, count: int) -> bytes | None:
        try:
            with _descriptor(self._path(name)) as file:
                _status_of_file(file)
                return os.read(file, count)
        except (OSError, BadImage):
            return None

    def open(self, name: bytes) -> BinaryIO:
        return open(self._path(name), "rb")

    def read(self, name: bytes, size_bytes: int) -> bytes:
        # Called once per picture: five system calls of about 2 us each, and no context manager of another 2.
        try:
            file = os.open(self._root + b"/" + name, _READ_FLAGS)
            try:
                before = _status_of_file(file)
                if before.st_size > MAX_READ_BYTES:
                    raise BadImage("too_large", f"{before.st_size} bytes; at most {MAX_READ_BYTES} are read")
                encoded = _read_at(file, 0, before.st_size + 1)
                after = os.fstat(file)
            finally:
                os.close(file)
        except OSError as error:
            raise BadImage("read_error", words_of(error)) from error
        if not before.st_size == after.st_size == len(encoded) or before.st_mtime_ns != after.st_mtime_ns:
            raise BadImage("read_error", "the file changed while it was read", passing=True)  # its writer may end soon
        return encoded

    def read_part(self, name: bytes, start: int, size_bytes: int, etag_digest: bytes) -> bytes:
        if size_bytes > MAX_READ_BYTES:
            raise BadImage("too_large", f"{size_bytes} bytes; at most {MAX_READ_BYTES} are read")
        try:
            with _descriptor(self._path(name)) as file:
                before = _status_of_file(file)
                encoded = _read_at(file, start, size_bytes)
                after = os.fstat(file)
        except OSError as error:
            raise BadImage("read_error", words_of(error)) from error
        if digest_of(_etag(before)) != etag_digest or digest_of(_etag(after)) != etag_digest:
            raise BadImage("read_error", "the file that holds it has changed since it was listed")
        if len(encoded) != size_bytes:
            raise BadImage("read_error", f"{len(encoded)} of {size_bytes} bytes are there")
        return encoded


class _OpenFolder(NamedTuple):
    prefix: bytes
    names: Iterator[bytes]
    identity: tuple[int, int]


@contextmanager
def _descriptor(path: bytes, flags: int = 0) -> Iterator[int]:
    descriptor = os.open(path, _READ_FLAGS | flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _status_of_file(file: int) -> os.stat_result:
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("read_error", "not a regular file")
    return status


def _identity(folder: int) -> tuple[int, int]:
    status = os.fstat(folder)
    return status.st_dev, status.st_ino


def _look_at(folder: int, prefix: bytes, name: bytes) -> Found | None:
    """None for what is no file, and for a name that has gone since the folder was read."""
    try:
        status = os.stat(name, dir_fd=folder)
    except OSError:
        try:
            os.lstat(name, dir_fd=folder)
        except FileNotFoundError:
            return None
        return Found(prefix + name, 0, 0, "")  # a link that leads nowhere
    if not stat.S_ISREG(status.st_mode):
        return None
    return Found(prefix + name, status.st_size, status.st_mtime_ns, "")


def _etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_ino:x}-{status.st_size:x}"


def _names_in(path: bytes) -> list[bytes]:
    """Sorted, folders with a slash at their end: then the names of the whole walk come out sorted too."""
    with os.scandir(path) as entries:
        return sorted([entry.name + b"/" if _is_folder(entry) else entry.name for entry in entries])


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle or into a place we may not enter: listed as a file, and reading it tells
        return False


def _read_at(file: int, start: int, count: int) -> bytes:
    """Up to `count` bytes; fewer only at the end of the file. One call, except past what the kernel gives at once."""
    encoded = os.pread(file, count, start)
    while 0 < len(encoded) < count:
        more = os.pread(file, count - len(encoded), start + len(encoded))
        if not more:
            break
        encoded += more
    return encoded


def _unreadable(folder: bytes, error: OSError) -> Damage:
    words = words_of(error)
    if error.errno == errno.ENAMETOOLONG:
        words += ": a path has at most 4,096 bytes; use a root further down"
    return Damage(encode_key(folder), words)
