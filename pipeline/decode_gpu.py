"""Encoded JPEGs in, upright RGB in GPU memory out: `Codec.decode`, and which pictures may go that way: `gpu_pixels`.

The GPU decodes sound JPEGs of one or three components. Everything else takes the CPU stage of the same lane, so that
reasons, marks and pixels have one source. `tests/test_decode_gpu.py` holds the evidence, file by file:

    PNG, WebP, BMP, TIFF, JPEG 2000   nvImageCodec has only CPU decoders for them, and they differ from ours: 16-bit
                                      grey is scaled where Pillow clips, orientation in XMP and WebP is ignored, an APNG
                                      shows another frame; some BMP, TIFF and JPEG 2000 differ or are refused, and a
                                      broken JPEG 2000 has crashed it
    GIF, AVIF, HEIC, ICO              unknown to it
    CMYK JPEG                         up to one level from Pillow
    12 bits, lossless, > 64 Mpixel    unsupported, or decoded at reduced size on the CPU
    no end of image, odd headers      hardware decoders do not tell; simplejpeg does

Chroma is interpolated as libjpeg does (`fancy_upsampling`: without it pixels are up to 91 levels off).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from nvidia import nvimgcodec

from engines.spec import Preprocess
from pipeline.batch import DeviceUnavailable
from pipeline.decode_cpu import JPEG_SCANS_MAX
from pipeline.hardware_share_gpu import allowed
from pipeline.headers import end_is_missing, read_jpeg_header
from pipeline.setting import HARDWARE_SHARE

DECODER = "nvimgcodec"
THIN = 16  # 1 x 60,000 pixels would be resized to 224 x 13 million; the CPU stage computes the crop alone
END_OF_IMAGE = b"\xff\xd9"
START_OF_SCAN = re.compile(rb"\xff\xda")  # a third of the time that bytes.count takes, and it stops at the limit
XMP_ORIENTATION = b"tiff:Orientation"


def gpu_pixels(encoded: bytes, pre: Preprocess) -> int:
    """Pixels of a picture that the GPU decodes as the CPU would; 0 where the CPU stage must look at it."""
    if not encoded.startswith(b"\xff\xd8") or (header := read_jpeg_header(encoded)) is None:
        return 0
    if header.components not in (1, 3) or header.bits != 8 or header.lossless:
        return 0
    short, long = sorted((header.width, header.height))
    if not 0 < long <= THIN * short or short * long > pre.exact_pixels_max:
        return 0
    if header.whole_in_memory and any(islice(START_OF_SCAN.finditer(encoded), JPEG_SCANS_MAX, None)):
        return 0
    # Coded data holds no end mark, so one at the very end is the picture's: 35 us of searching saved for nearly all.
    if not encoded.endswith(END_OF_IMAGE) and end_is_missing("jpeg", encoded):
        return 0
    if header.orientation != 1 and XMP_ORIENTATION in encoded[: header.scan_at]:  # it reads EXIF alone
        return 0
    return short * long


class Codec:
    """nvImageCodec, for one thread at a time: two threads in one Decoder get None or "Broken promise"."""

    def __init__(self, threads: int, stream: int | None, hardware_share: float = HARDWARE_SHARE) -> None:
        """`stream` is the CUDA stream pictures are ordered on, and must outlive them. None: CPU only, host memory.

        At most `hardware_share` of a batch goes to the hardware engine, if there is one; the hybrid decoder shares the
        rest with the CPU.
        """
        self.stream, self.hardware_share = stream, allowed(hardware_share)
        kinds = {nvimgcodec.CPU_ONLY: 1.0}
        if stream is not None:
            if "libnvjpeg.so" not in Path("/proc/self/maps").read_text():  # it says so on stderr, and uses the CPU
                raise DeviceUnavailable("nvImageCodec found no nvJPEG: pip install 'nvidia-nvimgcodec-cu13[nvjpeg]'")
            kinds = {nvimgcodec.HYBRID_CPU_GPU: 1.0, **kinds}
            if self.hardware_share:  # a share of 0 would still make the engine's decoder, and its memory
                kinds = {nvimgcodec.HW_GPU_ONLY: self.hardware_share, **kinds}
        self._decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY if stream is None else 0, max_num_cpu_threads=threads,
            backends=[nvimgcodec.Backend(kind, load_hint=share) for kind, share in kinds.items()],
            options=":fancy_upsampling=1",
        )  # fmt: skip
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=True, color_spec=nvimgcodec.ColorSpec.SRGB)

    def decode(self, encoded: Sequence[bytes]) -> list[Any]:
        """(h, w, 3) uint8 images, None for what it refuses. The host waits for the CPU's part, not for the GPU's.

        The share of the hardware engine is fixed by the size of the first call: make that a full batch.
        """
        images: list[Any] = self._decoder.decode(list(encoded), params=self._params, cuda_stream=self.stream or 0)
        return images

    def upload(self, image_hwc: npt.NDArray[np.uint8]) -> Any:
        """The same kind of image from pixels of the host. Waits for the copy."""
        image = nvimgcodec.as_image(image_hwc)
        return image if self.stream is None else image.cuda(synchronize=True, cuda_stream=self.stream)
