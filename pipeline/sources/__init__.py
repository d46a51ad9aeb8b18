"""Where pictures come from: a table of kinds, each a `Source` that lists its pictures and reads their bytes.

    source = open_source("folder", "/data/photos")
    for entry in source.list(unchanged): ...        # Item | Container | Damage
    encoded = source.read(item.locator, item.size_bytes)

Listing streams in an order that depends on names only, in memory that the largest single folder bounds. A part that
cannot be listed is an entry of its own, a `Damage`, so a caller cannot take an incomplete listing for a complete one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

from pipeline.batch import Item

SOURCES = {
    "folder": "pipeline.sources.folder:Folder",
    "inat2021": "pipeline.sources.inat2021:Inat2021",
    "parquet": "pipeline.sources.parquet_rows:ParquetRows",
    "tar": "pipeline.sources.tar_shards:TarShards",
}


class SourceError(Exception):
    """The source cannot be had at all. One line: what was given, what was expected, what to do."""


@dataclass(frozen=True, slots=True)
class Container:
    """A tar or parquet file, reported after its items, or in place of them when the caller knows it unchanged."""

    uri: str
    key_prefix: str  # every key of this container starts with it, and no other key does
    size_bytes: int
    etag: str
    unchanged: bool


@dataclass(frozen=True, slots=True)
class Damage:
    """A part of the source that could not be listed: an unreadable folder, a cut-off tar.

    Keys under `key_prefix` that did not come up may still exist, so they must not be deleted. A damaged container is
    reported by this and not as `Container`, so the next run reads it again.
    """

    key_prefix: str
    words: str


Entry: TypeAlias = Item | Container | Damage
Unchanged: TypeAlias = Callable[[str, int, str], bool]
"""(uri, size in bytes, etag) of a container -> whether an earlier run has listed exactly this one."""


class Source(Protocol):
    """A frozen value that survives pickling: lanes in other processes read through their own copy."""

    @property
    def kind(self) -> str: ...

    @property
    def root(self) -> str:
        """Absolute path or URL, as the manifest records it; with `kind` and `options` it names the scope."""

    @property
    def options(self) -> Mapping[str, str]: ...

    def list(self, unchanged: Unchanged) -> Iterator[Entry]: ...

    def read(self, locator: bytes, size_bytes: int) -> bytes:
        """The picture's bytes, from a local disk in one open and one read.

        Raises:
            BadImage: `read_error` (also when the bytes changed since or while they were read), `too_large`, `empty`.
        """

    def container_of(self, locator: bytes) -> bytes:
        """The file that holds this picture beside others; empty for one that is a file of its own."""


def open_source(kind: str, root: str | None, *, split: str | None = None, download: bool = False) -> Source:
    """The source of that kind at `root`, which has to be there unless it is about to be downloaded.

    Raises:
        SourceError: with what was expected there and how to get it.
    """
    if kind not in SOURCES:
        raise SourceError(f"source {kind!r} is not one of {', '.join(SOURCES)}")
    opened = source_class(kind).open
    if kind == "inat2021":
        return cast(Source, opened(root, split=split, download=download))
    if split is not None or download:
        flag = "--split" if split is not None else "--download"
        raise SourceError(f"{flag} is for --source inat2021, not for {kind}; leave it out")
    if root is None:
        raise SourceError(f"--source {kind} needs --root: a local path or a URL such as s3://bucket/folder")
    return cast(Source, opened(root))


def source_class(kind: str) -> Any:
    module, _, name = SOURCES[kind].partition(":")
    return getattr(importlib.import_module(module), name)
