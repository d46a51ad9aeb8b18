"""What a command prints: a table on a terminal, elsewhere one line for each row, for grep, cut and copying.

Names, labels and paths are anybody's: none of them speaks to the terminal, and none is read as markup.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text


def printable(text: str) -> str:
    """On one line and without what would speak to the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Without a terminal: no title, no head, cells parted by tabs."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(map(printable, row)))
        return
    table = Table(*(column.copy() for column in columns), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if title:
        print(printable(title))
    Console().print(table)


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """`| head` has seen enough: that is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it is flushed once more at the end
