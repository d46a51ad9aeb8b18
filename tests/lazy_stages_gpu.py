"""`pipeline.stages_gpu` on stand-ins: work waits on a lazy CUDA runtime, and a picture that is let go is garbage."""

from __future__ import annotations

import importlib.util
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lazy_gpu import LazyRuntime

from pipeline.decode_gpu import Codec


class LazyImage:
    """Pixels that arrive when the stream runs. It has no height and width: each would let go of Python's lock."""

    def __init__(self, runtime: LazyRuntime, stream: int, pixels: npt.NDArray[np.uint8]) -> None:
        target = self.pixels = np.full_like(pixels, 0xEE)
        runtime.queue(stream, lambda: np.copyto(target, pixels))


class LazyCodec(Codec):
    runtime: LazyRuntime
    spoil: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]] | None = None

    def __init__(self, threads: int, stream: int | None, hardware_share: float) -> None:
        super().__init__(threads, None, hardware_share)
        assert stream is not None
        self.queue = stream

    def decode(self, encoded: Any) -> list[Any]:
        return [None if image is None else self.upload(np.asarray(image)) for image in super().decode(encoded)]

    def upload(self, image_hwc: npt.NDArray[np.uint8]) -> Any:
        spoiled = image_hwc if LazyCodec.spoil is None else LazyCodec.spoil(image_hwc)
        return LazyImage(self.runtime, self.queue, np.ascontiguousarray(spoiled))


class Pixels:
    """What CV-CUDA sees of an image: its memory, which is somebody else's as soon as nobody holds the image."""

    def __init__(self, image: LazyImage) -> None:
        self.weak, self.shape = weakref.ref(image), image.pixels.shape

    @property
    def image(self) -> npt.NDArray[np.uint8]:
        alive = self.weak()
        return np.full(self.shape, 0x55, np.uint8) if alive is None else alive.pixels


def lazy_cvcuda(runtime: LazyRuntime, plain: ModuleType) -> ModuleType:
    """The stand-in of the lane tests, with its work queued."""
    lazy = ModuleType("cvcuda")
    lazy.__dict__.update(vars(plain))

    def as_images(buffers: list[Pixels], format: Any) -> Any:
        return lambda: plain.as_images(buffers, format)

    def tvresize(src: Any, *args: Any, stream: int, **more: Any) -> Any:
        small: list[Any] = []
        runtime.queue(stream, lambda: small.extend(plain.tvresize(src(), *args, stream=stream, **more)))
        return small

    def crop_flip_normalize_reformat_into(dst: Any, *args: Any, stream: int, **more: Any) -> Any:
        def work() -> None:
            plain.crop_flip_normalize_reformat_into(dst, *args, stream=stream, **more)

        runtime.queue(stream, work)

    for queued in (as_images, tvresize, crop_flip_normalize_reformat_into):
        setattr(lazy, queued.__name__, queued)
    return lazy


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_stages(runtime: LazyRuntime, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`pipeline.stages_gpu`, loaded once more, on stand-ins."""
    root = Path(__file__).parent
    plain = load("plain_cvcuda", root / "fake_gpu" / "cvcuda.py")
    monkeypatch.setitem(sys.modules, "cvcuda", lazy_cvcuda(runtime, plain))
    monkeypatch.setitem(sys.modules, "stages_on_stand_ins", ModuleType("stages_on_stand_ins"))  # dataclass looks there
    found = load("stages_on_stand_ins", root.parent / "pipeline" / "stages_gpu.py")
    monkeypatch.setattr(LazyCodec, "runtime", runtime, raising=False)
    monkeypatch.setattr(found, "Codec", LazyCodec)
    monkeypatch.setattr(found, "OnStream", Pixels)
    return found
