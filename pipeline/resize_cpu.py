"""Exact resize and crop on the host: the uint8 pixels of the reference, bit for bit.

The reference is the PIL image processor of Hugging Face: shortest edge to S by bicubic with antialias on uint8, long
edge int(S * long / short), centre crop. `resize.c`, compiled when the package is installed, gives Pillow's bits at an
eighth of its time (500 x 375 to 224: 0.4 ms instead of 3.0 on one core) and gives the GIL back, so a pool of threads
scales. Where there was no C compiler, Pillow itself resizes, and numpy what Pillow would blow up.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import c_int, c_int64, c_ssize_t, c_void_p
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from engines.spec import Preprocess
from pipeline.decode_cpu import Pixels

log = logging.getLogger(__name__)

CUBIC_SUPPORT = 2.0
WEIGHT_BITS = 22  # Pillow's PRECISION_BITS
PILLOW_AREA_MAX = 64  # times the crop: a picture of 1 x 60,000 would grow to 224 x 13 million
REMEDY = "Install gcc (apt-get install gcc), then this package once more"


def resize_crop(image_hwc: Pixels, pre: Preprocess) -> Pixels:
    """(3, S, S). The picture may be a rotated or mirrored view; nothing outside the crop is computed."""
    size, (height, width) = pre.size, image_hwc.shape[:2]
    if height <= width:
        out_height, out_width = size, int(size * width / height)
    else:
        out_height, out_width = int(size * height / width), size
    # Pillow 13 takes the vertical pass first where that leaves less to do. The intermediate is rounded and clipped
    # to uint8, so the order is part of the reference: it moves pixels of a tall noisy picture by 20 levels.
    vertical_first = height - out_height > 2 * max(0, width - out_width)
    kernel = compiled_kernel()
    if kernel is None and out_height * out_width <= PILLOW_AREA_MAX * size * size:
        whole = Image.fromarray(np.ascontiguousarray(image_hwc)).resize(
            (out_width, out_height), Image.Resampling.BICUBIC
        )
        top, left = (out_height - size) // 2, (out_width - size) // 2
        return np.ascontiguousarray(np.asarray(whole)[top : top + size, left : left + size].transpose(2, 0, 1))
    if kernel is None:
        return resize_crop_numpy(image_hwc, out_height, out_width, size, vertical_first=vertical_first)
    resized_chw = np.empty((3, size, size), np.uint8)
    row_stride, col_stride, channel_stride = image_hwc.strides
    assert channel_stride == 1, f"expected interleaved RGB, got strides {image_hwc.strides}"
    code = kernel(
        image_hwc.ctypes.data, height, width, row_stride, col_stride, out_height, out_width, size, vertical_first,
        resized_chw.ctypes.data,
    )  # fmt: skip
    if code:
        raise MemoryError(f"no memory to resize a picture of {width} x {height}")
    return resized_chw


@lru_cache(maxsize=1)
def compiled_kernel() -> Any:
    """`nightjar_resize_crop` of resize.c; None where it was not compiled."""
    found = find_spec("pipeline._resize")  # a plain shared library, not a Python module: found, never imported
    if found is None or found.origin is None:
        log.warning(
            "pictures are resized 8 times slower than they could be: pipeline/resize.c was not compiled. %s", REMEDY
        )
        return None
    kernel = ctypes.CDLL(found.origin).nightjar_resize_crop
    kernel.argtypes = [c_void_p, c_int, c_int, c_ssize_t, c_ssize_t, c_int64, c_int64, c_int, c_int, c_void_p]
    return kernel


def resize_crop_numpy(image_hwc: Pixels, out_height: int, out_width: int, size: int, *, vertical_first: bool) -> Pixels:
    """What resize.c does, in numpy: the crop alone, 40 times slower."""
    rows, cols = taps(image_hwc.shape[0], out_height, size), taps(image_hwc.shape[1], out_width, size)
    shown = image_hwc[rows.start : rows.stop, cols.start : cols.stop]
    if vertical_first:
        done = _down(_down(shown, rows).transpose(1, 0, 2), cols).transpose(1, 0, 2)
    else:
        done = _down(_down(shown.transpose(1, 0, 2), cols).transpose(1, 0, 2), rows)
    return np.ascontiguousarray(done.transpose(2, 0, 1))


class Taps(NamedTuple):
    """Output i is the sum over k of weight[i, k] times source pixel first[i] + k, counted from `start`."""

    start: int
    stop: int
    first: npt.NDArray[np.int64]
    weight: npt.NDArray[np.int32]  # (size, most), zero where there is no tap


def taps(length: int, out_length: int, size: int) -> Taps:
    """For the middle `size` of `out_length` pixels: Pillow's bicubic (a = -1/2), its weights rounded to 22 bits."""
    scale = length / out_length
    stretch = max(scale, 1.0)  # of the filter, when it has to average
    centre = ((out_length - size) // 2 + np.arange(size) + 0.5) * scale
    first = np.maximum(centre - CUBIC_SUPPORT * stretch + 0.5, 0).astype(np.int64)
    end = np.minimum((centre + CUBIC_SUPPORT * stretch + 0.5).astype(np.int64), length)
    at = first[:, None] + np.arange(int((end - first).max()))
    x = np.abs((at - centre[:, None] + 0.5) * (1 / stretch))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    exact = np.where(x < 1, near, np.where(x < 2, far, 0)) * (at < end[:, None])
    exact /= np.add.accumulate(exact, axis=1)[:, -1:]  # one after the other, as Pillow adds them
    start, stop = int(first[0]), int(end[-1])
    weight = np.trunc(exact * (1 << WEIGHT_BITS) + np.copysign(0.5, exact)).astype(np.int32)
    return Taps(start, stop, first - start, weight)


def _down(image_hwc: Pixels, rows: Taps) -> Pixels:
    """The vertical pass: one half, then every tap of all rows at once."""
    sum_hwc = np.full((len(rows.first), *image_hwc.shape[1:]), 1 << (WEIGHT_BITS - 1), np.int32)
    for k in range(rows.weight.shape[1]):
        source = np.minimum(rows.first + k, len(image_hwc) - 1)
        sum_hwc += rows.weight[:, k, None, None] * image_hwc[source]
    return (sum_hwc >> WEIGHT_BITS).clip(0, 255).astype(np.uint8)
