"""What a benchmark promises: it fails where answers or images are lost, ends in time, and says what it could not do."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest
from pictures import noisy_jpeg
from runs import run_module

from engines.hardware import physical_cores
from engines.spec import Artifact, Preprocess, find_artifact
from pipeline.batch import BadImage
from pipeline.bench import encoders, figures, ladder, null_engine, peers, race, roofline, rungs, store
from pipeline.bench.__main__ import about, main
from pipeline.bench.energy import joules_between, read_energy
from pipeline.bench.pictures import Corpus, dirty_copies
from pipeline.bench.processes import ChildFailed, Limit, Measured, OutOfTime, run_measured
from pipeline.bench.rungs import Rung
from pipeline.decode_cpu import decode

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(8):
        (folder / f"{number}.jpg").write_bytes(noisy_jpeg(number, 120, 100))
    return folder


def row(**found: Any) -> dict[str, Any]:
    return {"lost": 0, "scored_twice": 0, "error_over_spread": 0.0, "top9_overlap": 1.0, **found}


FP32, INT8 = Rung("a", "", "5", 1), Rung("b", "", "10", 1, precision="int8")


@pytest.mark.parametrize(
    ("rung", "found", "words"),
    [
        (FP32, row(lost=1), "1 images lost"),
        (FP32, row(scored_twice=2), "2 images scored twice"),
        (FP32, row(error_over_spread=0.02), "error/spread"),
        (FP32, row(error_over_spread=float("nan")), "error/spread"),
        (INT8, row(top9_overlap=0.94), "top-9 overlap"),
    ],
)
def test_a_rung_that_loses_images_or_changes_answers_fails(rung: Rung, found: dict[str, Any], words: str) -> None:
    assert [words in failure for failure in ladder.failures(found, rung)] == [True]
    assert figures.failed({"rungs": [{"rung": "a", "skipped": "", "failures": ladder.failures(found, rung)}]}) == ["a"]


def test_a_rung_within_its_bars_passes() -> None:
    assert ladder.failures(row(error_over_spread=0.2, top9_overlap=0.96), INT8) == []
    assert ladder.failures(row(error_over_spread=0.002), FP32) == []


@pytest.mark.parametrize(
    ("batches", "lost", "twice"), [([0, 1, 2], 0, 0), ([0, 2], 4, 0), ([0, 1, 1, 2], 0, 4), ([0, 1], 2, 0)]
)
def test_batches_that_are_missing_or_come_twice_are_counted(
    tmp_path: Path, batches: list[int], lost: int, twice: int
) -> None:
    np.savez(tmp_path / "v.npz", emb_nd=np.zeros((10, 2), np.float32), batches=batches)
    found = ladder._npz(tmp_path / "v.npz", images=10, batch=4)
    assert (found.lost, found.twice) == (lost, twice)


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/benchmarks/{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("batches", "speeds"), [(100, [1.0, 3.0]), (1, [1.0, 9.0]), (0, [1.0, 1.0]), (37, [1, 1, 1])])
def test_the_static_split_gives_every_batch_once_and_by_speed(batches: int, speeds: list[float]) -> None:
    owners = script("seed").owners_by_speed(batches, speeds)
    assert len(owners) == batches
    for at, speed in enumerate(speeds):
        assert abs(owners.count(at) - batches * speed / sum(speeds)) <= 1


def test_a_thousand_files_go_the_way_of_a_million(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    command = [sys.executable, str(ROOT / "docs/benchmarks/million.py"), "--thousands", "1", "--out", str(tmp_path)]
    subprocess.run([*command, "--model", str(tiny_model), "--work", str(tmp_path / "work")], check=True)
    found = json.loads((tmp_path / "million.json").read_text())
    assert [found[night]["embedded"] for night in ("first", "again", "added")] == [1000, 0, 1000]
    assert found["lists"]["answered_exactly"] == found["lists"]["queries"]
    assert found["lists"]["recall@10"] == 1


def test_every_rung_has_a_name_of_its_own_and_a_reason_where_it_cannot_run(tiny_model: Path) -> None:
    table = rungs.rungs(find_artifact(str(tiny_model)), cores=2, images=8)
    assert len({rung.name for rung in table}) == len(table)
    assert {rung.figure for rung in table} == {"4", "5", "6", "7", "8", "9", "10"}
    assert {rung.config["batch"] for rung in table if rung.figure in "56" and "batch" in rung.config} == set(
        rungs.BATCHES
    )
    absent = {rung.name: rung.absent for rung in table if rung.absent}
    assert {"nightjar compiled int8", "nightjar compiled bf16"} <= set(absent)
    assert all(rung.images or rung.absent for rung in table)


def test_rungs_of_a_gpu_appear_where_one_is(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rungs, "gpu_trouble", lambda: "")
    table = rungs.rungs(find_artifact(str(tiny_model)), cores=2, images=8)
    there = {rung.name for rung in table if "gpu" in rung.device and not rung.absent}
    others = {batch for batch in rungs.BATCHES if batch not in (1, 32)}
    assert there == {
        "hf static cpu+gpu", "hf dynamic cpu+gpu", "hf one by one, gpu", "hf batches of 32, gpu",
        "nightjar static cpu+gpu", "nightjar dynamic cpu+gpu",
        "hf 1 replica, gpu", "hf 2 replicas, gpu", "hf 4 replicas, gpu", *(f"hf batches of {n}, gpu" for n in others),
    }  # fmt: skip
    assert all("cuda:0" in rung.config["devices"] for rung in table if rung.name in there and rung.runner == "seed")
    (lanes,) = [rung for rung in table if rung.name == "nightjar 2 lanes"]
    assert lanes.config["--devices"] == "cpu,cpu"
    (ours,) = [rung for rung in table if rung.device == "gpu" and rung.runner == "index"]
    assert ours.absent == "not built: make engines LANE=gpu-cu13"


@pytest.mark.parametrize("cores", [1, 2, 4, 5, 16, 56])
def test_producers_and_threads_of_the_study_fit_on_the_cores(cores: int) -> None:
    """Few cores are shared; 56 producers beside 56 threads would be slower than the study ever was."""
    pairs = rungs.producers_and_threads(cores)
    assert len(set(pairs)) == len(pairs) > 1 or cores == 1
    assert all(producers >= 1 and threads >= 1 for producers, threads in pairs)
    if cores > rungs.FEW_CORES:
        assert pairs[0] == (3, cores - 3)
        assert all(producers + threads == cores for producers, threads in pairs)


def test_a_figure_without_rows_of_its_own_shows_what_was_published(tmp_path: Path) -> None:
    text: list[str] = []
    assert figures.draw([], tmp_path, text) == [tmp_path / "figure-8.png"]
    assert "Figure 7 is missing: none of its rungs was measured." in text


def test_every_figure_shows_what_was_measured_on_each_device(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rungs of a host with a GPU, each measured: rung n does 10 + n images/s."""
    monkeypatch.setattr(rungs, "gpu_trouble", lambda: "")
    table = [rung for rung in rungs.rungs(find_artifact(str(tiny_model)), cores=8, images=8) if not rung.absent]
    rows = [
        {
            "rung": rung.name, "figure": rung.figure, "device": rung.device, "config": rung.config, "core": rung.core,
            "rounds": 1, "failures": [], "images_per_s": 10.0 + number,
            "stages_ms_per_image": {"preprocess": 4.0, "forward": 8.0 / rung.config.get("threads", 1)},
        }
        for number, rung in enumerate(table)
    ]  # fmt: skip
    rates = {(row["rung"], row["device"]): row["images_per_s"] for row in rows}
    drawn: dict[str, Any] = {}
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: drawn.setdefault(str(len(drawn) + 4), figure.axes[0]))
    assert [path.name for path in figures.draw(rows, tmp_path, [])] == [f"figure-{n}.png" for n in range(4, 11)]

    def line(figure: str, label: str) -> dict[float, float]:
        (found,) = [one for one in drawn[figure].lines if one.get_label() == label]
        return dict(zip(*found.get_data(), strict=True))

    def bars(figure: str) -> list[float]:
        return [bar.get_height() for bar in drawn[figure].patches]

    assert line("4", "forward, here") == pytest.approx({1: 1, 2: 1 / 2, 4: 1 / 4, 8: 1 / 8})
    assert bars("5")[:2] == [rates["hf one by one", "cpu"], rates["hf one by one, gpu", "gpu"]]
    for device, end in (("cpu", ""), ("gpu", ", gpu")):
        batches = line("6", f"{device}, here")
        assert list(batches) == list(rungs.BATCHES)
        assert batches[2048] == rates[f"hf batches of 2048{end}", device]
        counts = line("9", f"{device}, here")
        assert counts[1] == 1
        assert counts[4] == rates[f"hf 4 replicas{end}", device] / rates[f"hf 1 replica{end}", device]
    pairs = len(rungs.producers_and_threads(8))
    assert bars("7")[0] == rates["hf 3 producers", "cpu"] / rates["hf batches of 32", "cpu"]
    assert len(bars("7")) == pairs + 2
    assert rates["nightjar static cpu+gpu", "cpu+gpu"] in bars("8")
    assert drawn["10"].patches[0].get_width() == 1
    monkeypatch.undo()
    pyplot.close("all")


def test_our_rungs_climb_one_change_at_a_time_whatever_the_cards_say(tiny_model: Path) -> None:
    """A compiled engine that looked slow when it was built stands before its int8 all the same."""
    artifact = find_artifact(str(tiny_model))
    (fp32,) = [card for _, card in artifact.cards() if card.tower == "vision"]
    cards = [
        replace(fp32, runtime="aoti-cpu", precision="int8", rows_per_s=20.0),
        replace(fp32, runtime="aoti-cpu", rows_per_s=30.0),
        replace(fp32, rows_per_s=5.0, batch=100),
    ]
    artifact = cast(Artifact, SimpleNamespace(cards=lambda: [(Path(), card) for card in cards]))
    ours = [rung for rung in rungs._indexes(artifact, images=48) if not rung.absent]
    assert [rung.change for rung in ours] == [
        "our pipeline, ort-cpu fp32", "aoti-cpu instead of ort-cpu", "int8 instead of fp32"
    ]  # fmt: skip
    assert ours[0].images == 100 * rungs.BATCHES_MIN


def test_parallel_rungs_of_the_study_score_every_picture_once(tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    """Two producers and two models; seven pictures in batches of three, of which the last is short."""
    run: dict[str, Any] = {"model": str(tiny_model), "pictures": str(photos), "images": 7}
    parallel: dict[str, Any] = {"producers": 2, "devices": ["cpu", "cpu"]}
    found: list[ladder.Vectors] = []
    for sharing in ("static", "dynamic"):
        out = tmp_path / f"{len(found)}.npz"
        config = {**parallel, "sharing": sharing, "batch": 3, "runs": [{**run, "out": str(out)}]}
        done = run_measured([sys.executable, ROOT / "docs/benchmarks/seed.py", json.dumps(config)], Limit(300))
        assert done.result[0]["images"] == 7
        found.append(ladder._npz(out, images=7, batch=3))
        assert (found[-1].lost, found[-1].twice) == (0, 0)
    np.testing.assert_allclose(found[1].emb_nd, found[0].emb_nd, atol=1e-6)


def test_two_rungs_of_a_tiny_model_agree_and_leave_all_files(
    tiny_model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hugging Face one by one against `pipeline.index`, then files as `bench ladder` writes them."""
    config = {"--runtime": "ort-cpu", "--precision": "fp32", "--devices": "cpu"}
    pair = [
        Rung("hf one by one", "", "5", 20, config={"batch": 1, "threads": 1}, core=True),
        Rung("nightjar", "", "10", 28, "index", config, core=True),
        Rung("nightjar gpu", "", "10", 0, "index", absent="no GPU"),
    ]
    monkeypatch.setattr(ladder, "rungs", lambda *_: pair)
    monkeypatch.setattr(ladder, "ANSWER_PICTURES", 20)
    monkeypatch.chdir(ROOT)
    tables = list(ladder.ladder(photos, str(tiny_model), str(tiny_model), 20, 1, Limit(300), tmp_path))
    first, ours, gpu = tables[-1]
    assert gpu["skipped"] == "no GPU"
    for one in (first, ours):
        assert one["skipped"] == ""
        assert one["failures"] == []
        assert (one["lost"], one["scored_twice"]) == (0, 0)
        assert one["images_per_s"] > 0
        assert one["peak_rss_mb"] > 30
        assert 0 < one["peak_share"] < 1
    assert 0 < ours["error_over_spread"] < 0.01
    assert ours["top9_overlap"] >= 0.99
    head = {
        "cpu": "x",
        "cores": 2,
        "date": "d",
        "command": "c",
        "seconds": 1.0,
        "load_before": 0,
        "energy": "none",
        "versions": {},
    }
    figures.write("ladder", {**head, "rungs": tables[-1]}, tmp_path)
    with (tmp_path / "ladder.csv").open() as file:
        assert [line["verdict"] for line in csv.DictReader(file)] == ["ok", "ok", "no GPU"]
    text = (tmp_path / "ladder.md").read_text()
    assert "26.57" in text  # published, beside ours
    assert ("figure-10.png" in text) == (importlib.util.find_spec("matplotlib") is not None)


def lossless(lost: int) -> Any:
    """In place of `Climb._seed` and `_index`: two pictures, of which so many are lost."""
    vectors = ladder.Vectors(np.eye(2, dtype=np.float32)[lost:], lost, 0)
    return lambda *_: (ladder.Ran(vectors, 1.0, 1.0, {"forward": 1.0}), None, 1.0, None)


@pytest.mark.parametrize("reason", ["no transformers here", "the reference lost 1 pictures"])
def test_without_the_first_rung_nothing_else_is_called_right(
    tiny_model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def dies(*_: Any) -> None:
        raise ChildFailed(reason)

    pair = [Rung("hf", "", "5", 2, core=True), Rung("ours", "", "10", 2, "index")]
    monkeypatch.setattr(ladder, "rungs", lambda *_: pair)
    monkeypatch.setattr(ladder, "Answers", lambda *_: None)
    monkeypatch.setattr(ladder.Climb, "_seed", lossless(1) if "lost" in reason else dies)
    monkeypatch.setattr(ladder.Climb, "_index", lossless(0))
    *_, (first, ours) = ladder.ladder(photos, str(tiny_model), str(tiny_model), 2, 1, Limit(60), tmp_path)
    assert first["skipped"].startswith(f"failed: {reason}")
    assert ours["skipped"] == "nothing to compare with: hf did not run"
    assert figures.failed({"rungs": [first, ours]}) == ["hf"]


def test_an_index_that_lacks_a_picture_or_computed_one_twice_is_seen(tmp_path: Path) -> None:
    import h5py

    (tmp_path / "runs").mkdir()
    with h5py.File(tmp_path / "index.h5", "w") as file:
        file["key"] = ["b.jpg", "a.jpg"]
        file["embeddings"] = np.array([[2.0], [1.0]], np.float16)
    for embedded, names, want in (
        (2, ["a.jpg", "b.jpg"], (0, 0)),
        (2, ["a.jpg", "b.jpg", "c.jpg"], (1, 0)),
        (3, ["a.jpg", "b.jpg"], (0, 1)),
    ):
        (tmp_path / "runs" / "1.json").write_text(json.dumps({"embedded": embedded}))
        found = ladder.index_vectors(tmp_path, names)
        assert (found.lost, found.twice) == want
        assert found.emb_nd[:, 0].tolist() == [1.0, 2.0]


def test_a_part_ends_at_its_limit_with_everything_it_started() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start_s = time.monotonic()
    with pytest.raises(OutOfTime, match="limit of 2 s"):
        run_measured([sys.executable, "-c", code], Limit(2))
    assert time.monotonic() - start_s < 20
    time.sleep(0.5)
    left = [
        p
        for p in psutil.process_iter(["cmdline", "status"])
        if "import time; time.sleep(60)" in (p.info["cmdline"] or [])
    ]
    assert not [p for p in left if p.info["status"] != psutil.STATUS_ZOMBIE]


def test_a_measured_process_tells_time_memory_and_why_it_died() -> None:
    done = run_measured(
        [sys.executable, "-c", "b = bytearray(200 << 20); import time; time.sleep(1); print('{}')"], Limit(60)
    )
    assert done.result == {}
    assert done.wall_s >= 1
    assert 200 < done.peak_rss_mb < 400
    with pytest.raises(ChildFailed, match="ValueError: no"):
        run_measured([sys.executable, "-c", "raise ValueError('no')"], Limit(60))


def test_energy_is_read_and_its_counters_may_begin_again(tmp_path: Path) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("10000000")
    readings = []
    for microjoules in (9_000_000, 1_000_000):
        (zone / "energy_uj").write_text(str(microjoules))
        readings.append(read_energy(tmp_path))
    assert joules_between(*readings) == pytest.approx(2.0)
    assert "RAPL" in read_energy(tmp_path / "none").missing


def test_copies_have_bytes_of_their_own_and_the_pixels_of_their_original(photos: Path, tmp_path: Path) -> None:
    corpus = Corpus(sorted(photos.iterdir()), tmp_path, distinct=3)
    few, more = (sorted(corpus.folder(count).iterdir()) for count in (4, 7))
    assert [path.name for path in few] == [path.name for path in more[:4]]
    assert len({path.read_bytes() for path in more}) == 7
    pre = Preprocess(32, (0, 0, 0), (1, 1, 1))
    assert (decode(more[0].read_bytes(), pre).image_hwc == decode(more[3].read_bytes(), pre).image_hwc).all()


def test_the_dirty_corpus_is_what_it_says(photos: Path, tmp_path: Path) -> None:
    good = dirty_copies(sorted(photos.iterdir()), tmp_path / "dirty", 60)
    pre = Preprocess(32, (0, 0, 0), (1, 1, 1))
    reasons = []
    for path in sorted((tmp_path / "dirty").iterdir()):
        try:
            decode(path.read_bytes(), pre)
            assert path.name in good
        except BadImage as bad:
            assert path.name not in good
            reasons.append(bad.failure.reason)
    assert reasons == ["truncated", "empty", "too_large"]
    assert len({path.read_bytes() for path in (tmp_path / "dirty").iterdir()}) == 60


def test_the_pipeline_with_nothing_in_its_lane_counts_every_image(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes take turns, so that a slow stretch of the host hits all of them; large ones less often."""
    monkeypatch.setattr(null_engine, "TURNS", 2)
    monkeypatch.setattr(null_engine, "FEW", 300)
    asked: list[str] = []
    measured = null_engine.run_measured

    def run_measured(command: Sequence[object], limit: Limit) -> Measured:
        asked.append(Path(str(command[command.index("--root") + 1])).name)
        return measured(command, limit)

    monkeypatch.setattr(null_engine, "run_measured", run_measured)
    words = ["null", "--model", tiny_model, "--images", 300, 600, "--rounds", 1, "--out", tmp_path]
    assert main([str(word) for word in words]) == 0
    assert asked == ["null-1", "null-300", "null-600", "null-1", "null-300"]
    costs = json.loads((tmp_path / "null.json").read_text())["costs"]
    assert [(one["images"], one["runs"]) for one in costs] == [(300, 2), (600, 1)]
    for one in costs:
        parts = ("coordinator_user_us", "coordinator_system_us", "lane_user_us", "lane_system_us")
        assert 0 < one["cpu_us"] == pytest.approx(sum(one[part] for part in parts))
        assert one["over_first"] == pytest.approx(one["cpu_us"] / costs[0]["cpu_us"])
    assert "lane_user_us" in (tmp_path / "null.md").read_text()


def test_a_lane_without_an_engine_does_all_its_python(tiny_model: Path, tmp_path: Path) -> None:
    """Decoders are asked row by row; only the C beneath is left out."""
    null_engine.little_pictures(tmp_path / "pictures", 5)
    ran = subprocess.run(
        null_engine.null_command(tmp_path / "pictures", tmp_path / "index", str(tiny_model)),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report["embedded"] == 5
    assert report["decoders"] == {"simplejpeg": 5}


def test_a_limit_that_is_reached_leaves_what_was_measured(tiny_model: Path, tmp_path: Path) -> None:
    (found,) = null_engine.null_engine(str(tiny_model), [300], 1, Limit(0), tmp_path)
    assert found["costs"] == []
    assert "not reached" in found["note"]


def test_text_towers_are_timed_by_batch(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "TEXT_BATCHES", (1, 4))
    monkeypatch.setattr(encoders, "_transformers", transformers)
    monkeypatch.setattr(encoders.encoded_per_s, "__defaults__", (0.05,))
    *_, whole = encoders.text(str(tiny_model), Limit(60))
    assert [(one["runtime"], one["batch"]) for one in whole["sequences"]] == [
        ("ort-cpu", 1), ("transformers", 1), ("ort-cpu", 4), ("transformers", 4)
    ]  # fmt: skip
    assert all(one["texts encoded"] > 0 for one in whole["sequences"])
    uform = next(row for row in whole["published sequences"] if row["tower"] == "uform")
    assert (uform["texts encoded"], round(uform["times bert-base-uncased"], 2)) == (6809, 4.22)


def transformers(model: str, pictures: str, limit: Limit, batch: int) -> list[tuple[encoders.Who, dict[str, float]]]:
    return [(encoders.Who("transformers", "fp32", "cpu", batch), {"texts encoded": 1.0, "images encoded": 2.0})]


def test_encoders_take_turns_and_what_each_does_stands_in_its_own_row(
    tiny_model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([5.0, 7.0, 1.0, 2.0, 3.0, 30.0] * 2)  # a slow round and a fast one beside the true one
    monkeypatch.setattr(encoders, "_transformers", transformers)
    monkeypatch.setattr(encoders, "encoded_per_s", lambda engine: next(rates))
    for name in ("images_per_s", "texts_per_s"):
        monkeypatch.setattr(encoders, name, lambda *_: 100.0)
    *_, whole = encoders.encoders([str(tiny_model)] * 2, photos, 3, Limit(60))
    assert whole["rates"][3:] == whole["rates"][:3]  # the second model is the first one once more
    assert {row["model"] for row in whole["rates"]} == {str(tiny_model)}
    stages, engines, theirs = whole["rates"][:3]  # both towers of this model have the same batch, so one row
    assert "images encoded" not in stages
    assert stages["images preprocessed"] == stages["texts preprocessed"] == 100
    assert (engines["images encoded"], engines["texts encoded"]) == (3.0, 7.0)
    assert "images preprocessed" not in engines
    assert (theirs["runtime"], theirs["images encoded"]) == ("transformers", 2.0)

    *_, cut = encoders.encoders([str(tiny_model)], photos, 3, Limit(0))
    assert (cut["rates"], cut["note"]) == ([], f"{tiny_model}: not reached within the limit of 0 s")


def test_a_share_of_the_roofline_is_that_of_the_numbers_beside_it() -> None:
    row = roofline._row("hash", "MB/s", [(50.0, 100.0), (200.0, 210.0), (90.0, 100.0)])
    assert row == {"stage": "hash", "unit": "MB/s", "reached": 90.0, "peak": 100.0, "share": 0.9}


def test_the_store_is_timed_step_by_step() -> None:
    found = store.store(4096, 8, rounds=1)["median_rows_per_s"]
    assert set(found) == {"listing", "shards", "commit", "all"}
    assert 0 < found["all"] < min(found["listing"], found["shards"], found["commit"])


def test_a_peer_that_hangs_on_dirty_pictures_takes_nobody_s_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").touch()
    monkeypatch.setattr(peers, "DIRTY_S", 1.0)
    monkeypatch.setattr(peers, "PEERS", tmp_path / "sleeps.py")
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(60)")
    peer, limit = peers.Peer("hangs", 1, ()), Limit(300)
    row = peers._dirty(peer, Path(sys.executable), tmp_path, {"a.jpg"}, "model", tmp_path, limit)
    assert row["died"] == "had not come to an end after 1 s"
    assert limit.left_s > 250
    row = peers._dirty(peer, Path(sys.executable), tmp_path, {"a.jpg"}, "model", tmp_path, Limit(0))
    assert row["died"] == "not measured within the limit of 0 s"


def test_peers_go_on_with_their_fastest_modes(tiny_model: Path) -> None:
    table = peers.contestants(str(tiny_model))
    assert {peer.tool for peer in table} == {
        "hf-one", "hf-batched", "nightjar fp32", "sentence-transformers", "fastembed", "clip-retrieval"
    }  # fmt: skip
    rates = {"fastembed/processes": 9.0, "clip-retrieval/1x64": 8.0, "clip-retrieval/0x64": 7.0}
    found = {peer.name: [{"images_per_s": rates.get(peer.name, 5.0)}] for peer in table}
    names = {peer.name for peer in peers.fastest_modes(table, found)}
    assert names == {"hf-one", "hf-batched", "nightjar fp32", "sentence-transformers", *rates}  # 7 of 8 may be noise


def test_halves_of_a_process_a_core_add_up_and_ours_are_those_of_a_lane(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "halves.py"
    script.write_text(
        "import json, os, sys\nassert len(sys.argv) == 4\n"
        "print(json.dumps({'prepared': 40.0, 'encoded': 10.0 * int(os.environ['OMP_NUM_THREADS'])}))"
    )
    monkeypatch.setattr(peers, "PEERS", script)
    monkeypatch.setattr(peers, "physical_cores", lambda: 2)
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(noisy_jpeg(0, 64, 64))
    found = {
        peer.name: peers._halves(peer, Path(sys.executable), folder, str(tiny_model), Limit(60))
        for peer in peers.contestants(str(tiny_model))
    }
    assert found["hf-one"] == found["fastembed/threads"] == {"prepared": 40, "encoded": 20}
    assert found["fastembed/processes"] == {"prepared": 80, "encoded": 20}
    assert all(rate > 0 for rate in found["nightjar fp32"].values())


def test_every_peer_of_a_race_is_told_how_many_threads_it_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "threads.py"
    script.write_text(
        "import json, os\nprint(json.dumps({'images': 0, 'seconds': float(os.environ['OMP_NUM_THREADS'])}))"
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(race, "PEERS", script)
    (tmp_path / "none").mkdir()
    run = race._peer("fastembed/threads", sys.executable, "model", tmp_path)
    assert run(tmp_path / "none") == physical_cores()


def test_a_part_says_what_it_measured_on_beside_its_tables(tmp_path: Path) -> None:
    head = about(["text"])
    found = {"model": "m", "context": 77, "rows": [{"a": 1}], "seconds": 1.0}
    (page, _) = figures.write("text", {**head, **found}, tmp_path)
    told = page.read_text()
    assert "model: m\n" in told
    assert "context: 77\n" in told
    assert told.count(head["cpu"]) == 1


def test_what_fastembed_s_processes_take_to_load_their_models_is_not_in_their_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A contestant of 10 images/s whose clock also counts 5 s of loading."""
    script = tmp_path / "loads_late.py"
    script.write_text(
        "import json, os, sys\nimport numpy as np\n"
        "count = len(os.listdir(sys.argv[3]))\nnp.save(sys.argv[4], np.zeros((count, 2)))\n"
        "print(json.dumps({'images': count, 'seconds': 5 + count / 10}))"
    )
    monkeypatch.setattr(peers, "PEERS", script)
    (tmp_path / "photo.jpg").write_bytes(noisy_jpeg(0, 64, 64))
    corpus = Corpus([tmp_path / "photo.jpg"], tmp_path, 1)
    rates = {
        name: peers._clean(peers.Peer(name, 1, ()), Path(sys.executable), corpus, 8, "model", tmp_path, Limit(60))
        for name in (peers.FASTEMBED_PROCESSES, "fastembed/threads")
    }
    assert rates[peers.FASTEMBED_PROCESSES]["images_per_s"] == pytest.approx(10)
    assert rates["fastembed/threads"]["images_per_s"] == pytest.approx(8 / 5.8)
    assert {rate["lost"] for rate in rates.values()} == {0}


def test_what_is_missing_on_the_command_line_is_said() -> None:
    ran = run_module("pipeline.bench", "ladder", "--out", os.devnull)
    assert ran.code == 2
    assert "--pictures and --model" in ran.stderr
    ran = run_module("pipeline.bench", "text", "--out", os.devnull, "--model", "a", "b")
    assert ran.code == 2
    assert "takes one --model, 2 were given" in ran.stderr
    ran = run_module("pipeline.bench", "store", "--out", os.devnull, "--limit", 5)
    assert ran.code == 2
    assert "bench store has no --limit" in ran.stderr


def test_a_race_tells_medians_of_rates_and_of_ratios_within_a_round() -> None:
    """In a slow round both are slow: their ratio is that of the round, not of medians."""
    table = [
        {"hf-one": race.Seconds(wall_s, 2.0), "nightjar": race.Seconds(ours_s, 0.25)}
        for wall_s, ours_s in ((1.0, 0.1), (2.0, 0.25), (4.0, 0.5))
    ]
    theirs = race.rates("hf-one", table, ["nightjar"], 96)
    assert theirs == {
        "contestant": "hf-one", "images": "96 to 192", "images_per_s": 0.5, "images_per_cpu_s": 0.5,
        "nightjar over it": 8.0, "nightjar over it by CPU time": 8.0,
    }  # fmt: skip
    assert race.rates("nightjar", table, ["nightjar"], None)["nightjar over it"] == 1.0
    without_cpu = [row | {"hf-one": row["hf-one"]._replace(cpu=math.nan)} for row in table]
    by_cpu = {"images_per_cpu_s", "nightjar over it by CPU time"}
    assert race.rates("hf-one", without_cpu, ["nightjar"], 96) == {k: v for k, v in theirs.items() if k not in by_cpu}


def test_a_round_in_which_the_host_stood_still_does_not_count() -> None:
    """It did once, while the shorter of two runs was timed: 292 images/s of an engine that has 108."""
    engine, peer = race.Seconds(1 / 108, 2 / 108), race.Seconds(1 / 12, 2 / 12)

    def row(wall_s: float) -> dict[str, race.Seconds]:
        return {"hf-one": peer, "nightjar": race.Seconds(wall_s, 0.02), "nightjar, engine alone": engine}

    assert race.can_be(row(1 / 100), ["nightjar"])
    assert race.can_be(row(1 / 110), ["nightjar"])
    assert not race.can_be(row(1 / 292), ["nightjar"])
    assert not race.can_be(row(1 / 100) | {"hf-one": race.Seconds(-0.1, 0.2)}, ["nightjar"])
