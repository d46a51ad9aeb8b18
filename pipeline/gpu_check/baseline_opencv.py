"""The image stage people start with: OpenCV on the CPU, one picture after the other. The baseline of check_gpu.

It does less than ours: no EXIF, no antialias, bilinear. That favours the baseline; its pixels are not ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.spec import Preprocess
from pipeline.gpu_check.rig_gpu import CannotRun

Pixels = npt.NDArray[np.uint8]


class OpenCv:
    """`threads` is OpenCV's own number; decoding a picture takes one in any case."""

    def __init__(self, pre: Preprocess, threads: int = 1) -> None:
        try:
            self.cv2: Any = importlib.import_module("cv2")
        except ImportError as error:
            raise CannotRun(f"the baseline needs OpenCV ({error}): pip install 'nightjar[bench]'") from error
        self.cv2.setNumThreads(threads)
        self.pre = pre
        self.mean = (255 * np.array(pre.mean)).astype(np.float32)
        self.scale = (1 / (255 * np.array(pre.std))).astype(np.float32)

    def decode(self, encoded: bytes) -> Pixels:
        """(h, w, 3) in OpenCV's order: blue, green, red."""
        image: Pixels = self.cv2.imdecode(np.frombuffer(encoded, np.uint8), self.cv2.IMREAD_COLOR)
        return image

    def preprocess(self, image_bgr: Pixels) -> npt.NDArray[np.float32]:
        """(3, S, S): shortest edge to S, centre crop, normalise."""
        size, (height, width) = self.pre.size, image_bgr.shape[:2]
        short = min(height, width)
        target = size * width // short, size * height // short
        small = self.cv2.resize(image_bgr, target, interpolation=self.cv2.INTER_LINEAR)
        left, top = (target[0] - size) // 2, (target[1] - size) // 2
        rgb = self.cv2.cvtColor(small[top : top + size, left : left + size], self.cv2.COLOR_BGR2RGB)
        normalised: npt.NDArray[np.float32] = (rgb.astype(np.float32) - self.mean) * self.scale
        return normalised.transpose(2, 0, 1)

    def batch(self, encoded: Sequence[bytes]) -> npt.NDArray[np.float32]:
        return np.stack([self.preprocess(self.decode(one)) for one in encoded])
