"""GPU engines are chosen for the lane and the GPU they fit, named after all that goes into them, and built ahead of
time where there is no GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest
from lazy_gpu import GPU, LazyRuntime, gpu_card, lazy_runtime

from engines import EngineUnavailable, aoti_gpu, build_gpu, choose, gate, memory_gpu, open_engine, ort, trt_gpu
from engines.build import main as make_engines
from engines.spec import Artifact, EngineCard, find_artifact

runtime = pytest.fixture(lazy_runtime)


@pytest.fixture
def artifact(tiny_model: Path) -> Artifact:
    return find_artifact(str(tiny_model))


# ---- choosing ------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_cards(artifact: Artifact, tmp_path: Path) -> Callable[..., Artifact]:
    """The artifact with these GPU cards and no file copied."""
    folder = tmp_path / artifact.path.name
    folder.mkdir()
    for entry in artifact.path.iterdir():
        if entry.name != "engines":
            (folder / entry.name).symlink_to(entry)
    (folder / "engines").mkdir()
    for entry in (artifact.path / "engines").iterdir():
        (folder / "engines" / entry.name).symlink_to(entry)

    def write(*cards: EngineCard) -> Artifact:
        for number, card in enumerate(cards):
            made = folder / "engines" / f"{number}-{card.runtime}"
            made.mkdir()
            (made / "card.json").write_text(card.to_json())
        return Artifact.open(folder)

    return write


def test_a_gpu_lane_gets_gpu_engines_alone(
    artifact: Artifact, runtime: LazyRuntime, with_cards: Callable[..., Artifact]
) -> None:
    cuda = gpu_card(artifact)
    found = with_cards(cuda, replace(cuda, rows_per_s=9e5, host="sm90-nvidia-h200-driver580.65.06"))
    assert choose(found, "vision", device="gpu").card == cuda
    assert "built for sm90-nvidia-h200" in choose(found, "vision", device="gpu").reason
    assert choose(found, "vision").card.runtime == "ort-cpu"
    assert choose(found, "vision", "cuda").card == cuda  # named, it says itself where it runs
    assert choose(found, "text").card.runtime == "ort-cpu"
    with pytest.raises(EngineUnavailable, match="runtime cuda runs on a gpu, this lane is a cpu"):
        choose(found, "vision", "cuda", device="cpu")
    with pytest.raises(EngineUnavailable, match="no text engine for runtime auto"):
        choose(found, "text", device="gpu")


def test_an_engine_built_without_a_gpu_opens_by_name_alone(
    artifact: Artifact, runtime: LazyRuntime, with_cards: Callable[..., Artifact]
) -> None:
    ahead = gpu_card(artifact, "tensorrt-rtx", "fp16", host="sm89", verified=False, passed=False, versions={})
    found = with_cards(ahead, replace(ahead, host="sm120"))
    with pytest.raises(EngineUnavailable, match="built without a GPU, never compared with the reference"):
        choose(found, "vision", device="gpu")
    assert choose(found, "vision", "tensorrt-rtx").card.host == "sm89"


def test_without_a_gpu_an_engine_for_one_says_why(artifact: Artifact, with_cards: Callable[..., Artifact]) -> None:
    if memory_gpu.gpus():
        pytest.skip("there is a GPU here")
    with pytest.raises(EngineUnavailable, match=r"cuda-bindings cannot be imported|no GPU"):
        open_engine(with_cards(gpu_card(artifact)), "vision", "cuda")


# ---- building ------------------------------------------------------------------------------------------------------


def test_gpu_batches_are_sized_by_tokens() -> None:
    assert {tokens: build_gpu.batch_rows(tokens) for tokens in (5, 50, 197, 257, 577)} == {
        5: 256, 50: 256, 197: 128, 257: 64, 577: 32,
    }  # fmt: skip


def test_the_name_of_an_engine_hashes_all_that_goes_into_it(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_gpu, "problem", lambda runtime: "")
    monkeypatch.setattr(build_gpu, "_versions", lambda runtime: {"tensorrt-cu13": "10.16.1.11"})

    def folder(changed: Artifact = artifact, host: str = GPU.identity, precision: Any = "fp16", recipe: int = 1) -> str:
        return build_gpu._want(changed, "tensorrt", precision, recipe, host).folder

    first = folder()
    assert first == folder()
    assert first.startswith("vision-tensorrt-fp16-sm89-")
    spec = artifact.spec
    others = [
        folder(host=GPU._replace(driver="581.1").identity),
        folder(host=GPU._replace(name="NVIDIA L40S").identity),
        folder(precision="bf16"),
        folder(recipe=2),
        folder(Artifact(artifact.path, replace(spec, weights_digest="feed" * 16))),
        folder(Artifact(artifact.path, replace(spec, vision=replace(spec.vision, tokens=5000)))),
    ]
    monkeypatch.setattr(build_gpu, "_versions", lambda runtime: {"tensorrt-cu13": "10.17.0.1"})
    others.append(folder())
    assert len({first, *others}) == 8


def test_a_new_driver_replaces_its_engine_and_no_others(
    artifact: Artifact, with_cards: Callable[..., Artifact]
) -> None:
    old = gpu_card(artifact, host=GPU._replace(driver="570.1").identity)
    found = with_cards(old, gpu_card(artifact, host="sm89-nvidia-l40s-driver570.1"), replace(old, runtime="aoti-cuda"))
    gone = build_gpu.superseded(found, gpu_card(artifact), found.path / "engines" / "new")
    assert [folder.name for folder in gone] == ["0-cuda"]


def test_what_is_named_and_cannot_be_built_is_an_error(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    if memory_gpu.gpus():
        pytest.skip("there is a GPU here")
    model = artifact.spec.model
    for runtime in ("tensorrt", "cuda", "aoti-cuda"):
        assert make_engines(["--model", model, "--runtime", runtime]) == 2
        assert f"{runtime} is built on the GPU it is for: " in capsys.readouterr().err
    assert make_engines(["--model", model, "--precision", "fp16"]) == 2
    assert "fp16 engines are built for a GPU: " in capsys.readouterr().err
    assert make_engines(["--model", model, "--runtime", "cuda", "--target", "sm89"]) == 2
    assert "only tensorrt-rtx builds for a GPU that is not here" in capsys.readouterr().err


def test_auto_says_what_it_leaves_out(
    artifact: Artifact, runtime: LazyRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = {"tensorrt": "", "cuda": "", "aoti-cuda": ""}
    monkeypatch.setattr(build_gpu, "problem", lambda name: problems[name])
    monkeypatch.setattr(build_gpu, "_versions", lambda name: {})
    monkeypatch.setattr(build_gpu, "gpus", lambda: [GPU, GPU._replace(index=1, name="NVIDIA T4", sm="sm75")])

    def planned() -> tuple[list[str], list[str]]:
        wants, notes = build_gpu.plan_gpu(artifact, "auto", "auto", 1, None)
        assert {want.precision for want in wants} == {"fp16"}
        return [want.runtime for want in wants], notes

    wants, notes = planned()
    assert wants == ["tensorrt", "cuda"]
    assert notes == [
        "built for sm89-nvidia-l4-driver580.65.06 alone; for sm75-nvidia-t4-driver580.65.06 run it again with "
        "CUDA_VISIBLE_DEVICES"
    ]
    wants_bf16, notes_bf16 = build_gpu.plan_gpu(artifact, "auto", "bf16", 1, None)
    assert [(want.runtime, want.precision) for want in wants_bf16] == [("tensorrt", "bf16")]
    assert "cuda has no bf16 here; it has fp16, fp32. Going on without cuda" in notes_bf16
    assert build_gpu.plan_gpu(artifact, "auto", "int8", 1, None)[0][0].precision == "fp16"  # int8 is for the CPU
    problems["tensorrt"] = "no TensorRT"
    assert planned()[0] == ["cuda", "aoti-cuda"]
    assert "no TensorRT. Going on without tensorrt" in planned()[1]
    with pytest.raises(EngineUnavailable, match="cuda has no bf16 here; it has fp16, fp32"):
        build_gpu.plan_gpu(artifact, "cuda", "bf16", 1, None)


no_rtx = trt_gpu.problem("tensorrt-rtx")
needs_rtx = pytest.mark.skipif(bool(no_rtx), reason=f"nothing builds without a GPU here: {no_rtx}")


@needs_rtx
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_engine_is_built_ahead_for_a_gpu_that_is_not_here(
    tiny_model: Path,
    tmp_path: Path,
    precision: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NIGHTJAR_ARTIFACTS", str(tmp_path))
    arguments = ["--model", str(tiny_model), "--runtime", "tensorrt-rtx", "--target", "sm89", "--precision", precision]
    assert make_engines(arguments) == 0
    out = capsys.readouterr().out
    assert "unverified" in out
    assert "auto takes for vision: ort-cpu" in out
    path, card = next(found for found in find_artifact(str(tiny_model)).cards() if found[1].runtime == "tensorrt-rtx")
    assert (card.host, card.verified, card.passed, card.parity) == ("sm89", False, False, {})
    assert card.input_dtype == {"fp16": "float16", "bf16": "float32"}[precision]
    assert card.fused_attention == 2  # the tiny model has two layers
    assert card.kernels == len(json.loads((path.parent / trt_gpu.KERNELS).read_text()))
    assert card == EngineCard.from_json(card.to_json())
    assert make_engines(arguments) == 0
    assert "nothing changed: 3 engines are current" in capsys.readouterr().out
    assert make_engines([*arguments[:-3], "sm90"]) == 2
    assert "does not build for target 'sm90'" in capsys.readouterr().err


def test_fp16_input_is_the_same_graph_without_its_first_cast(artifact: Artifact, tmp_path: Path) -> None:
    graph, half = artifact.onnx("vision", "fp16"), tmp_path / "half.onnx"
    half.write_bytes(trt_gpu.half_input(graph))
    rows = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float16)
    got, want = (
        onnxruntime.InferenceSession(path, providers=[ort.CPU_PROVIDER]).run(None, {"pixels": pixels})[0]
        for path, pixels in ((half, rows), (graph, rows.astype(np.float32)))
    )
    np.testing.assert_array_equal(got, want)
    assert len(onnx.load(half).graph.node) == len(onnx.load(graph).graph.node) - 1
    other = artifact.onnx("vision", "fp32")
    assert trt_gpu.half_input(other) == other.read_bytes()


def test_kernels_are_read_from_both_kinds_of_listing() -> None:
    log = [
        "Name: _gemm_mha_v2_0, LayerType: kgen, Inputs: []",
        "Name: x, LayerType: signal, y",
        "  Name: z, LayerType: a",
    ]
    assert trt_gpu.logged_kernels(log) == ["_gemm_mha_v2_0"]
    layers = [{"Name": "_gemm_mha_v2_0", "LayerType": "kgen"}, {"Name": "w", "LayerType": "wait"}, {"Name": "fc"}]
    listing = json.dumps({"Layers": layers, "Bindings": []})
    assert trt_gpu.inspected_kernels(listing) == ["_gemm_mha_v2_0", "fc"]
    assert trt_gpu.Built(b"", trt_gpu.inspected_kernels(listing)).attention == 1


# ---- AOTInductor: the same package path on the CPU's backend -------------------------------------------------------


class CpuPackageEngine(aoti_gpu.AotiCudaEngine):
    def _expect_gpu(self) -> None:
        pass

    def _tensor(self, array: Any) -> Any:
        import torch

        block = memory_gpu._runtime().blocks[array.pointer]
        return torch.frombuffer(block, dtype=getattr(torch, array.dtype.name)).view(array.shape)

    def _on_stream(self) -> Any:
        return nullcontext()

    def _enqueue(self, slot: int) -> None:
        memory_gpu._runtime().queue(self.stream.handle, lambda: super(CpuPackageEngine, self)._enqueue(slot))


def test_a_package_runs_any_batch_up_to_its_own(
    artifact: Artifact, runtime: LazyRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from export.to_aoti import package_tower
    from export.towers import load_towers

    vision = load_towers(artifact.spec.model).vision
    pixels, _ = gate.golden(artifact, "vision")
    package_tower(vision, pixels, "fp32", tmp_path / "engine.pt2", device="cpu")
    assert vision.blocks[0].attention.__name__ == "plain_attention"  # the tower itself is as it was
    card = gpu_card(artifact, "aoti-cuda", file="engine.pt2", compiled_rows=len(pixels), batch=len(pixels))
    opened: list[dict[str, Any]] = []
    plain = torch._inductor.aoti_load_package
    monkeypatch.setattr(
        torch._inductor, "aoti_load_package", lambda path, **how: (opened.append(how), plain(path, **how))[1]
    )
    for batch in (len(pixels), 5, 1):
        engine = CpuPackageEngine(tmp_path / "card.json", card, 1, batch)
        assert gate.check(cast(gate.ExactEngine, engine), artifact).error_over_spread < 1e-5
    # Otherwise torch's runner waits for the run before each run, with the GIL held, and a lane overlaps nothing.
    assert opened == 3 * [{"run_single_threaded": True}]
