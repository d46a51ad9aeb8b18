"""Promise, on a GPU with TensorRT: every layer's attention is one kernel, in the towers and batches that users run.

Towers are cut to two layers, the last of which computes the pooled token alone: the kinds of attention there are. That
the compiler does so for other GPUs too is shown without one in test_fusion. Never run yet.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import EngineUnavailable, trt_gpu
from engines.build_gpu import batch_rows
from export.random_model import ARCHS, DEMO_VOCAB, random_clip, read_vocab
from export.to_onnx import save_graph
from export.towers import rewrite

pytestmark = pytest.mark.gpu
LAYERS = 2


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("arch", ["ViT-B-32", "ViT-B-16", "ViT-L-14"])
@pytest.mark.parametrize("runtime", list(trt_gpu.LIBRARIES))
def test_a_layer_is_one_attention_kernel_on_this_gpu(runtime: str, arch: str, tower: str, tmp_path: Path) -> None:
    if problem := trt_gpu.problem(runtime):
        pytest.skip(problem)
    towers = dict(
        zip(
            ("vision", "text"), rewrite(random_clip(ARCHS[arch], read_vocab(DEMO_VOCAB)[0], layers=LAYERS)), strict=True
        )
    )
    graph = tmp_path / "tower.onnx"
    save_graph(towers[tower], "fp16", ARCHS[arch].dim, graph)
    try:
        built = trt_gpu.build_plan(runtime, graph, batch_rows(towers[tower].tokens))
    except EngineUnavailable as refused:
        if runtime == "tensorrt":
            raise
        pytest.skip(f"TensorRT-RTX does not build for this GPU: {refused}")  # it has no SM 90
    assert built.attention == LAYERS, built.kernels
