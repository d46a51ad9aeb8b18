"""How a run may fail: what is told in one line, with which words and which exit code."""

from __future__ import annotations

import sqlite3

from engines import EngineUnavailable
from engines.spec import ArtifactMissing
from pipeline.batch import DeviceUnavailable
from pipeline.config import UsageError
from pipeline.exits import DAMAGED, FAILED, LOCKED, MANY_DELETED, USAGE
from pipeline.scheduler import LaneFailed, LaneRefused
from pipeline.sources import SourceError
from pipeline.sources.download import DownloadError
from pipeline.store import Locked, StoreError
from pipeline.store.check_shown import ShownDamaged


class TooManyDeletions(Exception):
    """The source lost so much that a person should look before the index does the same."""


# What may happen to anybody. Everything else is a fault of ours and keeps its traceback.
FAILURES = (
    UsageError, SourceError, ArtifactMissing, DeviceUnavailable, EngineUnavailable, TooManyDeletions, DownloadError,
    LaneFailed, StoreError, OSError, MemoryError, sqlite3.Error,
)  # fmt: skip


def exit_code(error: BaseException) -> int:
    """Of a run that ended with this."""
    match error:
        case Locked():
            return LOCKED
        case ShownDamaged():
            return DAMAGED
        case TooManyDeletions():
            return MANY_DELETED
        case UsageError() | SourceError() | ArtifactMissing() | DeviceUnavailable() | EngineUnavailable():
            return USAGE
        case LaneRefused():
            return USAGE
    return FAILED


def words(error: BaseException) -> str:
    """For a person: one of FAILURES speaks for itself, but for Python's MemoryError, which says nothing."""
    if isinstance(error, MemoryError):
        return (
            f"this process ran out of memory{f' ({error})' if str(error) else ''}; what is done is committed. Raise "
            "its limit (container, ulimit -v), or end what else runs on this machine; then the same command goes on"
        )
    return str(error) if isinstance(error, FAILURES) else f"{type(error).__name__}: {error}"
