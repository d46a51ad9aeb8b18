"""Decode and preprocess on a GPU: `GpuStages` turns a batch of encoded pictures into rows of an engine's input there.

    decode (nvImageCodec: hardware engine, CUDA, CPU) > resize > crop + normalise + NCHW, into the engine's own buffer

All of it is queued on one stream, and no pixel comes back to the host. What the GPU does not decode (see `decode_gpu`)
takes the CPU stage of this lane and is copied into its row. The host waits for the GPU nowhere here: `out.ready` is
recorded last, the engine's stream waits for it, and the lane waits once per batch, for the vectors. Only a batch of
more than 512 MiB of decoded pixels (900 pictures of 500 x 375, 14 of 12 Mpixel) is done in parts, with a wait between.

No GPU has run this yet. `canary` compares it with known pixels whenever a lane starts, and refuses the lane if they
differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, cast

import cvcuda
import numpy as np
import numpy.typing as npt

from engines.memory_gpu import (
    DeviceArray,
    OutOfGpuMemory,
    Stream,
    copy_to_device,
    copy_to_host,
    device_array,
    has_room,
    pinned_array,
    told_out_of_memory,
)
from engines.spec import Artifact, Preprocess
from pipeline.batch import Batch, DeviceUnavailable, Posted
from pipeline.decode_gpu import DECODER, Codec, gpu_pixels
from pipeline.hardware_share_gpu import VARIABLE
from pipeline.setting import HARDWARE_SHARE
from pipeline.stages_cpu import CpuStages

CACHE_BYTES = 1 << 30  # CV-CUDA keeps freed buffers by exact shape, by default up to half of the GPU
PART_BYTES = 512 << 20  # of decoded pixels in GPU memory at a time, for each of the engine's buffers
DECODER_BYTES = 6  # a pixel: three of RGB, and as many in the planes that a decoder makes it from
NO_FLIP = 2  # 0 would turn pictures upside down
# IDCT, chroma interpolation and resize round each on their own. On the golden pictures at 224, bilinear for bicubic is
# 0.5 to 1.0 levels off on average and more than 4 in 0.05 to 1.7 % of pixels, a shift by one pixel 2.6 and 21 %.
CANARY_MEAN_LEVELS, CANARY_FAR_LEVELS, CANARY_FAR_SHARE = 0.6, 4, 0.001
REMEDY = "Update the NVIDIA driver and nvImageCodec, or go on with --devices cpu"


@dataclass
class Slot:
    """What belongs to one of the engine's buffers. Free to change once `engine.result(slot)` has returned."""

    crops_host: npt.NDArray[np.int32]  # (b, 1, 1, 4) x, y, width, height; page-locked
    crops: DeviceArray
    flips: DeviceArray  # (b, 1)
    rows_host: npt.NDArray[Any] | None = None  # (b, 3, s, s) page-locked; made when the first picture needs it
    held: list[Any] = field(default_factory=list)  # the GPU may still read or write these


class OnStream:
    """A picture in GPU memory that whoever takes it works on in the same stream: one event less for each.

    It does not hold the picture (`Slot.held` does): CV-CUDA caches what was wrapped, by number of rows, and counts it
    as nothing, so pictures of every size of a part that ever occurred would stay in GPU memory.
    """

    def __init__(self, image: Any) -> None:
        self.__cuda_array_interface__ = image.__cuda_array_interface__ | {"stream": -1}
        # Asking the picture for height and width lets go of the interpreter's lock once more each.
        self.shape: tuple[int, int, int] = self.__cuda_array_interface__["shape"]  # (h, w, 3)


class GpuStages:
    """One per lane, on the GPU this process sees; `threads` for what stays on the CPU. For one thread at a time."""

    def __init__(
        self, pre: Preprocess, threads: int, posted: Posted | None = None, hardware_share: float = HARDWARE_SHARE
    ) -> None:
        cvcuda.set_cache_limit_inbytes(CACHE_BYTES)
        self.pre = pre
        self.stream = Stream()
        self.cv_stream = cvcuda.as_stream(self.stream.handle)
        levels = 255 * np.array([pre.mean, pre.std], np.float32)
        self.base, self.scale = self._constant(levels[0]), self._constant(1 / levels[1])
        with told_out_of_memory("the decoder"):
            self.codec = Codec(threads, self.stream.handle, hardware_share)
            self.black = self.codec.upload(np.zeros((pre.size, pre.size, 3), np.uint8))  # stands in for rows of the CPU
        self.slots: dict[int, Slot] = {}
        self.on_cpu = CpuStages(pre, threads, posted)

    def __call__(self, batch: Batch, out: DeviceArray) -> Batch:
        """Fill row i of `out` from picture i; a failed row keeps its place and is zero.

        Raises:
            OutOfGpuMemory: a smaller batch may fit.
        """
        rows, shape = len(batch.ids), (3, self.pre.size, self.pre.size)
        if batch.encoded is None or out.shape[1:] != shape or len(out) < rows:
            have = "no encoded pictures" if batch.encoded is None else f"{rows} pictures"
            raise ValueError(f"expected encoded pictures and a buffer (>= rows, {shape}), got {have}, {out.shape}")
        with told_out_of_memory(f"decoding and resizing {rows} pictures"):
            slot = self._slot(batch.slot, len(out))
            pixels = [gpu_pixels(encoded, self.pre) for encoded in batch.encoded]
            done: set[int] = set()
            for start, stop in parts(pixels):
                if start:  # the one wait on the host, for batches that would not fit in memory at once
                    self.stream.synchronize()
                slot.held.clear()
                done |= self._decode_part(batch, out, slot, pixels, start, stop)
            rest = [row for row in range(rows) if row not in done]
            if rest:
                self._by_cpu(batch, out, slot, rest)
            if done:
                batch.decoders[DECODER] = len(done)
            out.ready.record(self.stream)
        batch.encoded, batch.pixels_rows = None, rows
        return batch

    def close(self) -> None:
        self.stream.synchronize()
        self.on_cpu.close()

    def _decode_part(
        self, batch: Batch, out: DeviceArray, slot: Slot, pixels: Sequence[int], start: int, stop: int
    ) -> set[int]:
        """Rows [start, stop) of `out`; those not in the returned set are black for now."""
        assert batch.encoded is not None
        rows = [row for row in range(start, stop) if pixels[row]]
        if not rows:
            return set()
        decoded = dict(zip(rows, self.codec.decode([batch.encoded[row] for row in rows]), strict=True))
        if len(rows) > 1:  # one that does not fit by itself takes the CPU stage: no batch would be small enough
            self._expect_room([pixels[row] for row, image in decoded.items() if image is None])
        images = [self.black if decoded.get(row) is None else decoded[row] for row in range(start, stop)]
        # Hardware decoders were seen to write without waiting for the stream: a buffer given back while the resize of
        # its last picture is still queued may be overwritten. So all of a batch stays until its vectors are out.
        slot.held.append(images)
        self._resize_crop(images, out.rows(stop, start), slot, start, stop)
        return {row for row, image in decoded.items() if image is not None}

    def _expect_room(self, refused: Sequence[int]) -> None:
        """A full GPU looks like a broken picture: nvImageCodec gives None for both. So ask for what was missing."""
        nbytes = DECODER_BYTES * sum(refused)
        if refused and not has_room(nbytes, self.stream):
            raise OutOfGpuMemory(f"decoding {len(refused)} pictures ({nbytes:,} bytes) does not fit in GPU memory")

    def _resize_crop(self, images: list[Any], out: DeviceArray, slot: Slot, start: int, stop: int) -> None:
        """Shortest edge to S, the long one cut to whole pixels; crop offset int((d - S) / 2); (x - mean) / std."""
        size = self.pre.size
        on_stream = [OnStream(image) for image in images]
        heights, widths, _ = np.array([image.shape for image in on_stream]).T
        short = np.minimum(heights, widths)
        crops_host = slot.crops_host[start:stop]
        crops_host[:, 0, 0, 0] = (size * widths // short - size) // 2
        crops_host[:, 0, 0, 1] = (size * heights // short - size) // 2
        crops_host[:, 0, 0, 2:] = size
        crops, flips = slot.crops.rows(stop, start), slot.flips.rows(stop, start)
        copy_to_device(crops, crops_host, self.stream)
        batch = cvcuda.as_images(on_stream, cvcuda.Format.RGB8)
        small = cvcuda.tvresize(batch, size, cvcuda.Interp.CUBIC, antialias=True, stream=self.cv_stream)
        cvcuda.crop_flip_normalize_reformat_into(
            tensor(out, "NCHW"), small, tensor(crops, "NHWC"), tensor(flips, "NC"), tensor(self.base, "NHWC"),
            tensor(self.scale, "NHWC"), flags=0, stream=self.cv_stream,
        )  # fmt: skip
        slot.held += [batch, small]

    def _by_cpu(self, batch: Batch, out: DeviceArray, slot: Slot, rows: list[int]) -> None:
        """The CPU stage for `rows`, then each into its place, after whatever the GPU has written there."""
        assert batch.encoded is not None
        if slot.rows_host is None:
            slot.rows_host = pinned_array(out.shape, out.dtype)
        failed = {at: batch.failed[row] for at, row in enumerate(rows) if row in batch.failed}
        part = Batch(batch.ids[rows], [batch.encoded[row] for row in rows], failed=failed)
        pixels_nchw = np.empty((len(rows), *out.shape[1:]), np.float32)
        self.on_cpu(part, pixels_nchw)
        slot.rows_host[: len(rows)] = pixels_nchw
        for at, row in enumerate(rows):
            copy_to_device(out.rows(row + 1, row), slot.rows_host[at : at + 1], self.stream)
        batch.failed |= {rows[at]: failure for at, failure in part.failed.items()}
        batch.marks |= {rows[at]: mark for at, mark in part.marks.items()}
        batch.decoders |= part.decoders

    def _slot(self, number: int, rows: int) -> Slot:
        if number not in self.slots:
            shape, flips = (rows, 1, 1, 4), device_array((rows, 1), np.int32)
            flips.fill(np.full((rows, 1), NO_FLIP), self.stream)
            self.slots[number] = Slot(pinned_array(shape, np.int32), device_array(shape, np.int32), flips)
        return self.slots[number]

    def _constant(self, channels: npt.NDArray[np.float32]) -> DeviceArray:
        array = device_array((1, 1, 1, 3), np.float32)
        array.fill(channels.reshape(array.shape), self.stream)
        return array


def tensor(array: DeviceArray, layout: str) -> cvcuda.Tensor:
    """CV-CUDA's view of the same memory. It takes whatever has a CUDA array interface; its stubs do not say so."""
    return cvcuda.as_tensor(cast(cvcuda.ExternalBuffer, array), layout)


def parts(pixels: Sequence[int], limit_bytes: int = PART_BYTES) -> Iterator[tuple[int, int]]:
    """Ranges of rows, together all of them, that each decode to at most `limit_bytes`, or are a single row."""
    start, held_bytes = 0, 0
    for row, count in enumerate(pixels):
        if held_bytes and held_bytes + 3 * count > limit_bytes:
            yield start, row
            start, held_bytes = row, 0
        held_bytes += 3 * count
    yield start, len(pixels)


class Distance(NamedTuple):
    """Of the pixels of one picture, or the worst of several, from the reference."""

    mean_levels: float  # of 255
    far_share: float  # of the values, more than CANARY_FAR_LEVELS off


def canary(stages: GpuStages, artifact: Artifact, buffers: Sequence[DeviceArray]) -> Distance:
    """Known pictures through the stages, one full batch into each of the engine's buffers at once, as the loop does it.

    It warms everything up too: the first batch a decoder sees fixes the share of the hardware engine.

    Raises:
        DeviceUnavailable: a picture is refused, all zero, or further from the reference pixels than rounding explains.
    """
    with np.load(artifact.golden_npz) as golden:
        offsets, whole, pixels = golden["image_offsets"], golden["image_bytes"].tobytes(), golden["pixels"]
    encoded = [whole[start:end] for start, end in pairwise(offsets)]
    known = [number for number, picture in enumerate(encoded) if gpu_pixels(picture, stages.pre)]
    order = [known[row % len(known)] for row in range(len(buffers[0]))]
    without = f"{VARIABLE}=0 leaves the hardware decoder out, if it is that one: make gpu-check tells. "
    remedy = (without if stages.codec.hardware_share else "") + REMEDY
    for slot, out in enumerate(buffers):
        batch = Batch(np.arange(len(order)), [encoded[number] for number in order], slot=slot)
        if stages(batch, out).decoders != {DECODER: len(order)}:
            raise DeviceUnavailable(f"nvImageCodec refused some of {len(order)} JPEGs: {batch.decoders}. {remedy}")
    stages.stream.synchronize()
    levels_per_unit = 255 * np.reshape(stages.pre.std, (3, 1, 1)).astype(np.float32)
    got_nchw, worst = np.empty(buffers[0].shape, buffers[0].dtype), Distance(0.0, 0.0)
    for slot, out in enumerate(buffers):
        copy_to_host(got_nchw, out, stages.stream)
        stages.stream.synchronize()
        for row, number in enumerate(order):
            levels = levels_per_unit * np.abs(got_nchw[row].astype(np.float32) - pixels[number])
            mean, far = float(levels.mean()), float((levels > CANARY_FAR_LEVELS).mean())
            if not (mean <= CANARY_MEAN_LEVELS and far <= CANARY_FAR_SHARE):  # this way round, so that NaN fails
                raise DeviceUnavailable(
                    f"the GPU gives wrong pixels: row {row} of buffer {slot} is {mean:.2f} levels of 255 from the "
                    f"reference on average (allowed {CANARY_MEAN_LEVELS}), {100 * far:.2f} % are more than "
                    f"{CANARY_FAR_LEVELS} off (allowed {100 * CANARY_FAR_SHARE}). {remedy}"
                )
            worst = Distance(max(worst.mean_levels, mean), max(worst.far_share, far))
    return worst
