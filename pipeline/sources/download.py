"""Fetches the official iNaturalist 2021 archives: resumed where they broke off, checked by md5, unpacked as a whole.

    download_inat2021("/data/inat2021", "val", progress=lambda name, done, total: ...)

A folder or JSON appears under its own name only when it is complete, and a second call finds it done. An archive is
deleted once it is unpacked; before, it takes its own size again on disk, and that is checked first.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

log = logging.getLogger(__name__)

BASE_URL = "https://ml-inat-competition-datasets.s3.amazonaws.com/2021/"
Progress: TypeAlias = Callable[[str, int, int], None]
"""(archive, bytes done, bytes in all or 0 when the server does not say)"""

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60
ATTEMPTS = 8  # in a row without a single new byte; each waits twice as long as the one before
_WORTH_RETRYING = frozenset({408, 425, 429, 500, 502, 503, 504})


class DownloadError(Exception):
    """One line: what failed, and what to do. Whatever is left behind is not mistaken for the data."""


@dataclass(frozen=True)
class Archive:
    name: str
    holds: str  # the one thing it unpacks to
    md5: str
    size: str  # as published, for people
    growth: float  # unpacked size in units of the archive's: pictures do not shrink, tables do


def _split(split: str, size: str, md5: str, json_size: str, json_md5: str) -> tuple[Archive, Archive]:
    return (
        Archive(f"{split}.tar.gz", split, md5, size, 1.05),
        Archive(f"{split}.json.tar.gz", f"{split}.json", json_md5, json_size, 10.0),
    )


ARCHIVES: dict[str, tuple[Archive, Archive]] = {
    split: _split(split, *sizes_and_md5s)
    for split, *sizes_and_md5s in (
        ("train", "224GB", "e0526d53c7f7b2e3167b2b43bb2690ed", "221MB", "38a7bb733f7a09214d44293460ec0021"),
        ("train_mini", "42GB", "db6ed8330e634445efc8fec83ae81442", "45MB", "395a35be3651d86dc3b0d365b8ea5f92"),
        ("val", "8.4GB", "f6f6e0e242e3d4c9569ba56400938afc", "9.4MB", "4d761e0f6a86cc63e8f7afc91f6a8f0b"),
        ("public_test", "43GB", "7124b949fe79bfa7f7019a15ef3dbd06", "21MB", "7a9413db55c6fa452824469cc7dd9d3d"),
    )
}
SPLITS = tuple(ARCHIVES)


def download_inat2021(
    root: str,
    split: str,
    *,
    progress: Progress | None = None,
    base_url: str = BASE_URL,
    archives: Mapping[str, tuple[Archive, ...]] = ARCHIVES,
    first_wait_s: float = 1.0,
) -> None:
    """Leaves `<root>/<split>` and `<root>/<split>.json`; does nothing when an earlier call has.

    Raises:
        DownloadError: no space, no server, wrong md5, or something of that name that did not come from here.
    """
    folder = Path(root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for archive in reversed(archives[split]):  # the small one first: what is wrong shows early
            if _is_done(folder, archive):
                log.info("%s/%s is complete", folder, archive.holds)
                continue
            part = folder / f".{archive.name}.part"
            fetch = _Fetch(f"{base_url.rstrip('/')}/{archive.name}", part, archive, progress, first_wait_s)
            fetch.run()
            _check_md5(part, archive, progress)
            _unpack(part, folder, archive)
            part.unlink()
    except OSError as error:
        raise DownloadError(f"cannot write to {folder}: {error.strerror or error}; give another --root") from error


def _marker(folder: Path, archive: Archive) -> Path:
    return folder / f".{archive.name}.md5"


def _is_done(folder: Path, archive: Archive) -> bool:
    if not (folder / archive.holds).exists():
        return False
    marker = _marker(folder, archive)
    if marker.is_file() and marker.read_text().strip() == archive.md5:
        return True
    raise DownloadError(
        f"{folder / archive.holds} is there, but no earlier --download has completed it; if it is complete, leave "
        f"out --download, else move it away"
    )


class _LineBrokenError(Exception):
    """Of the network, not of the disk."""


def _read(response: IO[bytes]) -> bytes:
    try:
        return response.read(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _LineBrokenError(f"{type(error).__name__}: {error}") from error


class _Fetch:
    """One archive into one `.part` file, over as many requests as the line breaks."""

    def __init__(self, url: str, part: Path, archive: Archive, progress: Progress | None, first_wait_s: float) -> None:
        self._url, self._part, self._archive = url, part, archive
        self._progress, self._first_wait_s = progress, first_wait_s

    def run(self) -> None:
        failures = 0
        while True:
            before = self._have()
            try:
                if self._one_request(before):
                    return
                words = "the connection closed early"
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in _WORTH_RETRYING:
                    raise DownloadError(f"{self._url}: the server answers {error.code} {error.reason}") from error
                words = f"{error.code} {error.reason}"
            except _LineBrokenError as error:
                words = str(error)
            failures = 1 if self._have() > before else failures + 1
            if failures == ATTEMPTS:
                raise DownloadError(
                    f"{self._url}: {words}, {ATTEMPTS} times in a row; {self._have()} bytes are kept, the same "
                    f"command goes on from there"
                )
            log.warning("%s: %s; going on from byte %d", self._url, words, self._have())
            time.sleep(self._first_wait_s * 2 ** (failures - 1))

    def _have(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _one_request(self, have: int) -> bool:
        """Whether the file is whole now."""
        request = urllib.request.Request(self._url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # nothing lies beyond what we have: whole, and md5 tells whether it is right
                error.close()
                return True
            raise
        except (OSError, http.client.HTTPException) as error:
            raise _LineBrokenError(f"{type(error).__name__}: {error}") from error
        with response:
            if response.status != 206:
                have = 0  # the server ignores ranges and sends everything
            total = have + int(response.headers.get("Content-Length") or 0)
            self._check_space(total, have)
            with self._part.open("r+b" if have else "wb") as file:
                file.seek(have)
                while chunk := _read(response):
                    file.write(chunk)
                    have += len(chunk)
                    if self._progress:
                        self._progress(self._archive.name, have, total)
                file.flush()
                os.fsync(file.fileno())
        return have >= total

    def _check_space(self, total: int, have: int) -> None:
        needed = total - have + int(total * self._archive.growth)
        free = shutil.disk_usage(self._part.parent).free
        if needed > free:
            raise DownloadError(
                f"{self._part.parent} has {free / 1e9:.1f} GB free; to fetch and unpack {self._archive.name} takes "
                f"{needed / 1e9:.1f} GB; give another --root"
            )


def _check_md5(part: Path, archive: Archive, progress: Progress | None) -> None:
    md5 = hashlib.md5(usedforsecurity=False)
    total, done = part.stat().st_size, 0
    with part.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            md5.update(chunk)
            done += len(chunk)
            if progress:
                progress(f"{archive.name} md5", done, total)
    if md5.hexdigest() != archive.md5:
        part.unlink()
        raise DownloadError(
            f"{archive.name} has md5 {md5.hexdigest()}, expected {archive.md5}; it is deleted, run the command again"
        )


def _unpack(part: Path, folder: Path, archive: Archive) -> None:
    """Into a hidden folder first; the marker before the rename, so that both together mean complete."""
    staging = folder / f".{archive.name}.unpacking"
    if staging.exists():
        shutil.rmtree(staging)  # of a call that was stopped
    try:
        with tarfile.open(part, "r|gz") as tar:
            for member in tar:
                tar.extract(member, staging, filter="data")  # refuses paths and links that lead outside
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all 2.7 million, 1 KB each
    except (tarfile.TarError, EOFError) as error:
        raise DownloadError(f"{archive.name} does not unpack: {error}") from error
    if not (staging / archive.holds).exists():
        raise DownloadError(f"{archive.name} holds no {archive.holds}; it is not the archive of that name")
    os.sync()
    _marker(folder, archive).write_text(archive.md5 + "\n")
    os.replace(staging / archive.holds, folder / archive.holds)
    shutil.rmtree(staging)
