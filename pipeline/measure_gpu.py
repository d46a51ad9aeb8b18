"""First measurements on a GPU, and what needs an exported model. Run through `python -m pipeline.check_gpu`.

Each takes seconds, not minutes: they say where the limits are, they are no benchmark. Never run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.spec import Artifact, ModelSpec
from pipeline.rig_gpu import (
    CPU,
    DEVICE,
    HYBRID,
    SIZE,
    CannotRun,
    Decoder,
    Finding,
    Job,
    Rig,
    corpus,
    jpeg,
    mixed,
    module,
    shrink,
    upright,
)

BATCH = 256
SECONDS = 2.0
Vectors = npt.NDArray[np.float32]
CUDA_EP = "CUDAExecutionProvider"
# In the order in which they need each other; found beside torch where the CUDA 13 packages of pip keep them.
CUDA_LIBRARIES = "cudart.so.13", "cublasLt.so.13", "cublas.so.13", "curand.so.10", "nvrtc.so.13", "cudnn.so.9"


def per_second(step: Callable[[], None], rows: int, wait: Callable[[], None], warm: int = 3) -> float:
    """Rows a second over about SECONDS, the queue drained before each reading of the clock."""
    for _ in range(warm):
        step()
    wait()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        step()
        steps += 1
    wait()
    return rows * steps / (time.perf_counter() - began)


def decode_rates(job: Job) -> Finding:
    """Every mix starts with full batches: the hardware engine's share of a batch is fixed by the first one."""
    some = list(corpus(job, 64).values()) if job.pictures else [jpeg(500, 375, seed=i) for i in range(64)]
    pictures = (some * BATCH)[:BATCH]
    mixes = {f"engine {share}": mixed(share) for share in (0.3, 0.5, 0.65, 0.8, 1.0)}
    mixes |= {"hybrid": [(HYBRID, 1.0), (CPU, 1.0)], "cpu": [(CPU, 1.0)]}
    rates: dict[str, float] = {}
    for name, backends in mixes.items():
        decoder = Decoder(backends)
        if failed := sum(image is None for image in decoder.decode(pictures)):
            raise RuntimeError(f"{name}: {failed} of {BATCH} pictures were not decoded")
        step = per_second(lambda d=decoder: d.decode(pictures), BATCH, decoder.stream.synchronize)  # type: ignore[misc]
        rates[name] = round(step)
    best = max(rates, key=lambda name: rates[name])
    kb = round(sum(map(len, pictures)) / BATCH / 1000)
    return Finding(True, f"best {best}: {rates[best]} img/s at {kb} kB; all: {rates}", {"rates": rates, "kB": kb})


def preprocess_rate(job: Job) -> Finding:
    rig, rates = Rig(), {}
    decoded = rig.decode([jpeg(500, 375, seed=i % 16) for i in range(BATCH)])
    images = rig.images(decoded)
    for dtype in ("float32", "float16"):
        shape = (BATCH, 3, SIZE, SIZE)
        out = rig.torch.zeros(shape, dtype=getattr(rig.torch, dtype), device=rig.torch.device(DEVICE))
        held: list[Any] = []

        def step(out: Any = out, held: list[Any] = held) -> None:
            held[:] = [*held[-8:], rig.crop(rig.resize(images), out, (123, 117, 104), (68, 67, 70))]

        rates[dtype] = round(per_second(step, BATCH, rig.stream.synchronize))
    cache = int(rig.cv.current_cache_size_inbytes())
    return Finding(True, f"{rates} img/s; CV-CUDA keeps {cache >> 20} MiB", {"rates": rates, "cache_bytes": cache})


def memory(job: Job) -> Finding:
    """The cache of CV-CUDA is keyed by exact shape, so ever new sizes are what makes it grow."""
    rig, used = Rig(), []
    for batch in range(60):
        decoded = rig.decode([jpeg(200 + 7 * batch + i, 300 + 5 * i, seed=i) for i in range(8)])
        rig.levels(decoded)
        if batch % 10 == 9:
            free, total = rig.torch.cuda.mem_get_info()
            used.append((total - free) >> 20)
    growth = used[-1] - used[1]
    limit = int(rig.cv.get_cache_limit_inbytes()) >> 20
    answer = f"GPU memory in MiB after 10, 20, ... batches: {used}; cache limit {limit} MiB"
    return Finding(growth <= 256, answer, {"used_mib": used, "growth_mib": growth, "limit_mib": limit})


def graphs(job: Job) -> tuple[Artifact, dict[str, Path]]:
    if job.artifact is None:
        raise CannotRun("no --artifact DIR given: export one with `make engines` and carry it here")
    artifact = Artifact.open(job.artifact)
    found = {"fp32": artifact.onnx("vision", "fp32"), "fp16": artifact.onnx("vision", "fp16")}
    return artifact, {precision: path for precision, path in found.items() if path.is_file()}


def session(ort: Any, graph: Path, stream: int | None) -> Any:
    """A session whose matrix work is all on the CUDA provider, or an error that says what is not.

    ORT drops a provider whose libraries do not load and goes on with the CPU, whatever `enable_fallback` says, so what
    it did is asked for afterwards. Shape arithmetic on the CPU is its own choice and harmless.
    """
    options, own = ort.SessionOptions(), {"device_id": 0}
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if stream is not None:
        own["user_compute_stream"] = stream
    made = ort.InferenceSession(str(graph), options, providers=[(CUDA_EP, own)], enable_fallback=False)
    if CUDA_EP not in made.get_providers():
        raise RuntimeError(f"ORT dropped {CUDA_EP} and runs on {made.get_providers()}: its libraries did not load")
    heavy: Counter[str] = Counter()
    for part in made.get_provider_graph_assignment_info():
        heavy.update(part.ep_name for node in part.get_nodes() if node.op_type in ("MatMul", "Gemm", "Conv"))
    if set(heavy) - {CUDA_EP}:
        raise RuntimeError(f"matrix nodes per provider: {dict(heavy)}, expected all on {CUDA_EP}")
    return made


class Bound:
    """A vision graph with its input and output in GPU memory, on a stream of its own."""

    def __init__(self, graph: Path, batch: int, spec: ModelSpec) -> None:
        size, dim = spec.preprocess.size, spec.dim
        self.torch = module("torch")  # before ORT: it brings cuBLAS and cuDNN along
        device = self.torch.device(DEVICE)
        self.stream = self.torch.cuda.Stream(device)
        self.session = session(module("onnxruntime"), graph, self.stream.cuda_stream)
        (into,), (out,) = self.session.get_inputs(), self.session.get_outputs()
        types = {"tensor(float)": "float32", "tensor(float16)": "float16"}
        self.x = self.torch.zeros((batch, 3, size, size), dtype=getattr(self.torch, types[into.type]), device=device)
        self.y = self.torch.zeros((batch, dim), dtype=getattr(self.torch, types[out.type]), device=device)
        self.torch.cuda.synchronize()
        self.binding = self.session.io_binding()
        for bind, one, tensor in ((self.binding.bind_input, into, self.x), (self.binding.bind_output, out, self.y)):
            bind(one.name, device.type, 0, np.dtype(types[one.type]).type, tuple(tensor.shape), tensor.data_ptr())

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)


def engine_rates(job: Job) -> Finding:
    artifact, found = graphs(job)
    rates: dict[str, int] = {}
    for precision, graph in found.items():
        bound = Bound(graph, BATCH, artifact.spec)
        rates[precision] = round(per_second(bound.run, BATCH, bound.stream.synchronize))
    tflops = {name: round(rate * artifact.spec.vision.gflop / 1000, 1) for name, rate in rates.items()}
    return Finding(bool(rates), f"batch {BATCH}: {rates} img/s, {tflops} TFLOP/s", {"rates": rates, "tflops": tflops})


def vectors(job: Job) -> Finding:
    """Both halves at once: pixels and half precision on the GPU, against Pillow and fp32 on the CPU."""
    artifact, found = graphs(job)
    spec = artifact.spec.preprocess
    mean, std = (tuple(255 * x for x in values) for values in (spec.mean, spec.std))
    pictures = [jpeg(500, 375, seed=i) for i in range(16)] + list(corpus(job, 16).values())
    levels = np.stack([shrink(upright(data), spec.size) for data in pictures])
    plane = ((levels - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))).astype(np.float32)
    ort, rig = module("onnxruntime"), Rig(spec.size)
    cpu = ort.InferenceSession(str(found["fp32"]), providers=["CPUExecutionProvider"])
    (want,) = cpu.run(None, {cpu.get_inputs()[0].name: plane})
    ours = rig.pixels(rig.decode(pictures), mean, std, "float32")
    rows = {}
    for precision, graph in found.items():
        bound = Bound(graph, len(pictures), artifact.spec)
        for name, pixels in (("same", rig.torch.from_numpy(plane)), ("gpu", ours)):
            bound.x.copy_(pixels)
            rig.torch.cuda.synchronize()
            bound.run()
            bound.stream.synchronize()
            rows[f"{precision}, {name} pixels"] = apart(bound.y.float().cpu().numpy(), want)
    ok = min(row["min cosine"] for row in rows.values()) > 0.999
    return Finding(ok, f"{len(pictures)} pictures: {rows}", rows)


def apart(got_nd: Vectors, want_nd: Vectors) -> dict[str, float]:
    spread = np.linalg.norm(want_nd - want_nd.mean(0), axis=1).mean()
    error = np.linalg.norm(got_nd - want_nd, axis=1).mean() / spread
    return {"error/spread": round(float(error), 5), "min cosine": round(float((got_nd * want_nd).sum(1).min()), 6)}


def no_torch(job: Job) -> Finding:
    """Load the CUDA libraries of the host by hand, then ORT: what a lane without torch has to do."""
    artifact, found = graphs(job)
    size, graph = artifact.spec.preprocess.size, found.get("fp16") or found["fp32"]
    folders = [Path(entry) for entry in module("nvidia").__path__]
    loaded, away = [], []
    for name in CUDA_LIBRARIES:
        paths = [str(path) for folder in folders for path in folder.glob(f"*/lib/lib{name}")]
        path = paths[0] if paths else f"lib{name}"
        try:
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
            loaded.append(path)
        except OSError as error:
            away.append(f"{path}: {error}")
    run = session(module("onnxruntime"), graph, None)
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[run.get_inputs()[0].type]
    (out,) = run.run(None, {run.get_inputs()[0].name: np.zeros((2, 3, size, size), dtype)})
    ok = bool(np.isfinite(out).all())
    answer = f"{len(loaded)} libraries loaded by path, {len(away)} away; vectors are {'finite' if ok else 'NOT finite'}"
    return Finding(ok, answer, {"loaded": loaded, "away": away})
