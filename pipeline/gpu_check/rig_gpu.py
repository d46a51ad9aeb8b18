"""What the first-contact checks share: the decoder and operators of a GPU stage, pictures, and the reference pixels.

Used by `probes_gpu` and the measurements, which `python -m pipeline.gpu_check` runs. Never run on a GPU yet. torch
holds memory and streams here only because every host that gets a first check has it; the GPU lane works without.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

WHOLE_S = 480.0  # a whole check takes no longer
SIZE = 224
DEVICE = "cuda:0"
# How far pixels may be from the reference, in levels of 255: IDCT, upsampling and resize each round on their own.
MEAN_LEVELS_MAX, P999_LEVELS_MAX = 0.6, 4.0
ENGINE, HYBRID, LOSSLESS, CPU = "HW_GPU_ONLY", "HYBRID_CPU_GPU", "GPU_ONLY", "CPU_ONLY"

Levels = npt.NDArray[np.float32]


class Job(NamedTuple):
    work: Path  # scratch folder of this run: generated pictures, models, indexes
    pictures: Path | None  # the user's own JPEG files
    limit_s: float = WHOLE_S  # this part is ended after so many seconds


class Finding(NamedTuple):
    ok: bool
    answer: str
    evidence: dict[str, Any]


class CannotRun(Exception):
    """The check does not apply here; the message says why."""


def tell(**evidence: Any) -> None:
    """Hand over what is measured so far, so that it is kept whatever happens to the rest of this part."""
    print(json.dumps({"evidence": evidence}), flush=True)


def module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CannotRun(f"{name} cannot be imported: {error}") from error


def mixed(engine_share: float = 0.65) -> list[tuple[str, float]]:
    """All four backends: what one refuses, the next tries; the hardware engine gets `engine_share` of a batch."""
    return [(ENGINE, engine_share), (HYBRID, 1.0), (LOSSLESS, 1.0), (CPU, 1.0)]


class Decoder:
    """nvImageCodec on one stream. The stream must outlive the images: their memory is freed on it."""

    def __init__(self, backends: Sequence[tuple[str, float]]) -> None:
        self.torch, self.codec = module("torch"), module("nvidia.nvimgcodec")
        self.stream = self.torch.cuda.Stream(self.torch.device(DEVICE))
        chosen = [self.codec.Backend(getattr(self.codec, kind), load_hint=share) for kind, share in backends]
        self.decoder = self.codec.Decoder(device_id=0, backends=chosen, options=":fancy_upsampling=1")
        self.params = self.codec.DecodeParams(apply_exif_orientation=True, color_spec=self.codec.ColorSpec.SRGB)

    def decode(self, encoded: Iterable[bytes]) -> list[Any]:
        """One image or None per picture; the GPU may still be at work on them."""
        found = self.decoder.decode(list(encoded), params=self.params, cuda_stream=self.stream.cuda_stream)
        return list(found)

    def to_host(self, image: Any) -> npt.NDArray[np.uint8]:
        self.stream.synchronize()
        return np.array(image.cpu())


class Rig(Decoder):
    """Decoder and CV-CUDA operators in the order a GPU stage uses them, all on one stream."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__(mixed())
        self.size = size
        self.cv = module("cvcuda")
        self.cv.set_cache_limit_inbytes(2 << 30)
        self.cv_stream = self.cv.as_stream(self.stream)

    def wrap(self, tensor: Any, layout: str) -> Any:
        """A torch tensor as CV-CUDA's, saying which stream it belongs to: else CV-CUDA waits for the whole device."""

        class Holder:
            owner = tensor
            __cuda_array_interface__ = tensor.__cuda_array_interface__ | {
                "version": 3,
                "stream": self.stream.cuda_stream,
            }

        return self.cv.as_tensor(Holder(), layout)

    def images(self, decoded: Sequence[Any]) -> Any:
        return self.cv.as_images(list(decoded), format=self.cv.Format.RGB8)

    def resize(self, images: Any) -> Any:
        return self.cv.tvresize(images, self.size, self.cv.Interp.CUBIC, antialias=True, stream=self.cv_stream)

    def crop(self, small: Any, out: Any, mean: Sequence[float], std: Sequence[float]) -> list[Any]:
        """Centre crop and (x - mean) / std into `out`, (n, 3, size, size); keep what is returned until it has run."""
        torch, n = self.torch, len(out)
        rect = np.empty((n, 1, 1, 4), np.int32)
        rect[:, 0, 0, :2] = (np.array([image.size for image in small], np.int32) - self.size) // 2
        rect[:, 0, 0, 2:] = self.size
        with torch.cuda.stream(self.stream):
            held = [
                torch.from_numpy(rect).to(out.device),
                torch.full((n, 1), 2, dtype=torch.int32, device=out.device),  # 2: no flip (0 would be upside down)
                torch.tensor(mean, dtype=torch.float32, device=out.device).reshape(1, 1, 1, 3),
                torch.tensor([1 / s for s in std], dtype=torch.float32, device=out.device).reshape(1, 1, 1, 3),
            ]
            rect_cv, flip, base, scale = map(self.wrap, held, ("NHWC", "NC", "NHWC", "NHWC"))
            self.cv.crop_flip_normalize_reformat_into(
                self.wrap(out, "NCHW"), small, rect_cv, flip, base, scale, flags=0, stream=self.cv_stream
            )
        return [*held, small]

    def pixels(self, decoded: Sequence[Any], mean: Sequence[float], std: Sequence[float], dtype: str) -> Any:
        """Preprocess and wait; the (n, 3, size, size) tensor."""
        device = self.torch.device(DEVICE)
        out = self.torch.zeros((len(decoded), 3, self.size, self.size), dtype=getattr(self.torch, dtype), device=device)
        self.torch.cuda.synchronize()
        images = self.images(decoded)
        held = self.crop(self.resize(images), out, mean, std)
        self.stream.synchronize()
        del held, images
        return out

    def levels(self, decoded: Sequence[Any]) -> Levels:
        found: Levels = self.pixels(decoded, (0, 0, 0), (1, 1, 1), "float32").cpu().numpy()
        return found


def jpeg(width: int, height: int, seed: int, orientation: int = 1) -> bytes:
    """A picture with coarse colours, edges and grain; 500 x 375 gives about 80 kB."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-14, 15, (height, width, 1), dtype=np.int16)
    picture = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture.save(out, "JPEG", quality=90, exif=exif)
    return out.getvalue()


def upright(encoded: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")


def shrink(picture: Image.Image, target: int = SIZE) -> Levels:
    """The reference: shortest edge to `target`, bicubic on uint8, long edge and crop offset cut to whole pixels."""
    width, height = picture.size
    short = min(width, height)
    size = (target * width // short, target * height // short)
    left, top = (size[0] - target) // 2, (size[1] - target) // 2
    small = picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + target, top + target))
    return np.asarray(small, dtype=np.float32).transpose(2, 0, 1)


def distance(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> dict[str, float]:
    if got.shape != want.shape:
        raise ValueError(f"shape {got.shape}, expected {want.shape}")
    levels = np.abs(got.astype(np.float32) - want.astype(np.float32))
    p999 = float(np.percentile(levels, 99.9))
    return {"mean": round(float(levels.mean()), 4), "p99.9": round(p999, 3), "max": round(float(levels.max()), 3)}


def close(levels: dict[str, float]) -> bool:
    return levels["mean"] <= MEAN_LEVELS_MAX and levels["p99.9"] <= P999_LEVELS_MAX


def corpus(job: Job, count: int) -> dict[str, bytes]:
    """`count` generated pictures of several sizes, and up to `count` of the user's JPEG files."""
    sizes = ((500, 375), (375, 500), (333, 500), (640, 427), (1001, 224))
    found = {f"generated {i}": jpeg(*sizes[i % len(sizes)], seed=i, orientation=1 + i % 8) for i in range(count)}
    if job.pictures is not None:
        files = sorted(path for path in job.pictures.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        if not files:
            raise CannotRun(f"--pictures {job.pictures} holds no .jpg or .jpeg file")
        found |= {path.name: path.read_bytes() for path in files[:count]}
    return found
