"""The command line of `pipeline.search`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.config import UsageError, only_index_here
from pipeline.search.query import WORD_FOR_WORD, Query, Term, parse_query
from pipeline.search.where import Where, parse_box, parse_dates

SEARCH_EXAMPLES = """examples:
  python -m pipeline.search "a red bird on a branch" --out inat2021-index
  python -m pipeline.search "heron" --template "a photo of a {}" -k 20 --threshold 0.25
  python -m pipeline.search --image photo.jpg --grid nine.png
  python -m pipeline.search '"red car" - 0.5 * "person"' --mmr 0.7 --group
  python -m pipeline.search "in flight" --taxon "northern cardinal" --date 2019..2020-06 --box 24,-125,50,-66
  python -m pipeline.search --like "val/a.jpg" --key "val/*" -k 50 --offset 50 --json

docs/search.md has the grammar of queries and what relevance means."""


@dataclass(frozen=True)
class SearchConfig:
    """Everything one query of `pipeline.search` depends on."""

    query: Query
    words: str  # of the question, to be shown with its answer
    where: Where
    out: Path
    k: int
    offset: int
    threshold: float | None
    mmr: float | None
    group: bool
    grid: Path | None
    json: bool
    model: str | None
    exact: bool


def search_parser() -> argparse.ArgumentParser:
    about = "The pictures of an index that fit a text, or another picture, best."
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.search",
        description=about,
        epilog=SEARCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("text", nargs="?", help='what to look for; or terms with weights: \'"red car" - 0.5 * "person"\'')
    add("--image", type=Path, action="append", metavar="FILE", help="pictures like this one; -: standard input")
    add("--like", action="append", metavar="KEY", help="pictures like this one of the index")
    add("--template", action="append", help='a sentence for texts, e.g. "a photo of a {}"; several are averaged')
    add("--out", type=Path, help="the index (default: the only ./*-index here)")
    add("-k", type=int, default=9, help="how many (default: 9)")
    add("--offset", type=int, default=0, metavar="N", help="leave out the first N: the next page")
    add("--threshold", type=float, metavar="T", help="only pictures with a cosine of at least T")
    add("--mmr", type=float, metavar="W", help="variety: 1 is the plain order, towards 0 answers differ more")
    add("--group", action="store_true", help="near-duplicates as one answer")
    add("--label", help="only this label")
    add("--taxon", help="only this taxon: a name of any rank, or a common name")
    add("--licence", "--license", help="only this licence")
    add("--date", metavar="FROM..TO", help="only these days, both included: 2019..2020-06, 2019-06-30.., 2019")
    add("--box", metavar="S,W,N,E", help="only from there, in degrees; 35,-10,60,30")
    add("--key", metavar="PATTERN", help="only these keys; * stands for anything, slashes too, ? for one character")
    add("--where", action="append", metavar="COLUMN=VALUE", help="only where a column of the metadata has this value")
    add("--grid", type=Path, metavar="FILE.png", help="write a contact sheet of the answers, of 100 at most")
    add("--json", action="store_true", help="one JSON object instead of a table")
    add("--model", help="hub id or directory (default: the model the index was made with)")
    add("--exact", action="store_true", help="look at every vector, also where there are lists")
    return parser


def parse_search(argv: list[str] | None) -> SearchConfig:
    """
    Raises:
        UsageError, QueryError: one line each, with the remedy.
    """
    args = search_parser().parse_args(_with_box(sys.argv[1:] if argv is None else argv))
    images, likes = args.image or [], args.like or []
    if args.text is None and not images and not likes:
        raise UsageError('give a text, --image FILE or --like KEY, e.g. python -m pipeline.search "a red bird"')
    if args.k < 1:
        raise UsageError(f"-k is {args.k}; it must be at least 1")
    if args.offset < 0:
        raise UsageError(f"--offset is {args.offset}; it must be at least 0")
    if args.threshold is not None and not -1 <= args.threshold <= 1:
        raise UsageError(f"--threshold is {args.threshold:g}; it is a cosine, -1 to 1")
    if args.grid is not None:
        _check_grid(args.grid)
    if args.mmr is not None and not 0 <= args.mmr <= 1:
        raise UsageError(f"--mmr is {args.mmr}; it is 0 (variety alone) to 1 (the plain order)")
    templates = tuple(args.template or WORD_FOR_WORD)
    terms = parse_query(args.text, templates).terms if args.text is not None else ()
    terms += tuple(Term(file=str(image)) for image in images) + tuple(Term(key=key) for key in likes)
    return SearchConfig(
        query=Query(terms, templates),
        words=" + ".join([*([args.text] if args.text is not None else []), *map(str, images), *likes]),
        where=_where(args),
        out=args.out or only_index_here(),
        k=args.k,
        offset=args.offset,
        threshold=args.threshold,
        mmr=args.mmr,
        group=args.group,
        grid=args.grid,
        json=args.json,
        model=args.model,
        exact=args.exact,
    )


def _with_box(words: Sequence[str]) -> list[str]:
    """`--box -35,110,-10,155` as `--box=-35,110,-10,155`: argparse takes the numbers alone for an option."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--box":
            joined[-1] = f"--box={word}"
        else:
            joined.append(word)
    return joined


def _check_grid(path: Path) -> None:
    """
    Raises:
        UsageError: no picture can be written there; found out before anything is searched.
    """
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UsageError(f"--grid {path} does not end as a picture does; write e.g. --grid nine.png")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"--grid {path} cannot be written; expected a file in a folder that takes one")


def _where(args: argparse.Namespace) -> Where:
    values = [text.partition("=")[::2] for text in args.where or []]
    if bad := [name for name, value in values if not name or not value]:
        raise UsageError(f"--where {bad[0]!r}; expected COLUMN=VALUE, e.g. --where colour=red")
    return Where(
        label=args.label,
        taxon=args.taxon,
        licence=args.licence,
        date=None if args.date is None else parse_dates(args.date),
        box=None if args.box is None else parse_box(args.box),
        key=args.key,
        values=tuple(values),
    )
