"""A network that stumbles costs nobody a picture, and one that is down costs no night."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from fsspec.exceptions import FSTimeoutError

from pipeline import reads
from pipeline.batch import BadImage, Failure
from pipeline.reads import Read, Reader, is_passing
from pipeline.sources import open_source
from pipeline.sources.places import words_of
from pipeline.store import PendingItem, content_hash

ROWS = [PendingItem(number, f"{number}.jpg", b"%d" % number, 0) for number in range(20)]


class Flaky:
    """A source whose row n fails `failures[n]` times before it comes."""

    def __init__(self, failures: dict[int, int], error: BaseException) -> None:
        self.failures, self.error, self.asked = Counter(failures), error, list[int]()

    def read(self, locator: bytes, size_bytes: int) -> bytes:
        number = int(locator)
        self.asked.append(number)
        if self.failures[number]:
            self.failures[number] -= 1
            raise BadImage("read_error", words_of(self.error)) from self.error
        return b"bytes of %d" % number


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited, without the waiting; a clock on which nothing else takes time."""
    waited: list[float] = []
    monkeypatch.setattr(reads, "sleep", waited.append)
    monkeypatch.setattr(reads, "monotonic", lambda: sum(waited))
    return waited


def read_all(source: object) -> list[Read]:
    with ThreadPoolExecutor(4) as pool:
        reader = Reader(source, pool, 4, lambda: False)  # type: ignore[arg-type]
        came = [one for reads in reader.read_chunk([ROWS[:10], ROWS[10:]]) for one in reads]
        assert len({row.id for row, _ in came}) == len(came), "no row comes twice"
        return [read for _, read in sorted(came, key=lambda one: one[0].id)]


def failed(found: list[Read]) -> list[int]:
    return [number for number, read in enumerate(found) if isinstance(read, Failure)]


REQUEST: Any = SimpleNamespace(real_url="http://here/1.jpg")
PASSING = [
    OSError(errno.EIO, "x"), OSError(errno.ESTALE, "x"), OSError(errno.ETIMEDOUT, "x"), FSTimeoutError(),
    ConnectionResetError(), aiohttp.ServerDisconnectedError(), aiohttp.ClientPayloadError(),
    aiohttp.ClientResponseError(REQUEST, (), status=503),
]  # fmt: skip
LASTING = [
    OSError(errno.ENOENT, "x"), OSError(errno.EACCES, "x"), OSError(errno.ELOOP, "x"), ValueError("x"),
    aiohttp.ClientResponseError(REQUEST, (), status=404),
]  # fmt: skip


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_a_stumble_is_read_again(error: Exception, waits: list[float]) -> None:
    source = Flaky({3: 1, 17: 3}, error)
    found = read_all(source)
    assert failed(found) == []
    assert found[3] == (b"bytes of 3", content_hash(b"bytes of 3"))
    assert Counter(source.asked) == Counter({**dict.fromkeys(range(20), 1), 3: 2, 17: 4})
    assert source.asked[10] == 3, "after all others of its batch"
    assert 1.0 <= sum(waits) <= 1.6


def test_who_stumbled_holds_nobody_up(waits: list[float]) -> None:
    """All others are through before anybody waits, and what stumbles is read between them as soon as it is time."""
    source = Flaky({0: 3}, OSError(errno.EIO, "x"))
    with ThreadPoolExecutor(1) as pool:
        reader = Reader(source, pool, 1, lambda: False)  # type: ignore[arg-type]
        came = []
        for group in reader.read_chunk([[row] for row in ROWS]):
            came.append([row.id for row, _ in group])
            if came[-1] == [9]:
                waits.append(0.5)  # the lane was busy with others meanwhile
            assert sum(waits) <= 0.5 or len(came) > len(ROWS), "it waited with others to read"
    assert [number for group in came for number in group] == [*range(1, 20), 0]
    assert source.asked[:2] == [0, 0]
    assert source.asked[11] == 0, "its time came after row 9"
    assert source.asked[-1] == 0


def test_what_stumbled_stays_pending_when_the_run_is_stopped(waits: list[float]) -> None:
    """It is no read error yet: the next run reads it."""
    source = Flaky({19: 9}, OSError(errno.EIO, "x"))
    with ThreadPoolExecutor(1) as pool:
        reader = Reader(source, pool, 1, lambda: sum(source.asked) == sum(range(20)) + 19)  # type: ignore[arg-type]
        came = [row.id for group in reader.read_chunk([ROWS]) for row, _ in group]
    assert came == list(range(19))
    assert source.asked.count(19) == 2


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_will_not_pass_is_not_asked_for_twice(error: Exception, waits: list[float]) -> None:
    source = Flaky({3: 1}, error)
    assert failed(read_all(source)) == [3]
    assert len(source.asked) == 20
    assert waits == []


@pytest.mark.parametrize(("quick_s", "hiccup_s", "want"), [(9.0, 0.0, 1), (0.0, 9.0, 1), (0.0, 0.0, 4)])
def test_a_quick_source_is_read_by_one_thread_and_a_slow_one_by_all(
    quick_s: float, hiccup_s: float, want: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "QUICK_S", quick_s)
    monkeypatch.setattr(reads, "HICCUP_S", hiccup_s)
    threads = list[int]()
    together = threading.Barrier(4, timeout=20)

    class Slow:
        def read(self, locator: bytes, size_bytes: int) -> bytes:
            threads.append(threading.get_ident())
            if want > 1 and len(threads) > 1:  # nobody comes back before all have asked
                together.wait()
            return locator

    with ThreadPoolExecutor(4) as pool:
        reader = Reader(Slow(), pool, 4, lambda: False)  # type: ignore[arg-type]
        came = [one for group in reader.read_chunk([ROWS[:9], ROWS[9:13], ROWS[13:17]]) for one in group]
    assert [(row, read[0]) for row, read in came] == [(row, row.locator) for row in ROWS[:17]]
    assert len(set(threads)) == want


def test_a_source_that_is_down_is_given_up_on(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "PATIENCE_S", 1.0)
    source = Flaky(dict.fromkeys(range(20), 10**6), OSError(errno.EIO, "x"))
    assert failed(read_all(source)) == list(range(20))
    assert len(source.asked) == 20 * 4, "here both batches wait at the same time"
    assert sum(waits) <= 1.6
    waits.clear()
    source.asked.clear()
    with ThreadPoolExecutor(1) as pool:
        reader = Reader(source, pool, 1, lambda: False)  # type: ignore[arg-type]
        for _ in range(9):
            list(reader.read_chunk([ROWS]))
    assert len(source.asked) == 20 * 4 + 8 * 20 * 2, "later ones ask once more at once, and wait for nothing"
    assert sum(waits) <= 1.6


def test_a_disk_with_holes_is_not_waited_for_all_night(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Good rows around a hole say nothing about the hole."""
    monkeypatch.setattr(reads, "PATIENCE_S", 1.0)
    source = Flaky({3: 10**6, 13: 10**6}, OSError(errno.EIO, "x"))
    with ThreadPoolExecutor(1) as pool:
        reader = Reader(source, pool, 1, lambda: False)  # type: ignore[arg-type]
        found = [read for half in (ROWS[:10], ROWS[10:]) for group in reader.read_chunk([half]) for _, read in group]
    assert len(failed(found)) == 2
    assert Counter(source.asked)[3] == 4
    assert Counter(source.asked)[13] == 2


def test_a_file_that_is_being_written_is_read_when_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real road: the source says that it may pass."""
    (tmp_path / "a.jpg").write_bytes(b"half")
    fstat, looks = os.fstat, []

    def growing(file: int) -> os.stat_result:
        looks.append(file)
        if len(looks) == 2:  # between the two looks of the first read
            (tmp_path / "a.jpg").write_bytes(b"half and the rest")
        return fstat(file)

    monkeypatch.setattr(os, "fstat", growing)
    with ThreadPoolExecutor(1) as pool:
        source = open_source("folder", str(tmp_path))
        groups = Reader(source, pool, 1, lambda: False).read_chunk([[PendingItem(1, "a.jpg", b"a.jpg", 4)]])
        ((_, read),) = [one for group in groups for one in group]
    assert not isinstance(read, Failure), read
    assert read[0] == b"half and the rest"
    assert len(looks) == 4


def test_without_aiohttp_no_error_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    bad = BadImage("read_error", "x")
    bad.__cause__ = ValueError("x")
    assert not is_passing(bad)
    assert not is_passing(BadImage("truncated", "x"))
