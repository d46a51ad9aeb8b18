"""Tar files in webdataset style: pictures, and beside them `.json`, `.txt` or `.cls` members of the same stem.

The listing reads headers and the small members only; a picture is then one open and one read at its offset, so lanes
share a tar without unpacking it. Compressed tars have no offsets and are refused. A tar that ends early (cut off, or
still being written: its end mark is missing) gives the members before the break, then a `Damage`.

From local disk about 20,000 members/s. A remote tar streams through once when it is listed and once when it is read.
"""

from __future__ import annotations

import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, ClassVar, NamedTuple, Self, cast

from pipeline.batch import BadImage, Item, MetadataValue
from pipeline.sources import Damage, SourceError
from pipeline.sources.containers import ContainerSource
from pipeline.sources.keys import clean_metadata, clean_text, encode_key
from pipeline.sources.pictures import PICTURES, extension, kind_of, tell_left_out
from pipeline.sources.places import Found, Place, digest_of, place_at, words_of

log = logging.getLogger(__name__)

SIDECARS = frozenset({b"json", b"txt", b"cls"})
MAX_SIDECAR_BYTES = 1 << 20
MAX_SAMPLE_MEMBERS = 1_000  # bounds memory when thousands of neighbours share everything up to the first dot
MAX_HEADER_BYTES = 256 << 10  # of one member, extended headers included; a name and its attributes take a few KB
MAX_NAME_BYTES = 4096  # what a path has at most on Linux; a key is up to three times as long, and stands in every index
# tarfile searches extended headers for records that begin with digits, in time quadratic in a run of them.
_ENDLESS_NUMBER = re.compile(rb"\d{1024}")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")


class _Member(NamedTuple):
    name: bytes
    offset: int
    size_bytes: int
    content: bytes  # of a sidecar


@dataclass(frozen=True)
class TarShards(ContainerSource):
    kind: ClassVar[str] = "tar"
    ending: ClassVar[str] = ".tar"

    @classmethod
    def open(cls, root: str) -> Self:
        if root.lower().endswith(_COMPRESSED):
            raise SourceError(f"root {root!r} is compressed, so it cannot be read in place; gunzip it to a plain .tar")
        return super().open(root)

    def list_one(self, place: Place, container: Found) -> Iterator[Item | Damage]:
        sample: list[_Member] = []
        with place.open(container.name) as file:
            for member in _members(file, encode_key(container.name)):
                if isinstance(member, Damage):
                    yield member
                    continue
                if sample and (_stem(member.name) != _stem(sample[0].name) or len(sample) == MAX_SAMPLE_MEMBERS):
                    yield from _items(sample, container)
                    sample = []
                sample.append(member)
        yield from _items(sample, container)

    def read(self, locator: bytes, size_bytes: int) -> bytes:
        try:
            etag_digest, offset, name = locator.split(b":", 2)
            start = int(offset)
        except ValueError as error:
            raise BadImage("read_error", f"locator {locator!r} is none of a tar source") from error
        return place_at(self.folder).read_part(name, start, size_bytes, etag_digest)

    def container_of(self, locator: bytes) -> bytes:
        return locator.split(b":", 2)[-1]


class _Headers:
    """What tarfile reads of a tar: headers only, so much for each member. It would believe a header of any length."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.left_bytes = file, MAX_HEADER_BYTES
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left_bytes:
            raise tarfile.ReadError(f"a member's header takes more than {MAX_HEADER_BYTES} bytes")
        self.left_bytes -= size
        content = self._file.read(size)
        if _ENDLESS_NUMBER.search(content):
            raise tarfile.ReadError("a header holds a number of a thousand digits")
        return content


def _members(file: BinaryIO, shard: str) -> Iterator[_Member | Damage]:
    """Pictures and sidecars in order. A break of any kind is a `Damage`, and so are all members lost for one reason."""
    left_out: Counter[str] = Counter()
    lost: dict[str, tuple[str, int]] = {}  # why -> the first such member, and how many there are
    names: set[bytes] = set()
    headers, last_offset = _Headers(file), -1
    try:
        with tarfile.open(fileobj=cast(BinaryIO, headers), mode="r:") as tar:
            while (entry := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them, 1 KB each
                headers.left_bytes = MAX_HEADER_BYTES
                if entry.size < 0 or tar.offset <= last_offset:  # a size below zero would lead it round in circles
                    raise tarfile.ReadError(f"member {entry.name[:100]!r} says it has {entry.size} bytes")
                last_offset = tar.offset
                name = entry.name.encode(errors="surrogateescape")
                kind = extension(name)
                beside = name.rpartition(b"/")[2].startswith(b"._")  # what macOS packs with each file, under its name
                if not entry.isreg() or kind not in PICTURES | SIDECARS or beside:
                    if not entry.isdir():
                        left_out[kind_of(name) if entry.isreg() else "links"] += 1
                elif why := _why_lost(entry, name, names):
                    first, count = lost.get(why, (entry.name[:100], 0))
                    lost[why] = first, count + 1
                else:
                    names.add(name)
                    is_sidecar = kind in SIDECARS and entry.size <= MAX_SIDECAR_BYTES
                    yield _Member(name, entry.offset_data, entry.size, file.read(entry.size) if is_sidecar else b"")
            # tarfile ends in silence at a torn header, so look at what stopped it.
            file.seek(tar.offset)
            rest = file.read(1 << 20)
            if len(rest) < tarfile.BLOCKSIZE:
                yield _damage(shard, "the end mark is missing: cut off, or still being written")
            elif rest.strip(b"\0"):
                yield _damage(shard, f"no valid header at byte {tar.offset}: torn, or several tars joined into one")
    except Exception as error:  # besides tarfile's own, whatever a remote file raises
        log.debug("%s ends early", shard, exc_info=True)
        yield _damage(shard, words_of(error))
    for why, (first, count) in lost.items():
        yield _damage(shard, f"member {first!r} {why}{f' (and {count - 1:,} more)' if count > 1 else ''}")
    tell_left_out(f"neither pictures nor their metadata in {shard}", left_out)


def _why_lost(entry: tarfile.TarInfo, name: bytes, names: set[bytes]) -> str:
    if len(name) > MAX_NAME_BYTES:
        return f"has a name of more than {MAX_NAME_BYTES:,} bytes"
    if name in names:
        return "comes twice; only the first counts"
    return "is sparse and cannot be read in one piece" if entry.issparse() else ""


def _items(sample: list[_Member], container: Found) -> Iterator[Item]:
    shard, digest = encode_key(container.name), digest_of(container.etag)
    for member in sample:
        if extension(member.name) in PICTURES:
            yield Item(
                key=f"{shard}/{encode_key(member.name)}",
                locator=b"%b:%d:%b" % (digest, member.offset, container.name),
                size_bytes=member.size_bytes,
                etag=container.etag,
                metadata=_metadata(member, sample, shard),
            )


def _metadata(picture: _Member, sample: list[_Member], shard: str) -> dict[str, MetadataValue]:
    """`a.jpg` has `a.json`, `a.jpg.json`; `a.left.jpg` has `a.left.json` and `a.json`, but not `a.right.json`."""
    stems = {picture.name, picture.name.rpartition(b".")[0], _stem(picture.name)}
    values: dict[str, MetadataValue] = {}
    for member in sample:
        stem, _, kind = member.name.rpartition(b".")
        if stem not in stems or not member.content:
            continue
        text = clean_text(member.content.decode(errors="replace"))
        if kind.lower() == b"txt":
            values["caption"] = text.strip()
        elif kind.lower() == b"cls":
            values["label"] = text.strip()
        else:
            try:
                record = json.loads(member.content)
            except (ValueError, RecursionError) as error:  # deep nesting
                name = encode_key(member.name)
                log.warning("%s/%s is no valid JSON, so its picture lacks metadata: %s", shard, name, error)
                continue
            if isinstance(record, Mapping):
                values = {**clean_metadata(record), **values}
    return values


def _stem(name: bytes) -> bytes:
    """Up to the first dot of the last part: what makes members one sample."""
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + last.partition(b".")[0]


def _damage(shard: str, words: str) -> Damage:
    return Damage(f"{shard}/", words)
