"""What has to hold for the rows that may answer; `pipeline.search.filters` finds them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

from pipeline.search.query import QueryError

Box: TypeAlias = tuple[float, float, float, float]  # south, west, north, east, in degrees
Dates: TypeAlias = tuple[str | None, str | None]  # from and to, both included

A_BOX = "expected south,west,north,east in degrees, south at most north, e.g. 35,-10,60,30"
_DAY = re.compile(r"(\d{4})(?:-(\d{2})(?:-(\d{2}))?)?")


@dataclass(frozen=True)
class Where:
    """What has to hold, all of it.

    `taxon` is a name of any rank, or a common name. `date` is from and to, each such as "2019", "2019-06" or
    "2019-06-30", or None. `box` with west > east crosses the date line. `key` is a pattern: `*` stands for anything,
    slashes too, `?` for one character. `values` are (column, value) of any column.

    Raises:
        QueryError: a date or a box that is none.
    """

    label: str | None = None
    taxon: str | None = None
    licence: str | None = None
    date: Dates | None = None
    box: Box | None = None
    key: str | None = None
    values: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.date is not None:
            day_numbers(self.date)
        if self.box is not None:
            south, west, north, east = self.box
            if not (-90 <= south <= north <= 90 and -180 <= west <= 180 and -180 <= east <= 180):
                raise QueryError(f"the box {self.box} is none; {A_BOX}")


EVERYTHING = Where()


def parse_dates(text: str) -> Dates:
    """`2019..2020-06`, `2019-06-30..`, `..2019` or `2019` -> what `Where.date` takes. Its parts are checked there."""
    first, dots, last = text.strip().partition("..")
    return first or None, (last if dots else first) or None


def parse_box(text: str) -> Box:
    """`35,-10,60,30` -> what `Where.box` takes.

    Raises:
        QueryError: it is not four numbers.
    """
    try:
        south, west, north, east = (float(part) for part in text.split(","))
    except ValueError:
        raise QueryError(f"the box {text!r} is none; {A_BOX}") from None
    return south, west, north, east


def day_numbers(date: Dates) -> tuple[int, int]:
    """First and last day as numbers such as 20190630; what is left open starts with the first day there is.

    Raises:
        QueryError: a date that is none, or they end before they begin.
    """
    first, last = date
    days = _day_number(first, "00") if first else 1, _day_number(last, "99") if last else 99999999
    if days[0] > days[1]:
        raise QueryError(f"the dates {first}..{last} end before they begin")
    return days


def _day_number(text: str, rest: str) -> int:
    found = _DAY.fullmatch(text)
    if found is None:
        raise QueryError(f"the date {text!r} is none; write 2019, 2019-06 or 2019-06-30")
    year, month, day = found.groups()
    return int(f"{year}{month or rest}{day or rest}")
