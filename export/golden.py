"""The proof an artifact carries: pictures, texts, what the original model makes of them. No pickle; 24 MB.

    golden = np.load("golden/golden.npz")
    image_bytes    (total,) uint8: the encoded pictures, number i at [image_offsets[i]:image_offsets[i + 1]]
    image_offsets  (n + 1,) int64
    image_names    (n,) unicode: what is special about each
    pixels         (n, 3, s, s) float32: Hugging Face's PIL image processor on the upright picture, converted to RGB
    image_vectors  (n, d) float32, unit norm: Hugging Face's fp32 model on those pixels
    texts          (m,) unicode, ids (m, context) int32, text_vectors (m, d) float32, unit norm: likewise

The first twelve pictures cover what a decoder and a resizer can get wrong: both orientations, enlarging, extreme
shapes, chroma subsampling, grey, palette, alpha, progressive scans and an EXIF rotation. The others make the set large
enough to ask which nine are nearest. They are made from seeded noise of several scales, gradients and shapes, so
nobody's photos travel with a model.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageOps

from engines.spec import Preprocess
from export.source import ExportError, quiet_transformers
from export.towers import Towers

EXIF_ORIENTATION = 0x0112
PIXEL_ERROR_MAX = 1e-5  # after normalisation, where a level is 0.015
TEXTS = (
    "a photo of a cat",
    "a red circle on a blue background",
    "three small green squares in the top left corner",
    "an aerial view of a harbour at night, with many boats",
    "Passer domesticus",
    "7 x 7 = 49!",
    "",
    "a very long text " * 30,  # must be cut to the context, keeping its end token
)


@dataclass(frozen=True)
class Sample:
    name: str
    size_wh: tuple[int, int]
    mode: str = "RGB"
    format: str = "JPEG"
    save: dict[str, Any] = field(default_factory=dict)
    orientation: int = 1


SAMPLES = (
    Sample("jpeg 4:2:0 landscape", (640, 480), save={"quality": 90, "subsampling": 2}),
    Sample("jpeg 4:4:4 portrait", (375, 500), save={"quality": 95, "subsampling": 0}),
    Sample("jpeg 4:2:2 odd size", (501, 335), save={"quality": 85, "subsampling": 1}),
    Sample("jpeg progressive", (500, 334), save={"quality": 80, "progressive": True}),
    Sample("jpeg grey", (300, 400), mode="L", save={"quality": 90}),
    Sample("jpeg turned by exif", (480, 320), save={"quality": 90}, orientation=6),
    Sample("jpeg mirrored and turned by exif", (320, 470), save={"quality": 90}, orientation=7),
    Sample("jpeg wide", (900, 150), save={"quality": 90}),
    Sample("png to enlarge", (71, 90), format="PNG"),
    Sample("png palette", (256, 256), mode="P", format="PNG"),
    Sample("png alpha", (260, 410), mode="RGBA", format="PNG"),
    Sample("png grey square", (224, 224), mode="L", format="PNG"),
    *(Sample(f"jpeg {number}", (320 + 7 * number, 400 - 9 * number), save={"quality": 90}) for number in range(24)),
)


def make_golden(towers: Towers) -> dict[str, npt.NDArray[Any]]:
    """The arrays of golden.npz for a model."""
    encoded = [encode(sample, seed) for seed, sample in enumerate(SAMPLES)]
    processor = quiet_transformers().CLIPImageProcessorPil.from_pretrained(towers.source)
    pictures = [upright(data) for data in encoded]
    pixels = np.concatenate([processor(picture, return_tensors="np")["pixel_values"] for picture in pictures])
    _check_pixels(towers, pictures, pixels)
    context = towers.spec.context_length
    tokens = towers.tokenizer(list(TEXTS), padding="max_length", truncation=True, max_length=context)
    ids = np.array(tokens["input_ids"], np.int32)
    with torch.inference_mode():
        image_vectors = towers.hf.get_image_features(torch.from_numpy(pixels)).pooler_output
        text_vectors = towers.hf.get_text_features(torch.from_numpy(ids)).pooler_output
    return {
        "image_bytes": np.frombuffer(b"".join(encoded), np.uint8),
        "image_offsets": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        "image_names": np.array([sample.name for sample in SAMPLES]),
        "pixels": pixels.astype(np.float32),
        "image_vectors": _unit(image_vectors),
        "texts": np.array(TEXTS),
        "ids": ids,
        "text_vectors": _unit(text_vectors),
    }


def upright(encoded: bytes) -> Image.Image:
    """The one policy for a picture's pixels: turned as EXIF says, then RGB as Pillow converts it."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")


def plain_pixels(picture: Image.Image, preprocess: Preprocess) -> npt.NDArray[np.float64]:
    """(3, s, s): what spec.json says is done to a picture, and nothing else."""
    size, (width, height) = preprocess.size, picture.size
    wide, high = (int(size * edge / min(width, height)) for edge in (width, height))
    left, top = (wide - size) // 2, (high - size) // 2
    resized = picture.resize((wide, high), Image.Resampling.BICUBIC)
    levels = np.asarray(resized.crop((left, top, left + size, top + size)), np.float64).transpose(2, 0, 1)
    mean, std = (np.array(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    scaled: npt.NDArray[np.float64] = (levels / 255 - mean) / std
    return scaled


def _check_pixels(towers: Towers, pictures: list[Image.Image], pixels_nchw: npt.NDArray[Any]) -> None:
    want_nchw = np.stack([plain_pixels(picture, towers.spec.preprocess) for picture in pictures])
    same_shape = pixels_nchw.shape == want_nchw.shape
    error = float(np.abs(pixels_nchw - want_nchw).max()) if same_shape else math.inf
    if not error <= PIXEL_ERROR_MAX:
        raise ExportError(
            f"{towers.source}: its image processor makes other pixels than shortest edge, bicubic, centre crop, mean "
            f"and std do: shape {pixels_nchw.shape[1:]}, expected {want_nchw.shape[1:]}; largest difference "
            f"{error:.2e}, allowed {PIXEL_ERROR_MAX:g}. Nothing else is reproduced exactly"
        )


def encode(sample: Sample, seed: int) -> bytes:
    picture = draw(np.random.default_rng(seed), *sample.size_wh)
    if sample.mode == "RGBA":
        picture.putalpha(picture.convert("L"))
    exif = Image.Exif()
    if sample.orientation != 1:
        exif[EXIF_ORIENTATION] = sample.orientation
    buffer = io.BytesIO()
    picture.convert(sample.mode).save(buffer, sample.format, exif=exif, **sample.save)
    return buffer.getvalue()


def draw(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Structure at every scale, and another palette each time: pictures that a model can tell apart."""
    across, down = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    slopes = across[..., None] * rng.normal(0, 40, 3) + down[..., None] * rng.normal(0, 40, 3)
    canvas = rng.uniform(60, 195, 3) + slopes
    for cell, strength in ((2, 12), (9, 25), (40, 45)):
        coarse = rng.normal(0, strength, (height // cell + 2, width // cell + 2, 3)) + 128
        layer = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        canvas += np.asarray(layer, np.float64) - 128
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for shape in (pen.rectangle, pen.ellipse) * 3:
        left, top = rng.uniform(0, 0.8, 2) * (width, height)
        wide, high = rng.uniform(0.05, 0.4, 2) * (width, height)
        shape((left, top, left + wide, top + high), fill=tuple(int(level) for level in rng.integers(0, 256, 3)))
    return picture


def _unit(vectors: torch.Tensor) -> npt.NDArray[np.float32]:
    unit: npt.NDArray[np.float32] = (vectors / vectors.norm(dim=-1, keepdim=True)).numpy()
    return unit
