"""What generated pictures show and what texts mean, so that relevance is computed and never judged.

    full_query(attributes).text           -> "a small blue star at the top left on a white background"
    relevance(queries, pictures)          -> (q, n) bool
    retrieval_scores(image_emb_nd, text_emb_qd, relevant) -> {"r1": 0.93, "p9": 0.97}

Trade-off: a closed world of six colours, six shapes, three backgrounds, four counts, two sizes and five places
(1,404 different captions), in exchange for scores without a labelling error. Needs numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

COLOURS = ("red", "yellow", "green", "blue", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
BACKGROUNDS = ("white", "gray", "black")
POSITIONS = ("middle", "top left", "top right", "bottom left", "bottom right")
SIZES = ("small", "large")
COUNTS = {2: "two", 3: "three", 4: "four"}
OPENINGS = ("", "a photo of ", "a picture of ", "an image of ")

PAIRS = tuple(product(COLOURS, SHAPES))
# Never drawn for training: 12 of 108. Each colour and each shape is in two of them, and every pair of colour and shape
# is known from its other backgrounds.
HELD_OUT = frozenset(
    (colour, SHAPES[(i + j) % len(SHAPES)], BACKGROUNDS[(i + j) % len(BACKGROUNDS)])
    for i, colour in enumerate(COLOURS)
    for j in range(2)
)
TOP = 9


@dataclass(frozen=True)
class Attributes:
    """All that is said about a picture. Several shapes are scattered: they have neither size nor position."""

    colour: str
    shape: str
    background: str
    count: int
    size: str = ""
    position: str = ""

    @property
    def label(self) -> str:
        return f"{self.colour}-{self.shape}"

    @property
    def held_out(self) -> bool:
        return (self.colour, self.shape, self.background) in HELD_OUT


@dataclass(frozen=True)
class Query:
    """A text and the pictures it means: those that agree with every attribute it names. Empty means not named."""

    text: str
    colour: str = ""
    shape: str = ""
    background: str = ""
    counts: tuple[int, ...] = ()
    size: str = ""
    position: str = ""


def phrase(
    *, colour: str = "", shape: str = "", background: str = "", counts: tuple[int, ...] = (), size: str = "",
    position: str = "", rng: np.random.Generator | None = None,
) -> Query:  # fmt: skip
    """The text that names these attributes; with `rng`, in one of several wordings."""

    def choose(*wordings: str) -> str:
        return wordings[0] if rng is None else wordings[int(rng.integers(len(wordings)))]

    noun = shape or "shape"
    if counts and 1 not in counts:
        noun += "es" if noun.endswith("s") else "s"
    words = [word for word in (size, colour, noun) if word]
    if counts == (1,):
        words.insert(0, choose("an" if words[0][0] in "aeiou" else "a", "one"))
    elif len(counts) == 1:
        words.insert(0, COUNTS[counts[0]])
    tails = []
    if position:
        tails.append(choose("in the middle", "in the center") if position == "middle"
                     else choose(f"at the {position}", f"in the {position} corner"))  # fmt: skip
    if background:
        tails.append(choose(f"on a {background} background", f"on {background}"))
    if rng is not None and rng.integers(2):
        tails.reverse()
    opening = choose("", "", *OPENINGS)
    text = opening + " ".join(words + tails)
    return Query(text, colour, shape, background, counts, size, position)


def full_query(picture: Attributes, rng: np.random.Generator | None = None) -> Query:
    return phrase(colour=picture.colour, shape=picture.shape, background=picture.background, counts=(picture.count,),
                  size=picture.size, position=picture.position, rng=rng)  # fmt: skip


def short_query(picture: Attributes, rng: np.random.Generator) -> Query:
    """A wording that names one to three attributes.

    Few, because a text that names one thing teaches that thing: of full captions alone, a model learns colour and
    background, which already tell most pictures of a batch apart, and for long nothing of shape and position.
    """
    fields = ("shape", "colour", "position", "count", "background", "size")
    named = set(rng.choice(fields, int(rng.integers(1, 4)), replace=False, p=(0.45, 0.15, 0.15, 0.1, 0.1, 0.05)))
    several = (2, 3, 4) if picture.count > 1 and rng.random() < 0.3 else (picture.count,)
    return phrase(
        colour=picture.colour if "colour" in named else "",
        shape=picture.shape if "shape" in named else "",
        background=picture.background if "background" in named else "",
        counts=several if "count" in named else (),
        size=picture.size if "size" in named else "",
        position=picture.position if "position" in named else "",
        rng=rng,
    )


def relevance(queries: Sequence[Query], pictures: Sequence[Attributes]) -> npt.NDArray[np.bool_]:
    """(q, n): does query q mean picture n?"""
    meant = np.ones((len(queries), len(pictures)), np.bool_)
    for name in ("colour", "shape", "background", "size", "position"):
        want = np.array([getattr(query, name) for query in queries])[:, None]
        meant &= (want == "") | (want == np.array([getattr(picture, name) for picture in pictures]))
    allowed = np.array([sum(1 << count for count in query.counts) for query in queries])[:, None]  # one bit per count
    meant &= (allowed == 0) | (allowed >> np.array([picture.count for picture in pictures]) & 1 == 1)
    return meant


def retrieval_scores(
    image_emb_nd: npt.NDArray[np.floating], text_emb_qd: npt.NDArray[np.floating], relevant: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """Scores of unit-norm vectors against the truth `relevant` (q, n).

    r1: over the texts that mean one to eight pictures, the share whose first picture is meant;
    p9: over the texts that mean nine or more, the share of the first nine pictures that are meant.
    """
    if relevant.shape != (len(text_emb_qd), len(image_emb_nd)):
        raise ValueError(f"relevant is {relevant.shape}, expected {(len(text_emb_qd), len(image_emb_nd))}: (q, n)")
    meant = relevant.sum(1)
    narrow, broad = (meant > 0) & (meant < TOP), meant >= TOP
    if not (narrow.any() and broad.any()):
        raise ValueError(f"{narrow.sum()} texts mean 1 to 8 pictures, {broad.sum()} mean 9 or more; give some of both")
    cosine = text_emb_qd.astype(np.float32) @ image_emb_nd.astype(np.float32).T
    best = np.argsort(-cosine, axis=1, kind="stable")[:, :TOP]
    found = np.take_along_axis(relevant, best, axis=1)
    return {"r1": float(found[narrow, 0].mean()), "p9": float(found[broad].mean())}
