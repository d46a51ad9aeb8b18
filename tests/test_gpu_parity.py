"""Promise, on a GPU: pixels and vectors are the CPU's within the contract, no row moves, and memory stays flat.

Skipped where there is no GPU; under REQUIRE_GPU=1 that is a failure. Never run yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from runs import Ran, index, quarantine

from engines import open_engine
from engines.memory_gpu import copy_to_host, device_array
from engines.spec import Artifact, Preprocess, find_artifact
from pipeline.batch import Batch
from pipeline.stages_cpu import CpuStages
from tests.compare import spread_error
from tests.pictures import noisy_jpeg
from tests.test_real_pictures import manifest

pytestmark = pytest.mark.gpu

PRE = Preprocess(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BATCH = 64
# docs/design.md: IDCT, chroma interpolation and resize round each on their own.
MEAN_LEVELS_MAX, P999_LEVELS_MAX = 0.6, 4.0
# fp16 has .01; noise of 0.6 levels on average moved the vectors of a tiny random model by .018 on a CPU.
VECTOR_SPREAD_ERROR_MAX = 0.03
BATCHES = 1000
GROWTH_MAX_BYTES = 64 << 20


@pytest.fixture(scope="module")
def stages() -> Iterator[Any]:
    from pipeline.stages_gpu import GpuStages

    made = GpuStages(PRE, threads=4)
    yield made
    made.close()


def both(stages: Any, encoded: list[bytes]) -> tuple[Batch, npt.NDArray[Any], Batch, npt.NDArray[Any]]:
    """(batch, (n, 3, s, s) normalised pixels) of the GPU, then of the CPU."""
    ids, out = np.arange(len(encoded)), device_array((len(encoded), 3, PRE.size, PRE.size), np.float32)
    on_gpu = stages(Batch(ids, list(encoded), slot=len(encoded)), out)  # slots of their own: sizes differ here
    got_nchw = np.empty(out.shape, np.float32)
    copy_to_host(got_nchw, out, stages.stream)
    stages.stream.synchronize()
    want_nchw = np.empty_like(got_nchw)
    cpu = CpuStages(PRE, threads=4)
    on_cpu = cpu(Batch(ids, list(encoded)), want_nchw)
    cpu.close()
    return on_gpu, got_nchw, on_cpu, want_nchw


def far_off(got_nchw: npt.NDArray[Any], want_nchw: npt.NDArray[Any]) -> list[tuple[int, float, float]]:
    """Rows beyond the contract: (row, mean, 99.9th percentile), in levels of 255."""
    found = []
    std = np.reshape(PRE.std, (3, 1, 1))
    for row, (got, want) in enumerate(zip(got_nchw, want_nchw, strict=True)):
        levels = 255 * std * np.abs(got - want)
        mean, p999 = float(levels.mean()), float(np.percentile(levels, 99.9))
        if not (mean <= MEAN_LEVELS_MAX and p999 <= P999_LEVELS_MAX):
            found.append((row, mean, p999))
    return found


def test_pixels_of_every_decodable_file(stages: Any, shared_data: Path) -> None:
    rows = [row for row in manifest(shared_data) if row["expect"] == "decode"]
    assert len(rows) > 600
    wrong: list[str] = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        on_gpu, got, on_cpu, want = both(stages, [(shared_data / row["path"]).read_bytes() for row in part])
        assert on_gpu.failed == on_cpu.failed
        wrong += [f"{part[row]['path']}: mean {mean:.2f}, p99.9 {p999:.1f}" for row, mean, p999 in far_off(got, want)]
    assert not wrong, "\n".join(wrong)


def test_a_dirty_batch_shifts_no_row(stages: Any, shared_data: Path) -> None:
    """Sound photos between broken files of every kind: each row is its own picture, or failed and zero."""
    rows = manifest(shared_data)
    photos = [row["path"] for row in rows if row["category"] == "photo"][:96]
    broken = [row["path"] for row in rows if row["expect"] == "report"][::2][:96]
    mixed = [path for pair in zip(photos, broken, strict=True) for path in pair]
    for start in range(0, len(mixed), BATCH):
        encoded = [(shared_data / path).read_bytes() for path in mixed[start : start + BATCH]]
        on_gpu, got, on_cpu, want = both(stages, encoded)
        assert on_gpu.failed == on_cpu.failed
        assert not got[list(on_gpu.failed)].any()
        assert not far_off(got, want)


@pytest.fixture(scope="module")
def gpu_model(tiny_model: Path) -> Path:
    """The tiny model with an engine on ONNX Runtime's CUDA provider, which needs least of a host."""
    from engines.build import main as make_engines

    assert make_engines(["--model", str(tiny_model), "--runtime", "cuda"]) == 0
    return tiny_model


@pytest.fixture(scope="module")
def collection(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("collection")
    for split in ("photo", "size", "format", "bad"):
        (root / split).symlink_to(shared_data / split)
    return root


@pytest.fixture(scope="module")
def indexes(collection: Path, gpu_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Ran, Path]]:
    found = {}
    for device in ("cpu", "gpu:0"):
        out = tmp_path_factory.mktemp(device.replace(":", "")) / "index"
        ran = index(collection, out, "--model", gpu_model, "--devices", device)
        assert ran.code == 0, ran.stderr
        found[device] = ran, out
    return found


def vectors(out: Path) -> dict[str, npt.NDArray[np.float16]]:
    with h5py.File(out / "index.h5") as file:
        return dict(zip(file["key"].asstr()[:], file["embeddings"][:], strict=True))


def test_an_index_from_a_gpu_is_that_of_the_cpu(indexes: dict[str, tuple[Ran, Path]], shared_data: Path) -> None:
    expect = {row["path"]: row["expect"] for row in manifest(shared_data)}
    (_, cpu_out), (ran, gpu_out) = indexes["cpu"], indexes["gpu:0"]
    assert ran.report["decoders"]["nvimgcodec"] > 300
    decided = [key for key, value in expect.items() if value in ("decode", "report", "optional")]
    bad = {name: quarantine(out) for name, out in (("cpu", cpu_out), ("gpu", gpu_out))}
    assert {key: bad["gpu"].get(key) for key in decided} == {key: bad["cpu"].get(key) for key in decided}
    want, got = vectors(cpu_out), vectors(gpu_out)
    keys = [key for key in decided if key in want]
    want_nd, got_nd = np.stack([want[key] for key in keys]), np.stack([got[key] for key in keys])
    assert spread_error(got_nd, want_nd) <= VECTOR_SPREAD_ERROR_MAX
    # a swapped pair would hide in the mean: every vector lies nearest to its own
    distance = ((got_nd.astype(np.float32)[:, None] - want_nd.astype(np.float32)) ** 2).sum(2)
    own = distance.diagonal()
    strangers = [keys[row] for row in range(len(keys)) if own[row] > distance[row].min() + 1e-4]
    assert not strangers


@pytest.mark.alone
def test_a_thousand_batches_leave_memory_flat(gpu_model: Path) -> None:
    """Ever new sizes, which is what makes caches grow that are keyed by shape. Reader and store are not part of it."""
    from cuda.bindings import runtime as cuda

    from pipeline.stages_gpu import GpuStages

    artifact: Artifact = find_artifact(str(gpu_model))
    engine: Any = open_engine(artifact, "vision", "cuda", device="gpu")
    stages = GpuStages(artifact.spec.preprocess, threads=4)
    rng, process = np.random.default_rng(0), psutil.Process(os.getpid())
    sizes = rng.integers(100, 700, (BATCHES, 2))
    used: list[tuple[int, int]] = []  # GPU, host
    for number, (width, height) in enumerate(sizes.tolist()):
        encoded = [noisy_jpeg(number, width + step, height) for step in range(3)] + [b"not a picture"]
        slot = number % engine.slots
        if number >= engine.slots:
            engine.result(slot)
        batch = stages(Batch(np.arange(4), encoded, slot=slot), engine.input(slot))
        engine.launch(slot, len(batch.ids))
        if number % 100 == 99:
            code, free, total = cuda.cudaMemGetInfo()
            assert int(code) == 0
            used.append((total - free, process.memory_info().rss))
    for slot in range(engine.slots):
        engine.result(slot)
    stages.close()
    # CV-CUDA fills its cache up to its limit first; from there on nothing may grow
    warm, last = used[len(used) // 2], used[-1]
    assert last[0] - warm[0] <= GROWTH_MAX_BYTES, used
    assert last[1] - warm[1] <= GROWTH_MAX_BYTES, used
