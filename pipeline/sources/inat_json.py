"""The COCO-like JSON of iNaturalist 2021, joined to a sorted listing in bounded memory.

The file is decoded one record at a time into a private temporary SQLite database, which sorts by file name on disk;
the listing comes in the same order of bytes, so one forward pass pairs them and finds what either side lacks.
500,000 pictures take 10 s and 60 MB; `json.load` alone takes 2.5 s and 750 MB, so several GB for `train`.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

from pipeline.batch import MetadataValue
from pipeline.sources import Damage, SourceError
from pipeline.sources.keys import clean_metadata, encode_key
from pipeline.sources.places import Found, Place

log = logging.getLogger(__name__)

READ_BYTES = 1 << 20
LONGEST_VALUE = 64 << 20  # characters; a torn record must not pull the rest of the file into memory
_GAP = re.compile(r"[ \t\r\n]*")
_SCHEMA = """
CREATE TABLE image (
    file_name BLOB, id INTEGER, license INTEGER, rights_holder TEXT, date TEXT, latitude REAL, longitude REAL
);
CREATE TABLE annotation (image_id INTEGER PRIMARY KEY, category_id INTEGER);
"""
_JOINED = """
SELECT image.file_name, image.id, category_id, license, rights_holder, date, latitude, longitude
FROM image LEFT JOIN annotation ON annotation.image_id = image.id ORDER BY image.file_name
"""
Metadata = dict[str, MetadataValue]


def _image_row(image: dict[str, Any]) -> tuple[Any, ...]:
    # The name as bytes: SQLite then sorts as the listing is sorted.
    fields = [image.get(field) for field in ("license", "rights_holder", "date", "latitude", "longitude")]
    return (image["file_name"].encode(), image["id"], *fields)


class Annotations:
    """One split's JSON. Reads it when made; raises SourceError when it is broken."""

    def __init__(self, place: Place, name: bytes) -> None:
        self._categories: dict[int, Metadata] = {}
        self._by_folder: dict[str, Metadata] = {}
        self._licenses: dict[int, Metadata] = {}
        self._uri = place.uri(name)
        self._database = sqlite3.connect("")  # a temporary file without a name, gone when closed
        try:
            self._database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _SCHEMA)
            with place.open(name) as file:
                self._load(file)
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
            OSError,
            sqlite3.Error,
        ) as error:  # whatever a record of another form leads to
            self._database.close()
            raise SourceError(
                f"{self._uri} cannot be used ({type(error).__name__}: {error}); fetch it again with --download, "
                f"or take it away to use the taxa in the folder names"
            ) from error

    def _load(self, file: BinaryIO) -> None:
        for section, of_section in groupby(records(file), key=itemgetter(0)):
            found = (record for _, record in of_section)
            if section == "images":
                self._database.executemany("INSERT INTO image VALUES (?, ?, ?, ?, ?, ?, ?)", map(_image_row, found))
            elif section == "annotations":
                rows = map(itemgetter("image_id", "category_id"), found)
                self._database.executemany("INSERT OR REPLACE INTO annotation VALUES (?, ?)", rows)
            elif section == "categories":
                for category in found:
                    self._add_category(category)
            elif section == "licenses":
                for license_ in found:
                    self._add_license(license_)

    def _add_category(self, category: dict[str, Any]) -> None:
        ranks = ("kingdom", "phylum", "class", "order", "family", "genus")
        values = {"label": category["name"], "species": category["name"], "category_id": category["id"]}
        values |= {field: category.get(field) for field in ("common_name", "supercategory", *ranks)}
        self._categories[category["id"]] = metadata = clean_metadata(values)
        if folder := category.get("image_dir_name"):
            self._by_folder[folder] = metadata

    def _add_license(self, license_: dict[str, Any]) -> None:
        values = {"license": license_.get("name"), "license_url": license_.get("url")}
        self._licenses[license_["id"]] = clean_metadata(values)

    def join(
        self, files: Iterator[Found | Damage], without_json: Callable[[bytes], Metadata]
    ) -> Iterator[tuple[Found | Damage, Metadata]]:
        """Each file with its metadata; of a file the JSON lacks, that of its folder. What the disk lacks is counted."""
        only_on_disk = only_in_json = 0
        example = b""
        with closing(self._database):
            rows = self._database.execute(_JOINED)
            row = next(rows, None)
            for found in files:
                if isinstance(found, Damage):
                    yield found, {}
                    continue
                while row is not None and row[0] < found.name:
                    only_in_json, example = only_in_json + 1, example or row[0]
                    row = next(rows, None)
                if row is not None and row[0] == found.name:
                    yield found, self._metadata(row)
                    row = next(rows, None)
                else:
                    only_on_disk += 1
                    yield found, self._of_folder(found.name) or without_json(found.name)
            while row is not None:
                only_in_json, example = only_in_json + 1, example or row[0]
                row = next(rows, None)
        if only_in_json:
            missing = encode_key(example)
            log.warning("%s names %d pictures that are not there, such as %s", self._uri, only_in_json, missing)
        if only_on_disk:
            log.warning("%s lacks %d pictures that are there: they have no licence", self._uri, only_on_disk)

    def _of_folder(self, name: bytes) -> Metadata:
        return self._by_folder.get(encode_key(name.rpartition(b"/")[0].rpartition(b"/")[2]), {})

    def _metadata(self, row: tuple[Any, ...]) -> Metadata:
        file_name, image_id, category_id, license_id, rights_holder, date, latitude, longitude = row
        of_image = {
            "image_id": image_id,
            "rights_holder": rights_holder,
            "date": date,
            "latitude": latitude,
            "longitude": longitude,
        }
        category = self._categories.get(category_id) or self._of_folder(file_name)
        return {**category, **self._licenses.get(license_id, {}), **clean_metadata(of_image)}


def records(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """(section, record) of each record in the lists of a JSON object; a section that is no list comes as one record.

    Raises:
        ValueError: the file is no JSON object, or it ends early.
    """
    text = _Text(file)
    text.expect("{")
    while not text.take("}"):
        section = text.value()
        text.expect(":")
        if text.take("["):
            for value in text.values():
                yield section, value
        else:
            yield section, text.value()
        if not text.take(","):
            text.expect("}")
            break


class _Text:
    """A window on a long JSON text that grows until the value at its start is whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = json.JSONDecoder()
        self._bytes = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False

    def _more(self) -> None:
        if self._ended:
            raise ValueError("the file ends early")
        if len(self._text) - self._at > LONGEST_VALUE:
            raise ValueError(f"no JSON value begins with {self._text[self._at : self._at + 40]!r}")
        chunk = self._file.read(READ_BYTES)
        self._ended = not chunk
        self._text = self._text[self._at :] + self._bytes.decode(chunk, final=self._ended)
        self._at = 0

    def _peek(self) -> str:
        while True:
            self._at = _GAP.match(self._text, self._at).end()  # type: ignore[union-attr]  # it also matches nothing
            if self._at < len(self._text):
                return self._text[self._at]
            self._more()

    def take(self, sign: str) -> bool:
        found = self._peek() == sign
        self._at += found
        return found

    def expect(self, sign: str) -> None:
        if not self.take(sign):
            raise ValueError(f"expected {sign!r}, found {self._text[self._at : self._at + 20]!r}")

    def values(self) -> Iterator[Any]:
        """The rest of a list behind its bracket."""
        if self.take("]"):
            return
        while True:
            yield self.value()
            if not self.take(","):
                self.expect("]")
                return

    def value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                self._more()
                continue
            if len(self._text) - end < len("e-1") and not self._ended:
                self._more()  # a number near the window's end may go on: 1.5, 1e-1
                continue
            self._at = end
            return value
