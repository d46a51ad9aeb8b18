"""The GPU half of `make engines`: which engines a GPU gets, their compilation and their cards. Not run on a GPU yet.

`tensorrt` and `cuda` are built wherever they can be, `aoti-cuda` where there is no TensorRT; fp16 unless another
precision is named. `tensorrt-rtx` is built when it is named, with `--target sm89` for a GPU that is not here: its card
says unverified, and `auto` never takes it. Text queries stay on the CPU.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from engines import EngineUnavailable, aoti_gpu, file_digest, gate, ort, ort_gpu, trt_gpu
from engines.hardware import cxx_compiler
from engines.memory_gpu import gpu_problem, gpus
from engines.plan import INSTALL_CXX, PrecisionWish, Want
from engines.spec import Artifact, EngineCard, Precision, digest_json

# GEMMs of so many rows fill a large GPU several times over (B/32: 256 pictures), more only delays the first vector and
# holds more decoded pictures in memory. A guess until a GPU has been measured.
BATCH_TOKENS, BATCH_MIN, BATCH_MAX = 26_000, 8, 256
GPU_PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "tensorrt": ("fp16", "bf16", "fp32"),
    "cuda": ("fp16", "fp32"),
    "aoti-cuda": ("fp16", "bf16", "fp32"),
    "tensorrt-rtx": ("fp16", "bf16", "fp32"),
}
NVIDIA_DEVICE = Path("/dev/nvidiactl")


def plan_gpu(
    artifact: Artifact, runtime: str, precision: PrecisionWish, recipe: int, target: str | None
) -> tuple[list[Want], list[str]]:
    """The engines the first GPU of this host should have, and in words what was left out.

    Raises:
        EngineUnavailable: what was named cannot be built here.
    """
    if target is not None:
        if runtime != "tensorrt-rtx":
            raise EngineUnavailable(
                f"only tensorrt-rtx builds for a GPU that is not here: --runtime tensorrt-rtx --target {target}"
            )
        want = _want(artifact, runtime, _precision(runtime, precision), recipe, target, verified=False)
        return [want], [f"built for {target} without a GPU: unverified, and never chosen by auto"]
    if not gpus():
        if precision == "fp16":
            raise EngineUnavailable(f"fp16 engines are built for a GPU: {gpu_problem()}")
        if runtime == "auto":  # silent where nothing looks like a GPU
            return [], [f"no engines for a GPU: {gpu_problem()}"] if NVIDIA_DEVICE.exists() else []
        ahead = "; to build ahead of time: --target sm89" if runtime == "tensorrt-rtx" else ""
        raise EngineUnavailable(f"{runtime} is built on the GPU it is for: {gpu_problem()}{ahead}")
    gpu, *others = gpus()
    notes = []
    if kinds := {other.identity for other in others} - {gpu.identity}:
        notes.append(f"built for {gpu.identity} alone; for {', '.join(kinds)} run it again with CUDA_VISIBLE_DEVICES")
    if runtime != "auto":
        return [_want(artifact, runtime, _precision(runtime, precision), recipe, gpu.identity)], notes
    wants: list[Want] = []
    wish: PrecisionWish = "auto" if precision == "int8" else precision  # int8 is named for a CPU
    for name in ("tensorrt", "cuda", "aoti-cuda"):
        if name == "aoti-cuda" and wants and wants[0].runtime == "tensorrt":
            break
        try:
            wants.append(_want(artifact, name, _precision(name, wish), recipe, gpu.identity))
        except EngineUnavailable as error:
            notes.append(f"{error}. Going on without {name}")
    return wants, notes


def problem(runtime: str) -> str:
    """Why engines of `runtime` cannot be built with what is installed here; empty where they can."""
    if runtime == "tensorrt":
        return ort_gpu.problem(ort_gpu.TENSORRT_PROVIDER) or trt_gpu.problem(runtime)
    if runtime == "cuda":
        return ort_gpu.problem(ort_gpu.CUDA_PROVIDER)
    if runtime == "aoti-cuda":
        return aoti_gpu.problem() or ("" if cxx_compiler() else f"aoti-cuda needs a C++ compiler; {INSTALL_CXX}")
    return trt_gpu.problem(runtime)


def _precision(runtime: str, wish: PrecisionWish) -> Precision:
    """fp16 by itself: what CLIP was trained in, and the fastest that every GPU has."""
    chosen: Precision = "fp16" if wish == "auto" else wish
    if chosen not in GPU_PRECISIONS[runtime]:
        raise EngineUnavailable(f"{runtime} has no {chosen} here; it has {', '.join(GPU_PRECISIONS[runtime])}")
    return chosen


def _want(
    artifact: Artifact, runtime: str, precision: Precision, recipe: int, host: str, *, verified: bool = True
) -> Want:
    """Its name hashes all that goes into the engine: plans of one architecture look alike from outside."""
    if why := problem(runtime):
        raise EngineUnavailable(why)
    rows = batch_rows(artifact.spec.vision.tokens)
    parts = {
        "weights": artifact.spec.weights_digest,
        "graph": file_digest(_graph(artifact, precision)),
        "precision": precision,
        "rows": [1, rows],
        "gpu": host,  # SM, name and driver; the SM alone where the GPU is not here
        "versions": _versions(runtime),
        "recipe": recipe,
    }
    place = f"{host.partition('-')[0]}-{digest_json(parts)[:12]}"
    return Want("vision", runtime, precision, rows, host, place, verified)


def _graph(artifact: Artifact, precision: Precision) -> Path:
    """What an engine of `precision` is made from. bf16 is not kept in an artifact: it is fp32, rounded when needed."""
    return artifact.onnx("vision", "fp32" if precision == "bf16" else precision)


def batch_rows(tokens: int) -> int:
    """The largest power of two within `BATCH_TOKENS`. B/32: 256, B/16: 128, L/14: 64, L/14 at 336 pixels: 32."""
    rows = BATCH_MIN
    while rows < BATCH_MAX and 2 * rows * tokens <= BATCH_TOKENS:
        rows *= 2
    return rows


def _versions(runtime: str) -> dict[str, str]:
    if runtime == "aoti-cuda":
        return aoti_gpu.versions()
    with_plan = trt_gpu.versions(runtime) if runtime in trt_gpu.LIBRARIES else {}
    with_session = {ort.package(): metadata.version(ort.package())} if runtime in ("tensorrt", "cuda") else {}
    return {**with_plan, **with_session}


def compile_gpu(artifact: Artifact, want: Want, folder: Path, recipe: int) -> EngineCard:
    """Compile what was planned into `folder`; the card of an engine that is whole but neither gated nor measured."""
    sm = gpus()[0].sm if want.verified else want.host
    kernels: list[str] = []
    attention = 0
    if want.runtime in trt_gpu.LIBRARIES:
        file = trt_gpu.PLAN
        built = _plan(artifact, want, sm)
        kernels, attention = built.kernels, built.attention
        (folder / file).write_bytes(built.plan)
        (folder / trt_gpu.KERNELS).write_text(json.dumps(kernels, indent=1) + "\n")
    elif want.runtime == "cuda":
        file = f"../../onnx/{artifact.onnx('vision', want.precision).name}"
    else:
        file = "engine.pt2"
        _package(artifact, want, folder / file)
    inputs, vectors = gate.golden(artifact, "vision")
    card = EngineCard(
        tower="vision",
        runtime=want.runtime,
        precision=want.precision,
        host=want.host,
        weights_digest=artifact.spec.weights_digest,
        file=file,
        file_digest=file_digest(folder / file),
        batch=want.batch,
        compiled_rows=0 if want.runtime == "cuda" else want.batch,
        threads=0,
        input_name="pixels",
        input_dtype=_input_dtype(want),
        row_shape=inputs.shape[1:],
        output_name="vectors",
        dim=vectors.shape[1],
        versions=_versions(want.runtime),
        parity={},
        passed=False,
        rows_per_s=0.0,
        gflop_per_s=0.0,
        peak_share=0.0,
        bytes=(folder / file).stat().st_size,
        recipe=recipe,
        verified=want.verified,
        kernels=len(kernels),
        fused_attention=attention,
    )
    if want.runtime == "tensorrt":
        trt_gpu.write_context(folder, card, sm)
    return card


def _input_dtype(want: Want) -> str:
    return "float16" if want.precision == "fp16" and want.runtime != "cuda" else "float32"


def _plan(artifact: Artifact, want: Want, sm: str) -> trt_gpu.Built:
    rtx = want.runtime == "tensorrt-rtx"
    # Beside the artifacts: models of one shape share it; what another GPU, driver or TensorRT measured is of no use.
    measured = f"timing-{want.host}-{digest_json(_versions(want.runtime))[:8]}.cache"
    cache = None if rtx else artifact.path.parent / measured
    target = sm if rtx else None
    if want.precision != "bf16":
        return trt_gpu.build_plan(want.runtime, _graph(artifact, want.precision), want.batch, target, cache)
    from export.to_onnx import save_graph
    from export.towers import load_towers

    with TemporaryDirectory(dir=artifact.path, prefix=".graph-") as scratch:
        graph = Path(scratch) / "vision-bf16.onnx"
        save_graph(load_towers(artifact.spec.model).vision, "bf16", artifact.spec.dim, graph)
        return trt_gpu.build_plan(want.runtime, graph, want.batch, target, cache)


def _package(artifact: Artifact, want: Want, package: Path) -> None:
    from export.to_aoti import package_tower
    from export.towers import load_towers

    golden_rows, _ = gate.golden(artifact, "vision")
    example = np.resize(golden_rows, (want.batch, *golden_rows.shape[1:])).astype(_input_dtype(want))
    package_tower(load_towers(artifact.spec.model).vision, example, want.precision, package)


def peak_gflops(card: EngineCard) -> float:
    """The GEMM peak of this GPU in the precision of `card`; 0 where nothing here measures it."""
    if card.runtime == "aoti-cuda":
        return aoti_gpu.gemm_peak_gflops(card.precision)
    if ort_gpu.problem(ort_gpu.CUDA_PROVIDER):
        return 0.0
    return ort_gpu.gemm_peak_gflops(card.precision)


def superseded(artifact: Artifact, card: EngineCard, keep: Path) -> list[Path]:
    """Folders of engines that `card` replaces: same GPU, runtime and precision, of another driver, library or graph."""
    model = card.host.partition("-driver")[0]
    return [
        path.parent
        for path, other in artifact.cards()
        if path.parent != keep
        and (other.tower, other.runtime, other.precision) == (card.tower, card.runtime, card.precision)
        and other.host.partition("-driver")[0] == model
    ]
