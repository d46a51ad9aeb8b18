"""Questions to a GPU, one function each. Run through `python -m pipeline.gpu_check`; never run on a GPU yet.

A probe returns a `Finding`: whether the answer is the one our GPU stages are built on, the answer in words, and the
numbers behind it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.gpu_check.rig_gpu import (
    DEVICE,
    ENGINE,
    HYBRID,
    CannotRun,
    Decoder,
    Finding,
    Job,
    Rig,
    close,
    corpus,
    distance,
    jpeg,
    mixed,
    shrink,
    upright,
)

# Decoders alone, before the resize averages their rounding away.
DECODE_MEAN_LEVELS_MAX = 1.0
TESTS = Path(__file__).resolve().parents[2] / "tests"
FUSION = TESTS / "test_fusion_gpu.py"
BROKEN = (b"", b"not a picture", b"\xff\xd8\xff\xe0" + bytes(60))


def gpu_tests(job: Job) -> Finding:
    # By name: to collect every file, pytest would import what this host need not have.
    return _pytest("gpu and not alone", [path for path in sorted(TESTS.glob("test_*gpu*.py")) if path != FUSION])


def gpu_tests_alone(job: Job) -> Finding:
    return _pytest("gpu and alone", sorted(TESTS.glob("test_*gpu*.py")))


def fused_attention(job: Job) -> Finding:
    if not any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")):
        raise CannotRun("neither TensorRT nor TensorRT-RTX is installed, and nothing else fuses attention by itself")
    return _pytest("gpu", [FUSION])


def _pytest(marked: str, files: list[Path]) -> Finding:
    """REQUIRE_GPU turns a skip for want of a GPU into a failure."""
    command = [sys.executable, "-m", "pytest", "-vv", "-m", marked, "-p", "no:cacheprovider", "-rfEs", *map(str, files)]
    environment, lines = os.environ | {"REQUIRE_GPU": "1"}, []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stderr.write(line)  # kept where this process is ended at its limit: it names the test that hangs
            sys.stderr.flush()
            lines.append(line.strip())
    if any("No module named pytest" in line for line in lines):
        raise CannotRun(lines[-1])
    told = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    return Finding(process.returncode == 0, lines[-1] if lines else "pytest said nothing", {"told": told})


def size_order(job: Job) -> Finding:
    rig = Rig()
    (decoded,) = rig.decode([jpeg(500, 375, seed=0)])
    images = rig.images([decoded])
    small = rig.resize(images)
    ((before,), (after,)) = [[image.size for image in batch] for batch in (images, small)]
    seen = {"shape": list(decoded.shape), "size": list(before), "size_small": list(after)}
    ok = (tuple(before), tuple(after), tuple(decoded.shape)) == ((500, 375), (298, 224), (375, 500, 3))
    return Finding(ok, f"500 x 375 gives size {before}, after tvresize {after}; expected (500, 375), (298, 224)", seen)


def float16_out(job: Job) -> Finding:
    rig = Rig()
    decoded = rig.decode(jpeg(500, 375, seed=i) for i in range(4))
    mean, std = (122.77, 116.75, 104.09), (68.5, 66.63, 70.32)
    wide, narrow = (rig.pixels(decoded, mean, std, dtype).float() for dtype in ("float32", "float16"))
    worst, spread = float((wide - narrow).abs().max()), float(wide.std())
    ok = worst <= 0.002 and spread > 0.1  # values stay under 4, where half a float16 step is 0.001
    return Finding(ok, f"float16 accepted, {worst:.5f} from float32 at most", {"max": worst, "spread": spread})


def as_images(job: Job) -> Finding:
    rig = Rig()
    decoded = rig.decode(jpeg(width, 300, seed=width) for width in (400, 301, 640))
    formats = [str(image.format) for image in rig.images(decoded)]
    ok = len(formats) == 3 and all("RGB8" in name for name in formats)
    return Finding(ok, f"3 sizes in one batch, formats {sorted(set(formats))}", {"formats": formats})


def row_pitch(job: Job) -> Finding:
    rig, strides, differ = Rig(), {}, []
    for width in (64, 333, 501):
        (decoded,) = rig.decode([jpeg(width, 250, seed=width)])
        (image,) = rig.images([decoded])
        strides[str(width)] = [int(step) for step in decoded.strides]
        host = rig.to_host(decoded)  # waits for the decoder; `cpu` copies on a stream that nothing orders after it
        if not np.array_equal(np.array(image.cpu()), host):
            differ.append(width)
    answer = f"row strides {strides}; pixels differ at widths {differ or 'none'}"
    return Finding(not differ, answer, {"strides": strides, "differ": differ})


def pixel_levels(job: Job) -> Finding:
    rig, pictures = Rig(), corpus(job, 24)
    decoded = rig.decode(pictures.values())
    refused = [name for name, image in zip(pictures, decoded, strict=True) if image is None]
    kept = [(name, image) for name, image in zip(pictures, decoded, strict=True) if image is not None]
    got = rig.levels([image for _, image in kept])
    whole, resize, decode = {}, {}, {}
    for (name, image), levels in zip(kept, got, strict=True):
        host, picture = rig.to_host(image), upright(pictures[name])
        whole[name] = distance(levels, shrink(picture))
        resize[name] = distance(levels, shrink(Image.fromarray(host)))
        decode[name] = distance(host, np.asarray(picture))
    worst = {key: max(one[key] for one in whole.values()) for key in ("mean", "p99.9", "max")}
    alone = {key: max(one[key] for one in resize.values()) for key in ("mean", "p99.9", "max")}
    evidence = {"refused": refused, "whole": whole, "resize_alone": resize, "decode_alone": decode}
    answer = f"worst of {len(kept)} pictures: {worst}; resize alone {alone}; refused {len(refused)}"
    return Finding(close(worst) and not refused, answer, evidence)


def all_refused(job: Job) -> Finding:
    rig = Rig()
    nothing = rig.decode(BROKEN)
    between = rig.decode([BROKEN[1], jpeg(100, 80, seed=1), BROKEN[2]])
    shape = [image is None for image in between]
    empty = len(rig.resize(rig.images([]))) if all(image is None for image in nothing) else -1
    ok = empty == 0 and shape == [True, False, True]
    answer = f"{len(nothing)} broken files: {[type(image).__name__ for image in nothing]}; an empty batch resizes"
    return Finding(ok, answer, {"between_broken": shape, "empty_batch": empty})


def compare(encoded: Sequence[bytes]) -> Finding:
    """Preprocess one batch and compare every row with the reference."""
    rig = Rig()
    decoded = rig.decode(encoded)
    if refused := [i for i, image in enumerate(decoded) if image is None]:
        return Finding(False, f"refused rows: {refused}", {})
    got = rig.levels(decoded)
    rows = [distance(levels, shrink(upright(data))) for levels, data in zip(got, encoded, strict=True)]
    worst = {key: max(row[key] for row in rows) for key in ("mean", "p99.9", "max")}
    return Finding(close(worst), f"levels from the reference, worst of {len(rows)}: {worst}", {"rows": rows})


def one_picture(job: Job) -> Finding:
    return compare([jpeg(500, 375, seed=3)])


def thin_pictures(job: Job) -> Finding:
    return compare([jpeg(1, 1, seed=1), jpeg(1, 120, seed=2), jpeg(120, 1, seed=3), jpeg(3, 200, seed=4)])


def tiny_pictures(job: Job) -> Finding:
    return compare([jpeg(8, 8, seed=1), jpeg(16, 11, seed=2), jpeg(63, 200, seed=3), jpeg(223, 223, seed=4)])


def canary(kind: str) -> Finding:
    """64 pictures through one decoder alone, against Pillow on the host."""
    decoder = Decoder([(kind, 1.0)])
    pictures = [jpeg(500, 375, seed=i) for i in range(64)]
    decoded = decoder.decode(pictures)
    pairs = [(image, data) for image, data in zip(decoded, pictures, strict=True) if image is not None]
    if not pairs:
        raise CannotRun(f"{kind} decoded none of 64: no such decoder here, or nvJPEG or the `video` capability is away")
    hosts = [decoder.to_host(image) for image, _ in pairs]
    zeros = sum(not host.any() for host in hosts)
    rows = [distance(host, np.asarray(upright(data))) for host, (_, data) in zip(hosts, pairs, strict=True)]
    mean = max(row["mean"] for row in rows)
    ok = zeros == 0 and mean <= DECODE_MEAN_LEVELS_MAX and len(pairs) == len(pictures)
    answer = f"{len(pairs)} of 64 decoded, {zeros} all zero, worst mean {mean} levels from Pillow"
    return Finding(ok, answer, {"rows": rows})


def canary_hybrid(job: Job) -> Finding:
    return canary(HYBRID)


def canary_engine(job: Job) -> Finding:
    return canary(ENGINE)


def stream_race(job: Job) -> Finding:
    """Decode, queue slow work, sum every picture, let go at once and decode again; then the same, waiting first."""
    decoder = Decoder(mixed(1.0))
    torch, device = decoder.torch, decoder.torch.device(DEVICE)
    pictures = [jpeg(500, 375, seed=i) for i in range(128)]
    slow = torch.ones((4096, 4096), device=device)

    def sums(start: int, wait: bool) -> Any:
        images = decoder.decode(pictures[start:] + pictures[:start])
        with torch.cuda.stream(decoder.stream):
            for _ in range(8):
                slow @ slow  # keeps the stream busy, so that a decoder that does not wait for it is seen
            each = [torch.as_tensor(image, device=device).sum(dtype=torch.int64) for image in images]
            found = torch.stack(each).roll(start)
        if wait:
            decoder.stream.synchronize()
        return found

    torch.cuda.synchronize()
    truth = torch.tensor([int(decoder.to_host(image).sum(dtype=np.int64)) for image in decoder.decode(pictures)])
    wrong = {}
    for name, wait in (("waiting", True), ("at once", False)):
        found = [sums(i % 128, wait) for i in range(30)]
        torch.cuda.synchronize()
        wrong[name] = sum(int((one.cpu() != truth).sum()) for one in found)
    answer = f"wrong pictures of {30 * 128}: {wrong['at once']} when let go at once, {wrong['waiting']} when waited for"
    return Finding(wrong["waiting"] == 0, answer, wrong)
