"""Stands in for CV-CUDA: the five calls of `pipeline.stages_gpu`, on host memory, with Pillow's bicubic."""

from __future__ import annotations

import ctypes
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

cache_limit = 0


class Format(Enum):
    RGB8 = 1


class Interp(Enum):
    CUBIC = 1


class ExternalBuffer: ...


Tensor = npt.NDArray[Any]


def set_cache_limit_inbytes(limit: int) -> None:
    global cache_limit
    cache_limit = limit


def as_stream(handle: int) -> int:
    return handle


def as_tensor(buffer: Any, layout: str) -> Tensor:
    """A view, as the real one is."""
    interface = buffer.__cuda_array_interface__
    assert interface["stream"] == -1
    assert len(layout) == len(interface["shape"])
    dtype = np.dtype(interface["typestr"])
    nbytes = int(np.prod(interface["shape"])) * dtype.itemsize
    block = (ctypes.c_uint8 * nbytes).from_address(interface["data"][0])
    return np.frombuffer(block, dtype).reshape(interface["shape"])


def as_images(buffers: list[Any], format: Format) -> list[npt.NDArray[np.uint8]]:
    assert format is Format.RGB8
    return [np.asarray(buffer.image) for buffer in buffers]


def tvresize(
    src: list[npt.NDArray[np.uint8]], size: int, interp: Interp, *, antialias: bool, stream: int
) -> list[npt.NDArray[np.uint8]]:
    assert interp is Interp.CUBIC
    assert antialias
    made = []
    for image in src:
        height, width = image.shape[:2]
        short = min(height, width)
        small = (size * width // short, size * height // short)
        made.append(np.asarray(Image.fromarray(image).resize(small, Image.Resampling.BICUBIC)))
    return made


def crop_flip_normalize_reformat_into(
    dst: Tensor, src: list[npt.NDArray[np.uint8]], rect: Tensor, flip_code: Tensor, base: Tensor, scale: Tensor, *,
    flags: int, stream: int,
) -> Tensor:  # fmt: skip
    assert len(dst) == len(src) == len(rect) == len(flip_code)
    assert flags == 0
    for out, image, (x, y, width, height), (flip,) in zip(dst, src, rect[:, 0, 0], flip_code, strict=True):
        assert flip not in (-1, 0, 1)
        crop = image[y : y + height, x : x + width].astype(np.float32)
        out[:] = ((crop - base[0, 0, 0]) * scale[0, 0, 0]).transpose(2, 0, 1)
    return dst
