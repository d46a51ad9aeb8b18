"""The query parameters of the API: read, checked and documented from one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.datastructures import QueryParams

from pipeline.search.where import Where, parse_box
from pipeline.serve.errors import Refusal

K_MAX, OFFSET_MAX, TEXT_CHARACTERS_MAX = 200, 10_000, 2_000
FACETS_MAX = 8


class Parameter(NamedTuple):
    name: str
    schema: Mapping[str, Any]  # of JSON Schema
    words: str
    read: Callable[[str], Any]


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text) if text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 20 else None
        if number is None or not least <= number <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return number

    return read


def _real(text: str) -> float:
    number = float(text) if len(text) < 40 else math.nan
    if not math.isfinite(number):
        raise ValueError("a number")
    return number


def _cosine(text: str) -> float:
    number = _real(text)
    if not -1 <= number <= 1:
        raise ValueError("a number from -1 to 1")
    return number


def _share(text: str) -> float:
    number = _real(text)
    if not 0 <= number <= 1:
        raise ValueError("a number from 0 to 1")
    return number


def _yes(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if len(names) > FACETS_MAX:
        raise ValueError(f"at most {FACETS_MAX} names")
    return names


def _text(text: str) -> str:
    if len(text) > TEXT_CHARACTERS_MAX:
        raise ValueError(f"at most {TEXT_CHARACTERS_MAX} characters")
    return text


K = Parameter("k", {"type": "integer", "minimum": 1, "maximum": K_MAX, "default": 24}, "how many", _whole(1, K_MAX))
OFFSET = Parameter(
    "offset", {"type": "integer", "minimum": 0, "maximum": OFFSET_MAX, "default": 0}, "of the first one",
    _whole(0, OFFSET_MAX),
)  # fmt: skip
THRESHOLD = Parameter(
    "threshold", {"type": "number", "minimum": -1, "maximum": 1}, "only pictures with a cosine of at least this",
    _cosine,
)  # fmt: skip
Q = Parameter("q", {"type": "string", "maxLength": TEXT_CHARACTERS_MAX}, "what to look for", _text)
SIZE = Parameter(
    "size", {"type": "integer", "minimum": 16, "maximum": 1024, "default": 256},
    "longest edge in pixels, rounded up to 128, 256, 512 or 1024", _whole(16, 1024),
)  # fmt: skip
MMR = Parameter(
    "mmr", {"type": "number", "minimum": 0, "maximum": 1},
    "variety: 1 is the plain order, towards 0 answers differ more from each other", _share,
)  # fmt: skip
GROUP = Parameter(
    "group", {"type": "boolean", "default": False},
    "true: near-duplicates as one answer, whose `copies` are the ids of the others", _yes,
)  # fmt: skip
LABEL = Parameter("label", {"type": "string"}, "only this label", _text)
TAXON = Parameter("taxon", {"type": "string"}, "only this taxon: a name of any rank, or a common name", _text)
LICENCE = Parameter("licence", {"type": "string"}, "only this licence", _text)
KEY = Parameter("key", {"type": "string"}, "only these keys; * stands for anything, slashes too", _text)
DATE_FROM = Parameter("date_from", {"type": "string"}, "from this day, month or year on: 2019-06", _text)
DATE_TO = Parameter("date_to", {"type": "string"}, "until the end of this day, month or year", _text)
BOX = Parameter("box", {"type": "string"}, "only from there: south,west,north,east in degrees", parse_box)
FACETS = Parameter(
    "facets", {"type": "string"}, "count the values of these fields, such as label,licence, among what passes", _names
)  # fmt: skip
SIMILAR = (K, OFFSET, THRESHOLD, MMR, GROUP, LABEL, TAXON, LICENCE, KEY, DATE_FROM, DATE_TO, BOX, FACETS)
SEARCH = (Q, *SIMILAR)


@dataclass(frozen=True)
class Asked:
    """`values` has what was given and passed the check; a parameter that was left out is not in it."""

    values: Mapping[str, Any]

    def get(self, parameter: Parameter) -> Any:
        return self.values.get(parameter.name, parameter.schema.get("default"))


def where_of(asked: Asked) -> Where:
    """
    Raises:
        QueryError: dates or a box that are none.
    """
    dates = asked.get(DATE_FROM), asked.get(DATE_TO)
    return Where(
        label=asked.get(LABEL), taxon=asked.get(TAXON), licence=asked.get(LICENCE), key=asked.get(KEY),
        date=None if dates == (None, None) else dates, box=asked.get(BOX),
    )  # fmt: skip


def read_parameters(given: QueryParams, known: tuple[Parameter, ...]) -> Asked:
    """
    Raises:
        Refusal: 400, one that is unknown, given twice or out of range. A misspelt filter must not answer unfiltered.
    """
    by_name = {parameter.name: parameter for parameter in known}
    values: dict[str, Any] = {}
    for name, text in given.multi_items():
        if name not in by_name:
            raise Refusal(400, f"there is no parameter {name[:40]!r}; there are {', '.join(by_name)}")
        if name in values:
            raise Refusal(400, f"{name} is given twice; give it once")
        if text == "":
            continue
        try:
            values[name] = by_name[name].read(text)
        except ValueError as error:
            raise Refusal(400, f"{name}={text[:60]!r}; expected: {error}") from None
    return Asked(values)
