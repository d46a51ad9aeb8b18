"""`python -m pipeline.search "text"`: the pictures of an index that fit a text, or another picture, best.

For programs: `Index.open(folder).search("a red bird")`, see `pipeline.search.index` and `docs/search.md`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
from rich.table import Column

from engines import EngineUnavailable
from engines.spec import ArtifactMissing
from pipeline.batch import BadImage
from pipeline.config import UsageError
from pipeline.contact_sheet import CELLS_MAX, JPEG_QUALITY, Cell, contact_sheet
from pipeline.exits import DONE, FAILED, USAGE
from pipeline.search.answer import Found, Hit
from pipeline.search.config import SearchConfig, parse_search
from pipeline.search.index import Index
from pipeline.search.query import QueryError
from pipeline.sources import SourceError, open_source
from pipeline.store import Generation, NoIndex, StoreError
from pipeline.terminal import print_table, printable, reader_may_leave

COLUMNS = (
    Column("#", no_wrap=True), Column("relevance", no_wrap=True, justify="right"), Column("cosine", no_wrap=True),
    Column("label", overflow="fold"), Column("key", overflow="fold"), Column("", overflow="fold"),
)  # fmt: skip


def search(cfg: SearchConfig) -> None:
    """What is asked is answered before the contact sheet is made: it may take long, and its disk may be full."""
    with Index.open(cfg.out, model=cfg.model, exact=cfg.exact) as index:
        found = index.search(
            cfg.query, cfg.k, offset=cfg.offset, where=cfg.where, threshold=cfg.threshold, mmr=cfg.mmr, group=cfg.group,
            exact=cfg.exact,
        )  # fmt: skip
        with reader_may_leave():
            show(cfg, found)
        if cfg.grid:
            hits, first = found.hits[:CELLS_MAX], cfg.offset + 1
            sheet = contact_sheet(cfg.words, _cells(index.generation, hits), len(hits), first)
            sheet.save(cfg.grid, quality=JPEG_QUALITY)  # where the kind of file has one
            more = f", answers {first:,} to {cfg.offset + CELLS_MAX:,}; the next: --offset {cfg.offset + CELLS_MAX}"
            _say(f"contact sheet: {cfg.grid}{more if len(found) > CELLS_MAX else ''}")


def _cells(generation: Generation, hits: list[Hit]) -> Iterator[Cell]:
    """One at a time: a sheet shows a picture in 65,536 pixels, and its file may have hundreds of megabytes."""
    for encoded, hit in zip(_read(generation, hits), hits, strict=True):
        yield Cell(encoded, _label(hit), hit.score)


def _read(generation: Generation, hits: list[Hit]) -> Iterator[bytes | None]:
    """The pictures' bytes from where they were indexed; None for one that has gone since."""
    for picture in generation.pictures(np.array([hit.row for hit in hits], np.int64)):
        try:
            source = open_source(picture.source.kind, picture.source.root, split=picture.source.options.get("split"))
            encoded: bytes | None = source.read(picture.locator, picture.size_bytes)
        except (SourceError, BadImage) as error:
            logging.getLogger("nightjar").warning("a picture cannot be shown: %s", error)
            encoded = None
        yield encoded


def _label(hit: Hit) -> str:
    for column in ("common_name", "label", "caption"):
        if value := hit.metadata.get(column):
            return str(value)
    return hit.key


def show(cfg: SearchConfig, found: Found) -> None:
    if cfg.json:
        described = [asdict(hit) for hit in found.hits]
        for words, rows in zip(described, found.groups or [], strict=False):
            words["copies"] = rows[1:].tolist()
        print(json.dumps({"query": cfg.words, "total": found.total, "offset": cfg.offset, "hits": described}))
        return
    if not len(found):
        _say(_nothing(cfg, found))
        return
    table = []
    for number, hit in enumerate(found.hits):
        copies = len(found.groups[number]) - 1 if found.groups else 0
        notes = [f"({hit.mark})"] * bool(hit.mark) + [f"+{copies} near-duplicates"] * bool(copies)
        table.append(
            [str(cfg.offset + number + 1), f"{hit.relevance:.0%}", f"{hit.score:.4f}", _label(hit), hit.key,
             *["  ".join(notes)] * bool(notes)]
        )  # fmt: skip
    print_table(COLUMNS, table)


def _nothing(cfg: SearchConfig, found: Found) -> str:
    if not found.generation.rows:
        return "nothing: there is no picture in the index"
    if not found.total:
        return "nothing: no picture passes all filters"
    if cfg.threshold is not None:
        return f"nothing at or above --threshold {cfg.threshold:g}" + (
            f" from --offset {cfg.offset}" if cfg.offset else ""
        )
    return f"nothing from --offset {cfg.offset}; {found.total} pictures pass"


def _say(words: str) -> None:
    """To the person; stdout has answers alone."""
    print(printable(words), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        search(parse_search(argv))
    except (UsageError, QueryError, ArtifactMissing, EngineUnavailable, NoIndex, BadImage) as error:
        _say(f"error: {error}")
        return USAGE
    except (StoreError, OSError) as error:
        _say(f"error: {error}")
        return FAILED
    return DONE
