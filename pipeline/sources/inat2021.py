"""The iNaturalist 2021 competition layout: `<root>/<split>/<category>/<image>.jpg`, beside it `<split>.json`.

Splits: train, train_mini (500,000 pictures, the default), val, and public_test, which is flat and has no labels. Each
row carries species, taxa, licence and rights holder: from the JSON where it is there, else the taxa from the folder's
name. What lies on disk is listed; what only the JSON knows is counted in the log.

A root that is not named is $NIGHTJAR_DATA, else ./data/inat2021. Memory stays flat: the JSON passes through a
temporary SQLite file (500,000 pictures: 10 s; for `train` an estimated minute and 1 GB of temporary disk).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pipeline.batch import Item, MetadataValue
from pipeline.sources import Damage, Entry, SourceError, Unchanged
from pipeline.sources.download import ARCHIVES, SPLITS
from pipeline.sources.inat_json import Annotations
from pipeline.sources.keys import encode_key
from pipeline.sources.pictures import only_pictures
from pipeline.sources.places import Found, canonical_root, is_url, place_at

log = logging.getLogger(__name__)

RANKS = ("kingdom", "phylum", "class", "order", "family", "genus")


def default_root() -> str:
    return os.environ.get("NIGHTJAR_DATA") or os.path.join("data", "inat2021")


@dataclass(frozen=True)
class Inat2021:
    root: str
    split: str
    kind: ClassVar[str] = "inat2021"

    @classmethod
    def open(cls, root: str | None, *, split: str | None = None, download: bool = False) -> Inat2021:
        source = cls(canonical_root(root or default_root()), split or "train_mini")
        if source.split not in SPLITS:
            raise SourceError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        if download:
            if is_url(source.root):
                raise SourceError(f"--download needs a local --root, and {source.root} is a URL")
        elif not place_at(f"{source.root}/{source.split}").is_folder():
            raise SourceError(_how_to_get(source.root, source.split))
        return source

    @property
    def options(self) -> dict[str, str]:
        return {"split": self.split}

    def list(self, unchanged: Unchanged) -> Iterator[Entry]:
        place = place_at(self.root)
        files = only_pictures(place, place.walk(self.split.encode()))
        json_name = f"{self.split}.json".encode()
        annotations = None
        try:
            place.find(json_name)
        except FileNotFoundError:
            log.warning("%s is not there: taxa come from folder names, licences are unknown", place.uri(json_name))
        else:
            annotations = Annotations(place, json_name)
        with_metadata = _from_folders(files) if annotations is None else annotations.join(files, metadata_of_folder)
        for found, metadata in with_metadata:
            if isinstance(found, Damage):
                yield found
            else:
                yield Item(encode_key(found.name), found.name, found.size_bytes, found.mtime_ns, found.etag, metadata)

    def read(self, locator: bytes, size_bytes: int) -> bytes:
        return place_at(self.root).read(locator, size_bytes)

    def container_of(self, locator: bytes) -> bytes:
        return b""


def metadata_of_folder(name: bytes) -> dict[str, MetadataValue]:
    """Taxa from `<split>/00023_Animalia_..._Alectoris_chukar/x.jpg`; a folder of another form gives only its name."""
    parts = name.split(b"/")
    if len(parts) < 3:
        return {}
    folder = encode_key(parts[-2])
    number, *taxa = folder.split("_")
    if len(taxa) != 7 or not number.isdecimal() or not all(taxa):
        return {"label": folder}
    species = f"{taxa[5]} {taxa[6]}"
    return {"label": species, "category_id": int(number), **dict(zip(RANKS, taxa[:6], strict=True)), "species": species}


def _from_folders(files: Iterator[Found | Damage]) -> Iterator[tuple[Found | Damage, dict[str, MetadataValue]]]:
    last_folder, metadata = None, dict[str, MetadataValue]()
    for found in files:
        if isinstance(found, Damage):
            yield found, {}
            continue
        folder = found.name.rpartition(b"/")[0]
        if folder != last_folder:
            last_folder, metadata = folder, metadata_of_folder(found.name)
        yield found, metadata


def _how_to_get(root: str, split: str) -> str:
    pictures, table = ARCHIVES[split]
    below = "<image>.jpg" if split == "public_test" else "<category>/<image>.jpg"
    return (
        f"no iNaturalist 2021 pictures at {root}; expected {root}/{split}/{below} and {root}/{split}.json. "
        f"Give another --root (default $NIGHTJAR_DATA, else ./data/inat2021), or add --download to fetch "
        f"{pictures.name} ({pictures.size}) and {table.name} ({table.size}); iNaturalist's terms allow "
        f"non-commercial research and education, and forbid to redistribute the pictures"
    )
