"""Writing HDF5 on a disk that may be full.

HDF5 keeps a file open whose last writes failed, and takes the process down with it later (seen: SIGSEGV when the
dataset objects are freed, HDF5 2.0). So HDF5 never sees a failed write here: it writes through `_Disk`, which remembers
the first error and holds in memory what could not be written, until our own code asks `check` and gives up in order.
The detour costs one Python call for each write of HDF5, below 1 % of writing a shard.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import cast

import h5py

PAGE_BYTES = 4096  # large datasets start on a page, so that a mapping needs no correction


def new_h5(path: Path) -> AbstractContextManager[tuple[h5py.File, Callable[[], None]]]:
    """A new HDF5 file and its `check`, to be called after every few megabytes: it raises what the disk said."""
    return _opened(path, "w+b", "w")


def edit_h5(path: Path) -> AbstractContextManager[tuple[h5py.File, Callable[[], None]]]:
    """The same for a file that is there."""
    return _opened(path, "r+b", "r+")


@contextmanager
def _opened(path: Path, disk_mode: str, mode: str) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    with _Disk(path, disk_mode) as disk:
        # The last closing of the file happens inside, whatever went wrong, so that nothing of it outlives the block.
        with h5py.File(disk, mode, alignment_threshold=PAGE_BYTES, alignment_interval=PAGE_BYTES) as file:
            yield file, disk.check
        disk.check()


class _Disk:
    """The part of a Python file that h5py asks of one."""

    def __init__(self, path: Path, mode: str) -> None:
        self._file = cast(io.FileIO, path.open(mode, buffering=0))
        self._at = 0
        self._error: OSError | None = None
        self._unwritten: list[tuple[int, bytes]] = []

    def __enter__(self) -> _Disk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            ends = [start + len(content) for start, content in self._unwritten]
            offset += max([os.fstat(self._file.fileno()).st_size, *ends])
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at

    def write(self, content: memoryview) -> int:
        done = 0
        try:
            while self._error is None and done < len(content):
                done += os.pwrite(self._file.fileno(), content[done:], self._at + done)
        except OSError as error:
            self._error = error
        if done < len(content):
            self._unwritten.append((self._at + done, bytes(content[done:])))
        self._at += len(content)
        return len(content)

    def read(self, size: int) -> bytes:
        """h5py looks whether it is there, and reads by `readinto`."""
        buffer = bytearray(size)
        self.readinto(memoryview(buffer))
        return bytes(buffer)

    def readinto(self, buffer: memoryview) -> int:
        want = len(buffer)
        found = os.pread(self._file.fileno(), want, self._at)
        buffer[: len(found)] = found
        buffer[len(found) :] = bytes(want - len(found))
        for start, content in self._unwritten:
            first, last = max(start, self._at), min(start + len(content), self._at + want)
            if first < last:
                buffer[first - self._at : last - self._at] = content[first - start : last - start]
        self._at += want
        return want

    def truncate(self, size: int) -> int:
        try:
            self._file.truncate(size)
        except OSError as error:
            self._error = self._error or error
        return size

    def flush(self) -> None:
        """Nothing is buffered."""
