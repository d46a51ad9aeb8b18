"""Generated pictures with captions: what the demo model learns and what the demo, the tests and the benchmarks index.

    python -m export.demo_pictures pictures --count 300 --seed 7

writes a folder source, `pictures/<colour>-<shape>/<nnnn>.jpg`, and `pictures-captions.json` beside it. A picture shows
one to four equal shapes in the central square, so that a centre crop cuts off no more than a tip.

The same seed gives the same bytes with the same Pillow. Trade-off: flat shapes on grainy backgrounds teach nothing
about photos, but cost 3 ms each and what they show is known exactly.
Needs numpy and Pillow only.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from export.demo_captions import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    HELD_OUT,
    PAIRS,
    POSITIONS,
    SHAPES,
    SIZES,
    TOP,
    Attributes,
    Query,
    full_query,
    phrase,
    relevance,
)

RGB: TypeAlias = tuple[int, int, int]

INKS: dict[str, RGB] = {
    "red": (215, 35, 35),
    "yellow": (245, 225, 50),
    "green": (45, 165, 65),
    "blue": (45, 85, 220),
    "purple": (130, 50, 175),
    "cyan": (55, 205, 215),
}
PAPERS: dict[str, RGB] = {"white": (244, 244, 244), "gray": (130, 130, 130), "black": (14, 14, 14)}
CORNERS: dict[str, tuple[int, int]] = {
    "middle": (0, 0), "top left": (-1, -1), "top right": (1, -1), "bottom left": (-1, 1), "bottom right": (1, 1),
}  # fmt: skip


def _ring_of_points(count: int, radii: Sequence[float], start_deg: float) -> npt.NDArray[np.float64]:
    angle = np.radians(start_deg + 360 * np.arange(count) / count)
    radius = np.resize(np.array(radii), count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


# Outlines in a unit circle, y down; all of about the same area, so that size says nothing about shape.
OUTLINES: dict[str, npt.NDArray[np.float64]] = {
    "circle": _ring_of_points(64, [0.92], 0),
    "square": _ring_of_points(4, [1.15], 45),
    "triangle": _ring_of_points(3, [1.2], -90),
    "star": _ring_of_points(10, [1.2, 0.5], -90),
    "cross": np.array([(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1),
                       (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]) / 3,
    "ring": _ring_of_points(64, [1.0], 0),
}  # fmt: skip
RING_HOLE = 0.55


class Picture(NamedTuple):
    image: Image.Image
    caption: str
    attributes: Attributes


@dataclass(frozen=True)
class Record:
    """One written picture."""

    file: str  # relative to the folder, the key a folder source gives it
    caption: str
    attributes: Attributes
    width: int
    height: int


def training_attributes(rng: np.random.Generator) -> Attributes:
    """Anything but a held-out combination."""
    while (drawn := random_attributes(rng)).held_out:
        pass
    return drawn


def random_attributes(rng: np.random.Generator) -> Attributes:
    colour, shape = PAIRS[int(rng.integers(len(PAIRS)))]
    return complete_attributes(rng, colour, shape, 1 if rng.random() < 0.6 else int(rng.integers(2, 5)))


def complete_attributes(
    rng: np.random.Generator, colour: str, shape: str, count: int, background: str = ""
) -> Attributes:
    background = background or str(rng.choice(BACKGROUNDS))
    if count > 1:
        return Attributes(colour, shape, background, count)
    return Attributes(colour, shape, background, 1, str(rng.choice(SIZES)), str(rng.choice(POSITIONS)))


def random_short_edge(rng: np.random.Generator) -> int:
    """Pixels: a tenth tiny, most like a thumbnail or a web photo, one in fifty like a camera's."""
    kind = rng.random()
    low, high = (64, 200) if kind < 0.1 else (200, 460) if kind < 0.98 else (900, 2250)
    return int(rng.integers(low, high + 1))


def make_picture(
    rng: np.random.Generator, attributes: Attributes | None = None, short_edge: int | None = None
) -> Picture:
    """Draw one picture; what is not given is drawn from `rng`. Edges are 64 to 3000 pixels, ratios up to 4:3."""
    attributes = attributes or random_attributes(rng)
    short = short_edge or random_short_edge(rng)
    long = int(short * rng.uniform(1.0, 4 / 3))
    width, height = (short, long) if rng.random() < 0.4 else (long, short)

    # A background of 12 x 12 random greys blown up: gradients and blotches for the price of one resize.
    grain = np.array(PAPERS[attributes.background]) + rng.normal(0, 7, (12, 12, 1)) + rng.normal(0, 2, (12, 12, 3))
    image = Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    ink = np.clip(np.array(INKS[attributes.colour]) + rng.integers(-14, 15, 3), 0, 255)
    image.paste((int(ink[0]), int(ink[1]), int(ink[2])), mask=_mask(rng, attributes, width, height))
    return Picture(image, full_query(attributes).text, attributes)


def _mask(rng: np.random.Generator, attributes: Attributes, width: int, height: int) -> Image.Image:
    side = min(width, height)
    fine = 4 if side < 160 else 2 if side < 320 else 1  # smooth edges where a pixel matters
    mask = Image.new("L", (width * fine, height * fine))
    draw = ImageDraw.Draw(mask)
    middle = np.array([width, height]) * fine / 2
    for x, y, radius in _places(rng, attributes):
        turn = np.radians(rng.uniform(-8, 8))
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        outline = OUTLINES[attributes.shape] @ rotation * radius * side * fine
        centre = middle + np.array([x, y]) * side * fine
        draw.polygon([(float(px), float(py)) for px, py in outline + centre], fill=255)
        if attributes.shape == "ring":
            draw.polygon([(float(px), float(py)) for px, py in outline * RING_HOLE + centre], fill=0)
    return mask.reduce(fine) if fine > 1 else mask


def _places(rng: np.random.Generator, attributes: Attributes) -> Iterator[tuple[float, float, float]]:
    """(x, y, radius) of each shape, in short edges from the centre."""
    if attributes.count > 1:  # distinct quarters, so that shapes never touch
        for corner in rng.permutation(4)[: attributes.count]:
            dx, dy = rng.uniform(-0.03, 0.03, 2)
            yield (0.25 if corner & 1 else -0.25) + dx, (0.25 if corner & 2 else -0.25) + dy, rng.uniform(0.18, 0.21)
        return
    column, row = CORNERS[attributes.position]
    reach, radius = (0.25, rng.uniform(0.17, 0.2)) if attributes.size == "small" else (0.13, rng.uniform(0.31, 0.35))
    dx, dy = rng.uniform(-0.025, 0.025, 2)
    yield column * reach + dx, row * reach + dy, radius


def encode_picture(image: Image.Image, rng: np.random.Generator) -> tuple[bytes, str]:
    """(file bytes, extension): mostly JPEG of mixed quality and chroma subsampling, some PNG and WebP."""
    kind, quality, subsampling = rng.random(), int(rng.integers(60, 96)), int(rng.integers(3))
    out = io.BytesIO()
    if kind < 0.94:
        image.save(out, "JPEG", quality=quality, subsampling=subsampling)
        return out.getvalue(), "jpg"
    extension = "png" if kind < 0.97 else "webp"
    image.save(out, extension.upper(), **({"compress_level": 1} if extension == "png" else {"quality": quality}))
    return out.getvalue(), extension


def write_pictures(folder: Path, count: int, seed: int) -> list[Record]:
    """Write `count` pictures, spread evenly over all pairs of colour and shape, and `<folder>-captions.json`."""
    if count < 1:
        raise ValueError(f"count is {count}, expected at least 1 picture")
    order = np.random.default_rng([seed, 0]).permutation(len(PAIRS))
    wanted = []
    for i in range(count):
        rng = np.random.default_rng([seed, 1, i])
        colour, shape = PAIRS[order[i % len(PAIRS)]]
        wanted.append(complete_attributes(rng, colour, shape, 1 if rng.random() < 0.6 else int(rng.integers(2, 5))))
    return write_these(folder, wanted, seed)


def write_these(folder: Path, wanted: Sequence[Attributes], seed: int) -> list[Record]:
    records = []
    for i, attributes in enumerate(wanted):
        rng = np.random.default_rng([seed, 2, i])
        picture = make_picture(rng, attributes)
        content, extension = encode_picture(picture.image, rng)
        file = f"{attributes.label}/{i:04d}.{extension}"
        (folder / attributes.label).mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
        records.append(Record(file, picture.caption, attributes, *picture.image.size))
    captions = folder.with_name(folder.name + "-captions.json")  # beside the folder: a source indexes all that is in it
    captions.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    return records


@dataclass(frozen=True)
class Gallery:
    """Held-out pictures on disk and what to ask about them."""

    folder: Path
    records: list[Record]
    queries: dict[str, list[Query]]  # "seen" and "unseen": naming combinations that training drew, or never drew


def held_out_gallery(folder: Path, seed: int = 1000) -> Gallery:
    """Write 1,080 pictures that no training drew, and `<folder>-captions.json`."""
    wanted = held_out_attributes(seed)
    return Gallery(folder, write_these(folder, wanted, seed), held_out_queries(wanted))


def held_out_attributes(seed: int) -> list[Attributes]:
    """Thirty pictures of each pair of colour and shape, ten on each background, eighteen of them single shapes."""
    rng = np.random.default_rng([seed, 3])
    counts = [1] * 18 + [2] * 4 + [3] * 4 + [4] * 4
    return [
        complete_attributes(rng, colour, shape, count, BACKGROUNDS[number % len(BACKGROUNDS)])
        for number, count in enumerate(counts)
        for colour, shape in PAIRS
    ]


def held_out_queries(wanted: Sequence[Attributes]) -> dict[str, list[Query]]:
    """The full captions of all pictures, and all short texts of some common forms that mean at least nine of them."""
    texts = [phrase(colour=colour, shape=shape, counts=counts) for colour, shape in PAIRS for counts in ((1,), ())]
    texts += [phrase(colour=colour, shape=shape, background=paper) for colour, shape in PAIRS for paper in BACKGROUNDS]
    for shape in SHAPES:
        texts += [phrase(shape=shape, counts=(count,)) for count in (1, *COUNTS)]
        texts += [phrase(shape=shape, counts=(1,), background=background) for background in BACKGROUNDS]
        texts += [phrase(shape=shape, counts=(1,), size=size) for size in SIZES]
    for colour in COLOURS:
        texts += [phrase(colour=colour, counts=(count,)) for count in (1, *COUNTS)]
        texts += [phrase(colour=colour, counts=(1,), position=position) for position in POSITIONS]
    broad = [text for text, meant in zip(texts, relevance(texts, wanted).sum(1), strict=True) if meant >= TOP]
    queries: dict[str, list[Query]] = {"seen": [], "unseen": []}
    for query in [full_query(attributes) for attributes in wanted] + broad:
        unseen = (query.colour, query.shape, query.background) in HELD_OUT
        queries["unseen" if unseen else "seen"].append(query)
    return queries


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m export.demo_pictures",
        description="Write generated pictures as a folder source, and their captions beside it.",
        epilog="example: python -m export.demo_pictures pictures --count 300 --seed 7",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder for the pictures, made when missing")
    parser.add_argument("--count", type=int, default=300, help="pictures to write (default %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="same seed, same pictures (default %(default)s)")
    args = parser.parse_args()
    records = write_pictures(args.folder, args.count, args.seed)
    print(f"{len(records)} pictures in {args.folder}, such as {records[0].file}: {records[0].caption}")


if __name__ == "__main__":
    main()
