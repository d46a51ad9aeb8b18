"""The one place where numbers are compared, with every tolerance named and its reason beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# One level of 255: Pillow's resampler works in fixed point, torch's on the same weights rounds the other way at .5.
PIXEL_LEVELS_MAX = 1.0
# Mean error of a vector relative to the spread of the set it belongs to. Plain cosine hides errors: with random
# weights different pictures already have cosine 0.99.
SPREAD_ERROR_MAX = {"fp32": 0.001, "fp16": 0.01, "bf16": 0.06, "int8": 0.25}
# float16 storage alone: 11 bits of mantissa on components of a unit vector.
STORED_SPREAD_ERROR_MAX = 0.01


def spread_error(got_nd: npt.NDArray[Any], want_nd: npt.NDArray[Any]) -> float:
    """Mean distance between `got` and `want`, in units of the mean distance of `want` from its own centre."""
    got, want = got_nd.astype(np.float64), want_nd.astype(np.float64)
    if got.shape != want.shape or got.ndim != 2 or len(got) < 2:
        raise AssertionError(f"need two equal (n >= 2, d) sets, got {got.shape} and {want.shape}")
    spread = np.linalg.norm(want - want.mean(0), axis=1).mean()
    if not spread > 0:
        raise AssertionError("the wanted vectors are all equal: nothing can be told apart with them")
    return float(np.linalg.norm(got - want, axis=1).mean() / spread)


def assert_same_vectors(got_nd: npt.NDArray[Any], want_nd: npt.NDArray[Any], *, spread_error_max: float) -> None:
    error = spread_error(got_nd, want_nd)
    assert error <= spread_error_max, f"error/spread is {error:.5f}, allowed {spread_error_max}"


def assert_pixels_close(
    got: npt.NDArray[Any], want: npt.NDArray[Any], *, levels_max: float = PIXEL_LEVELS_MAX
) -> None:
    """`got` and `want` are pictures in levels of 0 to 255, before normalisation."""
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    worst = float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max())
    assert worst <= levels_max, f"pixels differ by up to {worst:.3f} levels, allowed {levels_max}"
