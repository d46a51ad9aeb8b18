"""Tower -> AOTInductor library: C++ and OpenMP for this CPU and one batch size, weights packed in (needs g++).

    compile_tower(towers.vision, pixels, "fp32", Path("engine.so"))
    package_tower(towers.vision, pixels, "fp16", Path("engine.pt2"))     # for this GPU, up to len(pixels) rows

B/32 takes 60 to 100 s on 2 cores. Freezing packs every weight for the GEMM it meets. The number of threads stays open
(`dynamic_threads`): it is chosen when the engine is opened. bf16 keeps weights and activations in 16 bits; LayerNorm
statistics, softmax and the final norm are computed in fp32 all the same. What a CPU computes is written in the form of
`export.cpu_form`; int8 is `export.int8`.
Tried and left out: inductor's own C++ GEMM templates (max_autotune), 0.6 of the speed of oneDNN's on these shapes and
twice the build time.
On a GPU (not run on one yet) attention is one operation, GEMMs are cuBLAS's, the rest is fused into Triton kernels; the
number of rows stays open, so that a lane that runs out of memory opens the same package at half its batch.
"""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn
from torch._inductor.exc import InductorError
from torch._inductor.utils import fresh_cache

from engines import EngineUnavailable
from engines.hardware import has_avx512, has_avx512_bf16, has_bf16, has_product_kernel
from engines.spec import Precision
from export import attention, int8, products
from export.cpu_form import cpu_form
from export.int8 import int8_tower
from export.towers import Block, VisionTower, fused_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INDUCTOR: dict[str, Any] = {"freezing": True, "cpp.dynamic_threads": True}


def compile_tower(module: nn.Module, example: npt.NDArray[Any], precision: Precision, library: Path) -> None:
    """Write the library of `module` for batches shaped like `example`."""
    assert isinstance(module, VisionTower), "queries are few: the text tower stays with ONNX Runtime"
    tower, c_shims = cpu_form(module), {}
    if precision == "int8":
        tower = int8_tower(tower, has_bf16(), has_avx512(), has_product_kernel())
        c_shims = int8.c_shims() if has_avx512() else {}
    elif precision != "fp32":
        tower = copy.deepcopy(tower).to(DTYPES[precision])
    if has_product_kernel():
        c_shims |= products.c_shims()
        if precision != "int8":  # which packs its own
            products.pack_products(tower)
    if precision != "fp32" and has_avx512_bf16():
        attention.compile_attention(tower)
        c_shims |= attention.c_shims()
    inductor = {**INDUCTOR, "aot_inductor.custom_ops_to_c_shims": c_shims}
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".aoti-") as scratch:
        # Inductor would leave a copy of every library in its own cache: 350 MB for each B/32 build.
        with _quiet(), fresh_cache(dir=scratch), torch.no_grad():
            program = torch.export.export(tower, (torch.from_numpy(example),), strict=False)
            package = f"{scratch}/tower.pt2"
            try:
                torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=inductor)
            except InductorError as error:
                first = str(error).strip().splitlines()[0]
                raise EngineUnavailable(f"aoti-cpu did not compile ({first}). Check: g++ -fopenmp --version") from error
        with zipfile.ZipFile(package) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".so"))
            with archive.open(name) as packed, library.open("wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)


def package_tower(
    module: nn.Module, example: npt.NDArray[Any], precision: Precision, package: Path, device: str = "cuda"
) -> None:
    """Write the package of `module` for 1 to len(`example`) rows of its shape and dtype, on this kind of `device`."""
    module = copy.deepcopy(module).to(device, DTYPES[precision])
    for block in module.modules():
        if isinstance(block, Block):
            block.attention = fused_attention
    rows = torch.export.Dim("rows", min=1, max=len(example))
    with tempfile.TemporaryDirectory(dir=package.parent, prefix=".aoti-") as scratch:
        with _quiet(), fresh_cache(dir=scratch), torch.no_grad():
            inputs = (torch.from_numpy(example).to(device),)
            program = torch.export.export(module, inputs, dynamic_shapes=({0: rows},), strict=False)
            made = f"{scratch}/tower.pt2"
            try:
                torch._inductor.aoti_compile_and_package(program, package_path=made)
            except InductorError as error:
                first = str(error).strip().splitlines()[0]
                raise EngineUnavailable(f"aoti-{device} did not compile ({first}). Check: g++ --version") from error
        shutil.move(made, package)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice torch prints to those who develop it."""
    levels = {name: logging.getLogger(name).level for name in ("torch.export", "torch._inductor", "torch._dynamo")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
