"""Vectors in the index are those of the Hugging Face reference on the same bytes; a wrong pipeline would be noticed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from compare import STORED_SPREAD_ERROR_MAX, assert_same_vectors
from PIL import Image, ImageOps
from runs import index, vectors_by_key
from transformers import AutoImageProcessor, CLIPModel

PHOTOS = ("photo", "format/jpeg_exif_orientation")


class Reference:
    """PIL image processor and fp32 torch, with switches for what a wrong pipeline does."""

    def __init__(self, model: Path) -> None:
        self.processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        self.model = CLIPModel.from_pretrained(model).eval()

    def vectors(self, encoded: list[bytes], *, upright: bool = True, resample: int = 3) -> npt.NDArray[Any]:
        pictures = [Image.open(io.BytesIO(one)) for one in encoded]
        if upright:
            pictures = [ImageOps.exif_transpose(picture) for picture in pictures]
        rgb = [picture.convert("RGB") for picture in pictures]
        pixels = self.processor(images=rgb, return_tensors="pt", resample=resample)["pixel_values"]
        with torch.inference_mode():
            emb = self.model.get_image_features(pixel_values=pixels).pooler_output
        return torch.nn.functional.normalize(emb, dim=-1).numpy()


@pytest.fixture(scope="module")
def photos(shared_data: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Any]:
    """Bytes, indexed vectors and the reference of real photos, a few of them rotated by EXIF."""
    root = tmp_path_factory.mktemp("photos")
    for folder in PHOTOS:
        (root / folder.replace("/", "-")).symlink_to(shared_data / folder)
    ran = index(root, root.parent / "index-of-photos", "--model", tiny_model)
    assert ran.code == 0, ran.stderr
    by_key = vectors_by_key(root.parent / "index-of-photos")
    # Few enough that two swapped rows weigh more than the tolerance: 2 of 60 are .03, 2 of 236 were .008.
    keys = sorted(key for number, key in enumerate(sorted(by_key)) if "orientation" in key or number % 5 == 0)
    return {
        "encoded": [(root / key).read_bytes() for key in keys],
        "emb_nd": np.stack([np.frombuffer(by_key[key][1], np.float16) for key in keys]),
        "reference": Reference(tiny_model),
    }


def test_index_equals_reference(photos: dict[str, Any]) -> None:
    want = photos["reference"].vectors(photos["encoded"])
    assert len(want) > 50
    assert_same_vectors(photos["emb_nd"], want, spread_error_max=STORED_SPREAD_ERROR_MAX)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda ref, encoded: ref.vectors(encoded, upright=False), id="exif ignored"),
        pytest.param(lambda ref, encoded: ref.vectors(encoded, resample=2), id="bilinear for bicubic"),
        pytest.param(
            lambda ref, encoded: ref.vectors(encoded)[[len(encoded) - 1, *range(1, len(encoded) - 1), 0]],
            id="two rows swapped",
        ),
    ],
)
def test_a_wrong_pipeline_is_noticed(photos: dict[str, Any], wrong: Callable[..., npt.NDArray[Any]]) -> None:
    with pytest.raises(AssertionError, match="error/spread"):
        assert_same_vectors(
            photos["emb_nd"], wrong(photos["reference"], photos["encoded"]), spread_error_max=STORED_SPREAD_ERROR_MAX
        )
