"""Generated pictures for tests, and the plain twins that tests compare with. No real photo is ever copied."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def noisy_jpeg(seed: int, width: int = 96, height: int = 80, quality: int = 90) -> bytes:
    """A JPEG with structure at several scales, different for every seed."""
    rng = np.random.default_rng(seed)
    levels = np.zeros((height, width, 3))
    for cells in (2, 5, 11):
        coarse = rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
        levels += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 3
    out = io.BytesIO()
    Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=quality)
    return out.getvalue()


def write_folder(folder: Path, count: int, *, first_seed: int = 0) -> list[Path]:
    """`count` different JPEGs in two sub-folders, so that every one has a label."""
    paths = []
    for number in range(count):
        path = folder / f"{'even' if number % 2 == 0 else 'odd'}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noisy_jpeg(first_seed + number, 64 + number % 64, 64 + number % 48))
        paths.append(path)
    return paths
