"""What people ask: texts, pictures and rows, several at once, each with a weight, some with a minus.

    parse_query('a red car')                            one text, word for word: without a quote nothing is special
    parse_query('"red car" - "person"')                 like the first, unlike the second
    parse_query('"red car" + 0.5 * key:"a/b.jpg"')      and half as much like a picture of the index
    Query((Term(text="red car"), Term(picture=encoded, weight=0.5), Term(row=123, weight=-1)))

The vector of a query is the sum of its terms' unit vectors times their weights, made a unit vector again: pictures
with weight 1 are averaged, a minus turns away from its term. `docs/search.md` has the grammar.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.store.scan import Query as Vector

WORD_FOR_WORD = ("{}",)
UNIT_TOLERANCE = 0.01  # of a vector's length: rounding to float16 moves it by up to .001
NORM_MIN = 1e-3  # of a sum; below, the terms cancel and what is left is rounding
_TOKEN = re.compile(
    r"""\s*(?P<sign>[+-])?\s*
        (?:(?P<weight>\d+(?:\.\d*)?|\.\d+)\s*\*\s*)?
        (?P<kind>key:|file:)?
        (?:"(?P<quoted>(?:[^"\\]|\\.)*)"|“(?P<curly>[^”]*)”|(?P<word>[^\s"“”*+-][^\s"“”*]*))""",
    re.VERBOSE,
)
_EXPRESSION = re.compile(r"""\s*[+-]?\s*(?:(?:\d+(?:\.\d*)?|\.\d+)\s*\*\s*)?(?:key:|file:)?["“]""")
_UNCLOSED = re.compile(_EXPRESSION.pattern + r"""(?:[^"\\]|\\.)*\Z""", re.DOTALL)
EXAMPLE = '"red car" - "person"'


class QueryError(ValueError):
    """This cannot be asked of this index: one line with what was given, what was expected and what to write."""


class UnknownName(QueryError):
    """No row has this name; the line names the nearest ones there are."""


@dataclass(frozen=True)
class Term:
    """One thing to look for, exactly one of these; `weight` below zero turns away from it.

    Raises:
        ValueError: none or several are given, or the weight is zero or not finite. QueryError: the text is empty.
    """

    text: str | None = None
    picture: bytes | None = None  # encoded, as in a file
    row: int | None = None  # of index.h5
    key: str | None = None  # of a picture of the index
    file: str | None = None  # a picture by its path ("-": standard input); only where the reader allows files
    vector: Vector | None = None  # (d,) float16, unit norm
    weight: float = 1.0

    def __post_init__(self) -> None:
        given = [name for name in self.__match_args__[:-1] if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a Term is one of {', '.join(self.__match_args__[:-1])}; given: {given or 'none'}")
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"the weight of {given[0]} is {self.weight}; expected a finite number that is not 0")
        if self.text is not None and not self.text.strip():
            raise QueryError(f'the text {self.text!r} is empty; write what to look for, e.g. "a red bird"')


@dataclass(frozen=True)
class Query:
    """Terms to be added up. A text stands in every one of `templates` ("a photo of a {}"), and the unit vectors of
    these sentences are averaged: a prompt ensemble.

    Raises:
        ValueError: there is no term, or a template lacks its place for the text.
    """

    terms: tuple[Term, ...]
    templates: tuple[str, ...] = WORD_FOR_WORD

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a Query has no terms; it needs at least one")
        check_templates(self.templates)


def check_templates(templates: Sequence[str]) -> None:
    """
    Raises:
        QueryError: there is none, or one has no {}.
    """
    for template in templates or ("",):
        if "{}" not in template:
            raise QueryError(f'the template {template!r} has no {{}} for the text; e.g. "a photo of a {{}}"')


def parse_query(text: str, templates: Sequence[str] = WORD_FOR_WORD) -> Query:
    """A query as a person writes it. Nothing is read: a `file:` term is a name until somebody opens it.

    Raises:
        QueryError: an empty text, or quotes that begin an expression which does not go on as one.
    """
    if not _EXPRESSION.match(text):
        return Query((Term(text=text),), tuple(templates))
    terms: list[Term] = []
    at, end = 0, len(text.rstrip())
    while at < end:
        found = _TOKEN.match(text, at)
        if found is None and _UNCLOSED.match(text, at):
            raise QueryError(f"{text!r} has a quote that is not closed; close it, or write the words without quotes")
        if found is None or (terms and found["sign"] is None):
            raise QueryError(
                f"{text!r} cannot be read from {text[at:].strip()[:40]!r} on; join terms with + or - and put several "
                f"words in quotes: {EXAMPLE}"
            )
        terms.append(_term(found))
        at = found.end()
    return Query(tuple(terms), tuple(templates))


def _term(found: re.Match[str]) -> Term:
    weight = float(found["weight"] or 1) * (-1 if found["sign"] == "-" else 1)
    if weight == 0 or not math.isfinite(weight):
        raise QueryError(f"the weight {found['weight']} in {found[0].strip()!r}; expected a number above 0")
    quoted, curly = found["quoted"], found["curly"]
    value = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else curly if curly is not None else found["word"]
    match found["kind"]:
        case "key:":
            return Term(key=value, weight=weight)
        case "file:":
            return Term(file=value, weight=weight)
        case _:
            return Term(text=value, weight=weight)


def check_vector(vector_d: Vector, dim: int) -> None:
    """
    Raises:
        QueryError: it is no unit vector of an index of this dimension.
    """
    length = float(np.linalg.norm(vector_d.astype(np.float64)))
    if vector_d.dtype != np.float16 or vector_d.shape != (dim,) or not abs(length - 1) <= UNIT_TOLERANCE:
        raise QueryError(
            f"the vector is {vector_d.dtype} {vector_d.shape} of length {length:.4g}; expected float16 ({dim},) of "
            "length 1: (vector / np.linalg.norm(vector)).astype(np.float16)"
        )


def combine(vectors: Sequence[npt.NDArray[np.float16]], weights: Sequence[float]) -> Vector:
    """(d,) the unit vector of a weighted sum of unit vectors; of one with a positive weight, itself to the bit.

    Raises:
        QueryError: they cancel out.
    """
    if len(vectors) == 1 and weights[0] > 0:
        return vectors[0]
    sum_d = np.asarray(weights, np.float32) @ np.stack(vectors).astype(np.float32)
    norm = float(np.linalg.norm(sum_d))
    if norm < NORM_MIN * float(np.abs(weights).sum()):
        raise QueryError("the terms of this query cancel out: nothing is left to look for. Change a weight or a term")
    return (sum_d / norm).astype(np.float16)
