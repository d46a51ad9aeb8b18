"""Promise: lanes on GPUs lose nothing. Memory full, a GPU dead, hung or wrong: the run says so and goes on.

The GPUs are stand-ins (`tests/fake_gpu`): coordinator, lanes, stages, canary and nvImageCodec (on the CPU) are real,
the CUDA runtime, CV-CUDA and the engine are not. What faults look like on real GPUs is from their documentation.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from pictures import noisy_jpeg, write_folder
from PIL import Image
from runs import Ran, index, quarantine

from engines.spec import find_artifact
from pipeline.lanes import Board
from tests.compare import assert_same_vectors
from tests.test_never_loses import assert_adds_up

PHOTOS = 120
# Pillow's bicubic stands in for CV-CUDA's; between it and the CPU stage lies one level at most.
STAND_IN_SPREAD_ERROR = 0.02


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound JPEGs, and one each of what takes the CPU stage or fails."""
    folder = tmp_path_factory.mktemp("photos")
    paths = write_folder(folder, PHOTOS)
    Image.open(paths[0]).save(folder / "picture.png")
    shutil.copyfile(paths[3], folder / "copy of 3.jpg")
    (folder / "truncated.jpg").write_bytes(paths[5].read_bytes()[:-900])
    (folder / "words.jpg").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def on_cpu(photos: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    out = tmp_path_factory.mktemp("cpu") / "index"
    assert index(photos, out, "--model", tiny_model, "--devices", "cpu").code == 0
    return out


def run(photos: Path, tmp_path: Path, tiny_model: Path, devices: str, policy: str = "dynamic", **orders: Any) -> Ran:
    (tmp_path / "fake").mkdir(exist_ok=True)
    for started in (tmp_path / "fake").glob("started-*"):
        started.unlink()
    orders |= {"folder": str(tmp_path / "fake")}
    env = {"PYTHONPATH": str(Path(__file__).parent / "fake_gpu"), "FAKE_GPU": json.dumps(orders)}
    words = ["--devices", devices, "--sharing", policy]
    return index(photos, tmp_path / "index", "--model", tiny_model, *words, env=env)


def assert_nothing_lost(ran: Ran, out: Path, on_cpu: Path) -> None:
    """Every picture has the state it has on the CPU, and a vector that is its own."""
    assert ran.code == 0, ran.stderr
    assert_adds_up(ran)
    assert quarantine(out) == quarantine(on_cpu) == {"truncated.jpg": "truncated", "words.jpg": "not_an_image"}
    got, want = vectors(out), vectors(on_cpu)
    assert set(got) == set(want)
    keys = sorted(want)
    assert_same_vectors(
        np.stack([got[key] for key in keys]), np.stack([want[key] for key in keys]),
        spread_error_max=STAND_IN_SPREAD_ERROR,
    )  # fmt: skip


def vectors(out: Path) -> dict[str, Any]:
    with h5py.File(out / "index.h5") as file:
        return dict(zip(file["key"].asstr()[:], file["embeddings"][:], strict=True))


@pytest.mark.parametrize(
    ("devices", "policy"),
    [("gpu:0", "dynamic"), ("gpu:0,gpu:1,cpu", "dynamic"), ("gpu:0,gpu:1,cpu", "static"), ("gpu:0,gpu:0", "dynamic")],
)
def test_gpus_and_cpu_share_the_work(
    photos: Path, on_cpu: Path, tmp_path: Path, tiny_model: Path, devices: str, policy: str
) -> None:
    ran = run(photos, tmp_path, tiny_model, devices, policy, gpus=2, slow=0.4, after={"cpu": ["gpu:0", "gpu:1"]})
    assert_nothing_lost(ran, tmp_path / "index", on_cpu)
    assert [lane.split("/")[0] for lane in sorted(ran.report["lanes"])] == sorted(devices.split(","))
    counts = ran.report["decoders"]
    assert counts.get("nvimgcodec", 0) + counts.get("simplejpeg", 0) == PHOTOS
    assert counts["pillow"] == 1
    if "cpu" in devices:
        assert {"nvimgcodec", "simplejpeg"} <= counts.keys(), "both kinds took part"
    if devices == "gpu:0":
        assert counts["nvimgcodec"] == PHOTOS


def test_auto_takes_every_gpu_and_says_why(photos: Path, on_cpu: Path, tmp_path: Path, tiny_model: Path) -> None:
    ran = run(photos, tmp_path, tiny_model, "auto", gpus=3)
    assert_nothing_lost(ran, tmp_path / "index", on_cpu)
    assert "devices gpu:0,gpu:1,gpu:2: every GPU; the CPU's engine would add 1.7 %" in ran.stderr
    again = run(photos, tmp_path, tiny_model, "auto", gpus=3)
    assert (again.report["embedded"], again.report["lanes"]) == (0, [])


def test_a_finished_run_does_not_wait_for_a_late_gpu(photos: Path, tmp_path: Path, tiny_model: Path) -> None:
    ran = run(photos, tmp_path, tiny_model, "gpu:0,gpu:1", gpus=2, after={"gpu:1": ["never"]})
    assert ran.report["lanes"] == ["gpu:0/0 fake fp32"]
    assert ran.report["seconds"] < 100


def test_full_memory_halves_the_batch_and_says_so(photos: Path, on_cpu: Path, tmp_path: Path, tiny_model: Path) -> None:
    size = find_artifact(str(tiny_model)).spec.preprocess.size
    inputs_of_2 = 3 * 2 * (3 * size * size * 4)  # three buffers; vectors and constants take little beside them
    ran = run(photos, tmp_path, tiny_model, "gpu:0", bytes=int(1.5 * inputs_of_2))
    assert "GPU memory is full with batches of 8" in ran.stderr
    assert "it goes on with 4" in ran.stderr
    assert "runs fake fp32, batches of 2" in ran.stderr
    assert_nothing_lost(ran, tmp_path / "index", on_cpu)


def test_a_decoder_without_memory_halves_the_batch_too(
    photos: Path, on_cpu: Path, tmp_path: Path, tiny_model: Path
) -> None:
    """It says only that there is no picture. Such rows would take the CPU stage for ever, unseen."""
    ran = run(photos, tmp_path, tiny_model, "gpu:0", room=2)
    assert "does not fit in GPU memory" in ran.stderr
    assert "runs fake fp32, batches of 2" in ran.stderr
    assert ran.report["decoders"] == {"nvimgcodec": PHOTOS, "pillow": 1}
    assert_nothing_lost(ran, tmp_path / "index", on_cpu)


def test_memory_too_small_for_one_picture_is_the_end(photos: Path, tmp_path: Path, tiny_model: Path) -> None:
    ran = run(photos, tmp_path, tiny_model, "gpu:0", bytes=1000)
    assert ran.code == 1
    assert "full even with one picture at a time" in ran.report["error"]


def test_a_gpu_that_faults_once_starts_again(photos: Path, on_cpu: Path, tmp_path: Path, tiny_model: Path) -> None:
    ran = run(photos, tmp_path, tiny_model, "gpu:0", dies={"0": 2})
    assert "unspecified launch failure" in ran.stderr
    assert_nothing_lost(ran, tmp_path / "index", on_cpu)


def test_a_gpu_that_is_gone_leaves_its_work_to_the_others(
    photos: Path, on_cpu: Path, tmp_path: Path, tiny_model: Path
) -> None:
    orders: dict[str, Any] = {"dies": {"0": 2}, "for_ever": True, "after": {"gpu:1": ["gpu:0"]}, "slow": 0.4}
    ran = run(photos, tmp_path, tiny_model, "gpu:0,gpu:1", gpus=2, **orders)
    assert_nothing_lost(ran, tmp_path / "index", on_cpu)
    assert "gpu:0/0 is given up, the run goes on with gpu:1/1" in ran.stderr
    assert any(lane.startswith("gpu:0/0") and lane.endswith("(given up)") for lane in ran.report["lanes"])


def test_the_last_gpu_gone_ends_a_run_that_can_be_resumed(
    photos: Path, on_cpu: Path, tmp_path: Path, tiny_model: Path
) -> None:
    ran = run(photos, tmp_path, tiny_model, "gpu:0", dies={"0": 2}, for_ever=True)
    assert ran.code == 1
    assert "the same command goes on there" in ran.report["error"]
    (tmp_path / "fake" / "dead-0").unlink()  # somebody has seen to it
    assert_nothing_lost(run(photos, tmp_path, tiny_model, "gpu:0"), tmp_path / "index", on_cpu)


@pytest.mark.parametrize(("mark", "reason"), [(b"GPU-KILL", "decoder_crash"), (b"GPU-HANG", "timeout")])
def test_a_picture_that_takes_the_gpu_down_costs_one_picture(
    tmp_path: Path, tiny_model: Path, mark: bytes, reason: str
) -> None:
    paths = write_folder(tmp_path / "photos", 42)
    paths[30].write_bytes(noisy_jpeg(30) + mark)
    ran = run(tmp_path / "photos", tmp_path, tiny_model, "gpu:0")
    assert ran.code == 0, ran.stderr
    assert_adds_up(ran)
    assert quarantine(tmp_path / "index") == {"even/00030.jpg": reason}
    assert ran.report["embedded"] == 41


def test_a_gpu_with_wrong_pixels_embeds_nothing(photos: Path, on_cpu: Path, tmp_path: Path, tiny_model: Path) -> None:
    orders: dict[str, Any] = {"gpus": 2, "wrong": [1], "after": {"gpu:0": ["gpu:1"]}}
    named = run(photos, tmp_path, tiny_model, "gpu:0,gpu:1", **orders)
    assert named.code == 2
    assert "the GPU gives wrong pixels" in named.report["error"]
    assert "--devices cpu" in named.report["error"]
    chosen = run(photos, tmp_path, tiny_model, "auto", **orders)
    assert_nothing_lost(chosen, tmp_path / "index", on_cpu)
    assert "gpu:1/1 is given up" in chosen.stderr


@pytest.mark.parametrize("devices", ["gpu:0", "cpu,gpu:0"])
def test_a_named_gpu_that_is_not_there_is_exit_2(tiny_model: Path, tmp_path: Path, devices: str) -> None:
    write_folder(tmp_path / "photos", 2)
    env = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}  # also hides what a GPU host has
    ran = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, "--devices", devices, env=env)
    assert ran.code == 2
    assert f"--devices {devices}: " in ran.report["error"]
    assert "or use --devices cpu" in ran.report["error"]
    assert not (tmp_path / "index").exists()
    auto = index(tmp_path / "photos", tmp_path / "index", "--model", tiny_model, env=env)
    assert auto.code == 0
    assert "devices cpu: " in auto.stderr


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ("gpu:7", "there is no gpu:7 here, only cpu, gpu:0, gpu:1"),
        ("tpu:0", "give auto, or a list of cpu, gpu:0, gpu:1"),
        ("gpu", "give auto"),
        (",", "give auto"),
    ],
)
def test_device_names(tiny_model: Path, tmp_path: Path, devices: str, words: str) -> None:
    ran = run(tmp_path, tmp_path, tiny_model, devices, gpus=2)
    assert ran.code == 2
    assert words in ran.report["error"]


def test_a_board_names_rows_and_batches() -> None:
    board = Board(3)
    board.start(0, 7, 60)
    board.start(2, 20, 60, last_id=51)
    assert board.in_hand() == [(7, 7), (20, 51)]
    assert not board.overdue()
    board.finish(0)
    board.start(2, 20, -1, last_id=51)
    assert board.in_hand() == [(20, 51)]
    assert board.overdue()
