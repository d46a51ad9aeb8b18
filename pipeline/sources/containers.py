"""What tar and parquet share: finding the container files of a root, and skipping those an earlier run has listed.

A root is one container file, a folder of them (with sub-folders), or a glob such as '/data/train-*.tar'; local or any
fsspec URL. A picture's key is `<container name>/<its name or number inside>`, its etag the container's: when a
container changes, all its pictures are read again, and those whose bytes are known are not computed again.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Self, TypeAlias

from pipeline.batch import Item
from pipeline.sources import Container, Damage, Entry, SourceError, Unchanged
from pipeline.sources.keys import encode_key
from pipeline.sources.lister import Lister
from pipeline.sources.pictures import is_passed_over, kind_of, tell_left_out
from pipeline.sources.places import Found, Place, canonical_root, is_url, place_at, same_file, words_of

log = logging.getLogger(__name__)

ListContainer: TypeAlias = Callable[[Found, str], Iterator[Item | Damage]]  # of a container and the prefix of its keys
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class ContainerSource(ABC):
    root: str
    folder: str  # what names are relative to
    pattern: str  # the containers below it: "" for all, else a file name or a glob

    kind: ClassVar[str]
    ending: ClassVar[str]  # of the containers among other files of a folder

    @classmethod
    def open(cls, root: str) -> Self:
        canonical = canonical_root(root)
        source = cls(canonical, *_folder_and_pattern(canonical, cls.ending))
        place = place_at(source.folder)
        if not (place.names_like(source.pattern) if source.pattern else place.is_folder()):
            raise SourceError(
                f"root {root!r} is not there; --source {cls.kind} expects a {cls.ending} file, a folder of them, "
                f"or a quoted glob such as 'data/*{cls.ending}'"
            )
        return source

    @property
    def options(self) -> dict[str, str]:
        return {}

    @abstractmethod
    def list_one(self, place: Place, container: Found) -> Iterator[Item | Damage]:
        """The pictures of one container. Whatever it raises becomes the damage of that container."""

    def list(self, unchanged: Unchanged) -> Iterator[Entry]:
        """What has to be opened is opened in a child process, so that no file can take this one down."""
        with Lister(self) as lister:
            yield from self.list_by(lister.list, unchanged)

    def list_by(self, list_container: ListContainer, unchanged: Unchanged) -> Iterator[Entry]:
        place = place_at(self.folder)
        for name in self._names(place):
            if isinstance(name, Damage):
                yield name
                continue
            prefix = encode_key(name) + "/"
            try:
                found = place.find(name)
            except Exception as error:  # tarfile, pyarrow and every remote file system raise their own types
                log.debug("%s cannot be opened", prefix, exc_info=True)
                yield Damage(prefix, words_of(error))
                continue
            uri = place.uri(name)
            if unchanged(uri, found.size_bytes, found.etag):
                yield Container(uri, prefix, found.size_bytes, found.etag, unchanged=True)
                continue
            whole = True
            for entry in list_container(found, prefix):
                whole = whole and not isinstance(entry, Damage)
                yield entry
            if whole:
                yield Container(uri, prefix, found.size_bytes, found.etag, unchanged=False)

    def list_container(self, found: Found, prefix: str) -> Iterator[Item | Damage]:
        """One container, in this process."""
        place = place_at(self.folder)
        try:
            yield from self.list_one(place, found)
            if not same_file(found, place.find(found.name)):
                yield Damage(prefix, "it changed while it was listed")
        except Exception as error:  # see list
            log.debug("%s cannot be listed to its end", prefix, exc_info=True)
            yield Damage(prefix, words_of(error))

    def _names(self, place: Place) -> Iterator[bytes | Damage]:
        if self.pattern:
            yield from place.names_like(self.pattern)
            return
        ending = self.ending.encode()
        left_out: Counter[str] = Counter()
        for found in place.walk():
            if isinstance(found, Damage):
                yield found
            elif found.name.lower().endswith(ending) and not is_passed_over(found.name):
                yield found.name
            else:
                left_out[kind_of(found.name)] += 1
        tell_left_out(f"no {self.ending} files by their names", left_out)


def _folder_and_pattern(root: str, ending: str) -> tuple[str, str]:
    """Splits in front of the file name or the first part with a wildcard; a whole folder has no pattern.

    A URL is split by its looks: asking a web server whether a large tar is a folder would fetch it.
    """
    looks_like_files = root.lower().endswith(ending) or _MAGIC.search(root) is not None
    if not looks_like_files if is_url(root) else place_at(root).is_folder():
        return root, ""
    folder, _, pattern = root.rpartition("/")
    while _MAGIC.search(folder):
        folder, _, step = folder.rpartition("/")
        pattern = f"{step}/{pattern}"
    return folder, pattern
