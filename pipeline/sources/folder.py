"""A tree of pictures of any shape: the key is the path below the root, the label the folder a picture lies in.

`pictures.py` says which files count. An empty tree lists nothing; a root that is not there is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pipeline.batch import Item, MetadataValue
from pipeline.sources import Damage, Entry, SourceError, Unchanged
from pipeline.sources.keys import encode_key
from pipeline.sources.pictures import only_pictures
from pipeline.sources.places import canonical_root, place_at


@dataclass(frozen=True)
class Folder:
    root: str
    kind: ClassVar[str] = "folder"

    @classmethod
    def open(cls, root: str) -> Folder:
        source = cls(canonical_root(root))
        if not place_at(source.root).is_folder():
            raise SourceError(f"root {root!r} is no folder that is there; --source folder takes every picture below it")
        return source

    @property
    def options(self) -> dict[str, str]:
        return {}

    def list(self, unchanged: Unchanged) -> Iterator[Entry]:
        place = place_at(self.root)
        last_folder, label = b"", dict[str, MetadataValue]()
        for found in only_pictures(place, place.walk()):
            if isinstance(found, Damage):
                yield found
                continue
            name = found.name
            folder = name[: name.rfind(b"/") + 1]
            if folder != last_folder:
                last_folder = folder
                label = {"label": encode_key(folder[:-1].rpartition(b"/")[2])} if folder else {}
            yield Item(encode_key(name), name, found.size_bytes, found.mtime_ns, found.etag, label)

    def read(self, locator: bytes, size_bytes: int) -> bytes:
        return place_at(self.root).read(locator, size_bytes)

    def container_of(self, locator: bytes) -> bytes:
        return b""
