"""Which engines this host should have for a model, and why: runtime by compiler, precision by CPU, batch by tokens."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from engines import GPU_RUNTIMES, RUNTIMES, EngineUnavailable
from engines.hardware import cxx_compiler, gemm_peak_gflops, has_bf16, has_int8, host_id, physical_cores
from engines.spec import Artifact, Precision, Tower

PrecisionWish: TypeAlias = Literal["auto", "fp32", "bf16", "fp16", "int8"]
REFERENCE, COMPILED = "ort-cpu", "aoti-cpu"
# GEMMs of 400 rows run as fast as those of 1,600 (B/32 on one thread: .83 of the peak); more adds latency and memory.
BATCH_TOKENS, BATCH_MIN, BATCH_MAX = 512, 2, 32
INSTALL_CXX = "install one: apt-get install g++ (Debian, Ubuntu) or dnf install gcc-c++ (Fedora, RHEL)"


class Want(NamedTuple):
    tower: Tower
    runtime: str
    precision: Precision
    batch: int
    host: str = ""  # of its card, for a GPU: `GpuInfo.identity`, or the SM of one that is not here
    place: str = ""  # of its folder, for a GPU: the SM and a digest of all that goes into the engine
    verified: bool = True

    @property
    def folder(self) -> str:
        return f"{self.tower}-{self.runtime}-{self.precision}-{self.place or host_id()}"


class PrecisionChoice(NamedTuple):
    precision: Precision
    reason: str


def plan(artifact: Artifact, runtime: str, precision: PrecisionWish) -> tuple[list[Want], list[str]]:
    """The engines this host's CPU should have, and in words what was left out or chosen for the user.

    Raises:
        EngineUnavailable: what was named cannot be built here.
    """
    if runtime not in {"auto", *RUNTIMES}:
        raise EngineUnavailable(f"unknown runtime {runtime!r}; known: auto, {', '.join(RUNTIMES)}")
    vision_rows, text_rows = batch_rows(artifact.spec.vision.tokens), batch_rows(artifact.spec.text.tokens)
    wanted = [Want("vision", REFERENCE, "fp32", vision_rows), Want("text", REFERENCE, "fp32", text_rows)]
    if runtime == REFERENCE:
        if precision in ("bf16", "int8"):
            raise EngineUnavailable(f"ort-cpu is the fp32 reference; for {precision} name --runtime aoti-cpu")
        return wanted, []
    if runtime in GPU_RUNTIMES:  # beside them the CPU needs what is always built: the text tower, the reference
        return wanted, []
    if cxx_compiler() is None:
        why = f"aoti-cpu needs a C++ compiler and {os.environ.get('CXX') or 'g++'} is not on PATH; {INSTALL_CXX}"
        if runtime == COMPILED or precision in ("bf16", "int8"):
            raise EngineUnavailable(why)
        return wanted, [f"{why}. Going on with ort-cpu alone"]
    if runtime == COMPILED and precision == "fp16":
        raise EngineUnavailable("aoti-cpu has fp32 and bf16: CPUs multiply fp16 in no hardware that it knows of")
    if precision == "int8" and not has_int8():
        flags = "avx512_vnni, avx_vnni or amx_int8"
        raise EngineUnavailable(f"int8 needs a CPU with {flags}: elsewhere sums of 8-bit products overflow")
    if precision == "auto" or precision == "fp16":  # fp16 was named for a GPU
        choice = choose_precision(artifact)
    else:
        choice = PrecisionChoice(precision, "named")
    wanted.append(Want("vision", COMPILED, choice.precision, vision_rows))
    return wanted, [f"aoti-cpu precision {choice.precision}: {choice.reason}"]


def batch_rows(tokens: int) -> int:
    """Rows of a run: the largest power of two that gives the GEMMs up to `BATCH_TOKENS` rows. B/32: 8, L/14: 2."""
    rows = BATCH_MIN
    while rows < BATCH_MAX and 2 * rows * tokens <= BATCH_TOKENS:
        rows *= 2
    return rows


def choose_precision(artifact: Artifact) -> PrecisionChoice:
    """bf16 where the CPU has it in hardware and a GEMM proves it faster. Measured once per artifact, host and torch."""
    if not has_bf16():
        return PrecisionChoice("fp32", "this CPU has neither AVX512-BF16 nor AMX, so bf16 would be emulated")
    path, torch = artifact.path / "engines" / f"precision-{host_id()}.json", metadata.version("torch")
    if path.is_file() and (kept := json.loads(path.read_text()))["torch"] == torch:
        return PrecisionChoice(kept["precision"], kept["reason"])
    threads = physical_cores()
    choice = faster_precision(gemm_peak_gflops("bf16", threads), gemm_peak_gflops("fp32", threads))
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps({**choice._asdict(), "torch": torch}))
    return choice


def faster_precision(bf16_gflops: float, fp32_gflops: float) -> PrecisionChoice:
    measured = f"measured GEMM peak bf16 {bf16_gflops:.0f}, fp32 {fp32_gflops:.0f} GFLOP/s"
    return PrecisionChoice("bf16" if bf16_gflops > fp32_gflops else "fp32", measured)


def write_whole(path: Path, text: str) -> None:
    """Under a temporary name first: whoever reads `path` reads all of it or nothing."""
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)
