"""Promise: real photos, hard formats and broken files come out as the manifest of the shared data expects them.

Every file is decoded once, in a process of its own whose peak memory is looked at. Photos are compared with the PIL
reference at the sizes of three models.
"""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from engines.spec import Preprocess
from pipeline.batch import BadImage
from pipeline.decode_cpu import decode
from pipeline.resize_cpu import resize_crop
from tests.compare import PIXEL_LEVELS_MAX, assert_pixels_close
from tests.test_stages_cpu import reference

MEAN_LEVELS_MAX = 0.6  # the manifest gives means as whole numbers
SECONDS_MAX = 20.0  # a single file; alone none takes more than 3, tests on two cores share them with others
PEAK_RSS_MAX = 1.5e9
SENSIBLE_REASONS = {"truncated", "corrupt", "not_an_image", "empty", "unsupported_format", "too_large"}


def preprocess(size: int = 224) -> Preprocess:
    return Preprocess(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def manifest(shared_data: Path) -> list[dict[str, str]]:
    with (shared_data / "MANIFEST.tsv").open(encoding="utf-8", newline="") as lines:
        return [row for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if row["expect"] != "data"]


def look_at(shared_data: Path) -> None:
    """In the child: one JSON line per file with what `decode` made of it, and the peak memory last."""
    warnings.simplefilter("ignore")  # of Pillow, about metadata
    for row in manifest(shared_data):
        encoded = (shared_data / row["path"]).read_bytes()
        start = time.monotonic()
        seen: dict[str, Any] = {"path": row["path"]}
        try:
            decoded = decode(encoded, preprocess())
        except BadImage as bad:
            seen |= bad.failure._asdict()
        else:
            height, width = decoded.image_hwc.shape[:2]
            seen |= {"size": [width, height], "mark": decoded.mark, "decoder": decoded.decoder}
            columns = decoded.image_hwc.sum(0, dtype=np.uint32)  # rows first: ten times faster than one mean
            seen["mean"] = (columns.sum(0) / (height * width)).tolist()
        seen["seconds"] = time.monotonic() - start
        print(json.dumps(seen))
    # Of this program alone: what getrusage gives includes the process that started it.
    (peak_kb,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({"peak_rss": int(peak_kb) * 1024}))


@pytest.fixture(scope="module")
def seen(shared_data: Path) -> dict[str, dict[str, Any]]:
    """What became of every file, by its path; \"\" holds the peak memory."""
    code = "import pathlib, sys; from tests.test_real_pictures import look_at; look_at(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(shared_data)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return {entry.get("path", ""): entry for entry in map(json.loads, done.stdout.splitlines())}


def expected_size(evidence: str) -> list[int] | None:
    found = re.search(r"upright=(\d+)x(\d+)", evidence) or re.search(r"pillow(?:_heif)?=ok .*?(\d+)x(\d+)", evidence)
    return [int(found[1]), int(found[2])] if found else None


def disagreement(row: dict[str, str], got: dict[str, Any]) -> str | None:
    """What is wrong with `got` by this row of the manifest."""
    expect, reason = row["expect"], got.get("reason")
    if got["seconds"] > SECONDS_MAX:
        return f"took {got['seconds']:.1f} s"
    if reason is not None and (reason not in SENSIBLE_REASONS or not got["words"]):
        return "no sensible reason"
    if expect == "report":
        return None if reason else "was embedded, but must be reported"
    if expect in ("either", "bounded"):
        return None
    if reason and (expect == "decode" or reason != "unsupported_format"):
        return "must give pixels"
    if reason or got["mark"] == "scaled":
        return None
    mean = re.search(r"mean=(\d+)/(\d+)/(\d+)", row["evidence"])
    if mean and np.abs(np.array(got["mean"]) - [int(level) for level in mean.groups()]).max() > MEAN_LEVELS_MAX:
        return "other pixels than Pillow's"
    size = expected_size(row["evidence"])
    return "other size than Pillow's" if size and size != got["size"] else None


def test_every_file_meets_its_expectation(shared_data: Path, seen: dict[str, dict[str, Any]]) -> None:
    rows = manifest(shared_data)
    assert len(rows) > 1000
    wrong = [(row, problem) for row in rows if (problem := disagreement(row, seen[row["path"]]))]
    listing = "\n".join(f"{row['path']}: {problem}: {seen[row['path']]}; {row['evidence']}" for row, problem in wrong)
    assert not wrong, f"{len(wrong)} of {len(rows)} files:\n{listing}"


def test_the_check_itself_rejects(shared_data: Path, seen: dict[str, dict[str, Any]]) -> None:
    row = next(row for row in manifest(shared_data) if "mean=" in row["evidence"] and row["expect"] == "decode")
    got = seen[row["path"]]
    assert disagreement(row, got) is None
    assert disagreement(row, got | {"mean": [0, 0, 0]}) == "other pixels than Pillow's"
    assert disagreement(row, got | {"size": [1, 1]}) == "other size than Pillow's"
    assert disagreement(row, got | {"reason": "corrupt", "words": "x"}) == "must give pixels"
    assert disagreement(row, got | {"reason": "empty", "words": ""}) == "no sensible reason"
    assert disagreement(row | {"expect": "report"}, got) == "was embedded, but must be reported"


def test_memory_stays_bounded(seen: dict[str, dict[str, Any]]) -> None:
    assert seen[""]["peak_rss"] < PEAK_RSS_MAX


def test_bombs_are_scaled_or_refused(shared_data: Path, seen: dict[str, dict[str, Any]]) -> None:
    bombs = [row["path"] for row in manifest(shared_data) if row["expect"] == "bounded"]
    assert len(bombs) >= 9
    for path in bombs:
        assert "reason" in seen[path] or seen[path]["mark"], f"{path} counts as a whole picture"
    assert seen["bad/bomb/gen_12000x9000_flat.jpg"]["mark"] == "scaled"
    assert seen["bad/bomb/gen_12000x9000_flat.jpg"]["size"] == [6000, 4500]


def test_truncated_files_say_so(shared_data: Path, seen: dict[str, dict[str, Any]]) -> None:
    rows = [row for row in manifest(shared_data) if row["path"].startswith("bad/truncated/")]
    cut = [row["path"] for row in rows if row["expect"] == "report"]
    assert len(cut) > 50
    assert {seen[path]["reason"] for path in cut if path.endswith(".jpg")} == {"truncated"}
    assert {seen[path]["reason"] for path in cut} <= {"truncated", "corrupt"}


@pytest.mark.parametrize(("size", "every"), [(64, 5), (224, 1), (336, 5)])
def test_photos_match_the_reference(shared_data: Path, size: int, every: int) -> None:
    """All photos and camera originals at 224, a fifth of them at the sizes of two other models."""
    rows = [row for row in manifest(shared_data) if row["category"] in ("photo", "size")]
    paths = [shared_data / row["path"] for row in rows[::every]]
    assert len(paths) > 40
    worst = 0.0
    for path in paths:
        encoded = path.read_bytes()
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)).convert("RGB"))
        got, want = resize_crop(decode(encoded, preprocess(size)).image_hwc, preprocess(size)), reference(upright, size)
        assert_pixels_close(got, want)
        worst = max(worst, float(np.abs(got.astype(int) - want).mean()))
    assert worst < 0.02 < PIXEL_LEVELS_MAX, f"one photo is {worst:.3f} levels off on average"


def test_exif_matters_on_real_photos(shared_data: Path) -> None:
    """The comparison fails when orientation is ignored."""
    rows = [row for row in manifest(shared_data) if row["path"].startswith("format/jpeg_exif_orientation/sharp_Land")]
    checked = 0
    for row in rows:
        encoded = (shared_data / row["path"]).read_bytes()
        stored = Image.open(io.BytesIO(encoded))
        got = resize_crop(decode(encoded, preprocess()).image_hwc, preprocess())
        upright = ImageOps.exif_transpose(stored)
        assert_pixels_close(got, reference(upright, 224))
        if re.search(r"ori=[2-8]", row["evidence"]):
            checked += 1
            with pytest.raises(AssertionError, match="levels"):
                assert_pixels_close(got, reference(stored, 224))
    assert checked == 7
