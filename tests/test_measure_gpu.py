"""Every measurement of the GPU check runs to its end on a GPU that is none, so that on a real one no typo ends it.

The rates it gives are of the CPU under the disguise, and mean nothing. What this cannot show: anything a GPU does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from engines.spec import find_artifact
from pipeline.batch import DeviceUnavailable
from pipeline.gpu_check import measure_gpu, report_gpu
from pipeline.gpu_check.rig_gpu import Job
from pipeline.setting import HARDWARE_SHARE

Told: TypeAlias = dict[str, dict[str, Any]]
ROOT = Path(__file__).resolve().parents[1]
REHEARSAL = """
import io, json, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from PIL import Image
from pipeline import line_gpu
from pipeline.gpu_check import measure_gpu, pipelines_gpu, prepare_gpu
from pipeline.gpu_check.rig_gpu import Job

def imdecode(data, flags):
    return np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))[:, :, ::-1]

sys.modules["cv2"] = SimpleNamespace(
    imdecode=imdecode, IMREAD_COLOR=1, INTER_LINEAR=1, COLOR_BGR2RGB=4, setNumThreads=lambda threads: None,
    cvtColor=lambda image, code: image[:, :, ::-1],
    resize=lambda image, size, interpolation: np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size)),
)
line_gpu.SECONDS = 0.1
measure_gpu.MEMORY_BATCHES, measure_gpu.gpu_used_mib, measure_gpu.CANARY_ROWS = 150, lambda: 100, 8
prepare_gpu.RUNTIMES = ("ort-cpu",)
prepare_gpu.POOLS = {"500": (50, 40, 4), "400": (40, 40, 4), "800": (80, 80, 4), "1600": (160, 160, 4)}
prepare_gpu.CORPUS = dict(zip(prepare_gpu.CORPUS, (10, 40, 60)))

if __name__ == "__main__":
    job, told = Job(Path(sys.argv[1]), None), {}
    prepare_gpu.pictures(job)
    for module, names in ((measure_gpu, ("image_stage", "canary", "canary_without_engine", "rates_b32", "rates_cpu",
                                        "latency", "memory")),
                          (pipelines_gpu, ("pipelines", "index_b32", "index_b32_twice", "replicas"))):
        for name in names:
            finding = getattr(module, name)(job)
            told[name] = {"ok": finding.ok, "evidence": finding.evidence}
    print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    work = tmp_path_factory.mktemp("gpu-check")
    (work / "artifacts" / "ViT-B-32").mkdir(parents=True)
    (work / "artifacts" / "ViT-B-32" / "tiny").symlink_to(find_artifact(str(tiny_model)).path.resolve())
    (script := work / "rehearsal.py").write_text(REHEARSAL)
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests' / 'fake_gpu'}:{ROOT}"}
    command = [sys.executable, str(script), str(work)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    parsed: Told = json.loads(done.stdout.strip().splitlines()[-1])
    return parsed


def test_every_measurement_comes_to_its_end(told: Told) -> None:
    """Of 50 and 110 pictures start-up takes so long that their difference may be no rate: the rows are what counts."""
    assert {name for name, one in told.items() if one["ok"]} >= set(told) - {"index_b32", "index_b32_twice"}
    for name in ("index_b32", "index_b32_twice"):
        assert [run["embedded"] for run in told[name]["evidence"]["runs"]] == [50, 110]
    twice = told["index_b32_twice"]["evidence"]
    assert twice["devices"] == "gpu:0,gpu:0"
    # So few pictures may be done before the second lane is up.
    assert {lane.partition(" ")[0] for run in twice["runs"] for lane in run["lanes"]} <= {"gpu:0/0", "gpu:0/1"}


def test_the_canary_is_asked_with_and_without_the_hardware_decoder(told: Told) -> None:
    shares = [told[name]["evidence"]["hardware_share"] for name in ("canary", "canary_without_engine")]
    assert shares == [HARDWARE_SHARE, 0]
    assert 0 < told["canary"]["evidence"]["mean_levels"] < 0.6


def test_rates_say_how_many_threads_decoded(told: Told) -> None:
    rates = {name: told[name]["evidence"]["decode_threads"] for name in ("rates_b32", "rates_cpu", "pipelines")}
    assert set(rates.values()) == {len(os.sched_getaffinity(0))}
    assert told["rates_cpu"]["evidence"]["figures"]["decode and preprocess on the CPU"] > 0


def test_a_wrong_decoder_does_not_cost_the_rates_of_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise DeviceUnavailable("the GPU gives wrong pixels")

    monkeypatch.setattr(measure_gpu, "Line", refuse)
    monkeypatch.setattr(measure_gpu, "runtimes", lambda job, arch: ["aoti-cuda", "cuda"])
    monkeypatch.setattr(measure_gpu, "_alone", lambda job, arch, runtime: 9000.0 if runtime == "cuda" else 9500.0)
    with pytest.raises(DeviceUnavailable):
        measure_gpu.rates_b32(Job(tmp_path, None))
    (*_, last) = capsys.readouterr().out.splitlines()
    figures = {"B/32 aoti-cuda alone": 9500, "B/32 model alone": 9500, "B/32 cuda alone": 9000}
    assert json.loads(last)["evidence"]["figures"] == figures


def test_every_bar_has_a_measurement(told: Told) -> None:
    """All but L/14, which is measured as B/32 is, and the ratio to the CUDA provider, which has no disguise."""
    measured = report_gpu.figures([{"evidence": one["evidence"]} for one in told.values()])
    assert set(report_gpu.BARS) - set(measured) == {"full GPU over OpenCV + ORT CUDA", "L/14 end to end"}
