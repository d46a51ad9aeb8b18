"""`python -m pipeline.generations`: what was published and is kept; show an older one again with one command.

Readers follow the link `current`, so a switch costs one rename and they see all of one generation or all of the other.
A generation that was chosen stays until another is, whatever is published meanwhile: a roll back that the next night
undid would be none.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sqlite3
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Column

from pipeline.config import UsageError, only_index_here
from pipeline.exits import DONE, FAILED, LOCKED, USAGE
from pipeline.store import Locked, NoIndex, StoreError, show_generation
from pipeline.terminal import print_table, printable, reader_may_leave
from pipeline.writing import why_no_index

log = logging.getLogger("nightjar")
EXAMPLES = """examples:
  python -m pipeline.generations --out inat2021-index              what is kept
  python -m pipeline.generations --out inat2021-index --show 12    roll back to generation 12, until told otherwise
  python -m pipeline.generations --out inat2021-index --show newest

exit codes: 0 done, 1 failed, 2 usage, 4 a run is writing to the index"""


@dataclass(frozen=True)
class Kept:
    number: int
    published: str  # local time
    rows: int
    model: str
    data_bytes: int  # of the files it names; generations share most of them
    shown: bool
    damaged: bool = False  # its generation.json cannot be read: nothing else is known of it


def kept_generations(index: Path) -> list[Kept]:
    """Oldest first.

    Raises:
        NoIndex: nothing was published in `index`.
    """
    current = index / "current"
    if not current.is_symlink():
        raise NoIndex(why_no_index(index))
    shown = os.readlink(current).rpartition("/")[2]
    kept = []
    for home in sorted((index / "generations").iterdir(), key=lambda home: (len(home.name), home.name)):
        if not home.name.isdecimal():
            continue  # being written
        try:
            text = (home / "generation.json").read_bytes()
            published = time.strftime("%Y-%m-%d %H:%M", time.localtime((home / "generation.json").stat().st_mtime))
        except FileNotFoundError:
            continue  # pruned between two looks
        try:
            content = json.loads(text)
            rows, model = content["rows"], content["spec"]["model"]
            data_bytes = sum(file["bytes"] for file in [*content["files"], content["index"]])
            one = Kept(int(home.name), published, rows, model, data_bytes, home.name == shown)
        except (ValueError, KeyError, TypeError):
            one = Kept(int(home.name), published, 0, "", 0, home.name == shown, damaged=True)
            log.warning(
                "generation %d is damaged, its generation.json cannot be read: python -m pipeline.verify --repair "
                "--out %s", one.number, printable(str(index)),
            )  # fmt: skip
        kept.append(one)
    return kept


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.generations", description="What was published and is kept; roll back to any of it.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="the index (default: the only ./*-index here)")
    parser.add_argument("--show", metavar="N", help='what readers see from now on: a number, or "newest"')
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args(argv)
    try:
        index = args.out or only_index_here()
        if args.show is not None:
            log.info("generation %d is shown", show_generation(index, _wanted(args.show)))
        kept = kept_generations(index)
    except (UsageError, NoIndex) as error:
        return _fail(USAGE, error)
    except Locked as error:
        return _fail(LOCKED, error)
    except (StoreError, OSError, sqlite3.Error) as error:
        return _fail(FAILED, error)
    with reader_may_leave():
        if args.json:
            print(json.dumps({"index": str(index), "generations": [asdict(one) for one in kept]}))
        else:
            _print(index, kept)
    return DONE


def _wanted(text: str) -> int | None:
    if text == "newest":
        return None
    if not text.isdecimal():
        raise UsageError(f'--show {text}: give the number of a generation, or "newest"')
    return int(text)


def _print(index: Path, kept: list[Kept]) -> None:
    columns = [
        Column("generation", justify="right"), Column("published"), Column("pictures", justify="right"),
        Column("data", justify="right"), Column("model", overflow="fold"), Column(""), Column(""),
    ]  # fmt: skip
    rows = [
        [str(one.number), one.published, f"{one.rows:,}", f"{one.data_bytes / 1e6:,.1f} MB", one.model,
         *["shown"] * one.shown, *["damaged"] * one.damaged]
        for one in kept
    ]  # fmt: skip
    print_table(columns, rows, title=str(index))


def _fail(code: int, error: Exception) -> int:
    log.error("error: %s", printable(str(error)))
    return code


if __name__ == "__main__":
    sys.exit(main())
