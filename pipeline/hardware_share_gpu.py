"""How much of a GPU's JPEGs its hardware decoder gets: what its lane was made with, or less where the user says so.

    NIGHTJAR_HARDWARE_SHARE=0 python -m pipeline.index ...    # without that decoder, where it gives wrong pictures

The CUDA decoder takes what it leaves. Lanes inherit the variable; `make gpu-check` sets it by itself where it must.
"""

from __future__ import annotations

import math
import os

from pipeline.batch import DeviceUnavailable

VARIABLE = "NIGHTJAR_HARDWARE_SHARE"


def allowed(share: float) -> float:
    """`share` of a batch, at most what the variable says; 0 leaves the hardware decoder out.

    Raises:
        DeviceUnavailable: the variable is no number from 0 to 1.
    """
    words = os.environ.get(VARIABLE) or "1"
    try:
        most = float(words)
    except ValueError:
        most = math.nan
    if not 0 <= most <= 1:
        raise DeviceUnavailable(
            f"{VARIABLE} is {words!r}, expected a number from 0 to 1: 0 leaves the hardware decoder out"
        )
    return min(share, most)
