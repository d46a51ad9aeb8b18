"""Promise: TensorRT's compiler makes of our graphs what they were written for. Needs no GPU: TensorRT-RTX builds ahead.

Its kernel names are those of TensorRT 10's back end, so it serves as a linter of the exported layout: a change that
costs a kernel per block, or the fused attention, fails here and not first on a GPU. Towers are cut to 3 and 4 layers;
their difference is one inner block, whatever the stem, the last block (pooled token alone) and the head look like.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from engines import EngineUnavailable, trt_gpu
from engines.build_gpu import batch_rows
from engines.spec import Precision
from export import graph as graphs
from export.random_model import ARCHS, DEMO_VOCAB, random_clip, read_vocab
from export.to_onnx import save_graph
from export.towers import Block, rewrite

no_rtx = trt_gpu.problem("tensorrt-rtx")
pytestmark = pytest.mark.skipif(bool(no_rtx), reason=f"the fusion linter does not run: {no_rtx}")
TARGET = "sm89"
KERNELS_PER_BLOCK_MAX = 8  # LN, QKV, split, attention, out + residual, LN, FC1 + activation, FC2 + residual
LAYERS = 4


@pytest.fixture(scope="module", params=["ViT-B-32", "ViT-B-16", "ViT-L-14"])
def towers(request: pytest.FixtureRequest) -> dict[str, Any]:
    vision, text = rewrite(random_clip(ARCHS[request.param], read_vocab(DEMO_VOCAB)[0], layers=LAYERS))
    return {"vision": vision, "text": text, "dim": ARCHS[request.param].dim}


def build(tower: Any, dim: int, precision: Precision, folder: Path) -> trt_gpu.Built:
    save_graph(tower, precision, dim, folder / "tower.onnx")
    return trt_gpu.build_plan("tensorrt-rtx", folder / "tower.onnx", batch_rows(tower.tokens), TARGET)


def cut(tower: Any) -> Any:
    """The same tower without its first inner block. It shares the weights."""
    shorter = object.__new__(type(tower))
    shorter.__dict__ = {**tower.__dict__, "_modules": {**tower._modules, "blocks": tower.blocks[1:]}}
    return shorter


def deep_and_shallow(tower: Any, dim: int, precision: Precision, folder: Path) -> tuple[trt_gpu.Built, trt_gpu.Built]:
    return build(tower, dim, precision, folder), build(cut(tower), dim, precision, folder)


@pytest.mark.parametrize("name", ["vision", "text"])
def test_a_layer_is_one_attention_kernel_and_few_others(towers: dict[str, Any], name: str, tmp_path: Path) -> None:
    deep, shallow = deep_and_shallow(towers[name], towers["dim"], "fp16", tmp_path)
    assert (deep.attention, shallow.attention) == (LAYERS, LAYERS - 1), deep.kernels
    per_block = len(deep.kernels) - len(shallow.kernels)
    assert 0 < per_block <= KERNELS_PER_BLOCK_MAX, f"{per_block} kernels a block: {deep.kernels}"


@pytest.fixture(scope="module")
def small() -> Any:
    vision, _ = rewrite(random_clip(ARCHS["ViT-B-32"], read_vocab(DEMO_VOCAB)[0], layers=LAYERS))
    return vision


def test_bf16_fuses_as_fp16_does(small: Any, tmp_path: Path) -> None:
    deep, shallow = deep_and_shallow(small, 512, "bf16", tmp_path)
    assert deep.attention == LAYERS
    assert len(deep.kernels) - len(shallow.kernels) <= KERNELS_PER_BLOCK_MAX


def test_the_linter_sees_that_fp32_has_no_fused_attention(small: Any, tmp_path: Path) -> None:
    deep, shallow = deep_and_shallow(small, 512, "fp32", tmp_path)
    assert deep.attention - shallow.attention == 0
    assert len(deep.kernels) - len(shallow.kernels) > KERNELS_PER_BLOCK_MAX


def test_the_linter_sees_the_layout_of_the_original(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three products for q, k and v and a 3-D residual stream: what ours was rewritten from."""
    monkeypatch.setattr(graphs, "_block", plain_block)
    deep, shallow = deep_and_shallow(small, 512, "fp16", tmp_path)
    assert deep.attention == LAYERS
    assert len(deep.kernels) - len(shallow.kernels) > KERNELS_PER_BLOCK_MAX


def plain_block(graph: graphs.Graph, x: str, block: nn.Module) -> str:
    assert isinstance(block, Block)
    heads, tokens, width = block.heads, block.tokens, block.width

    def product(rows: str, weight: Any, bias: Any) -> str:
        names = (f"{kind}_{len(graph.nodes)}" for kind in ("weight", "bias"))
        made = [
            graph.constant(name, value.detach().numpy().astype(graph.dtype))
            for name, value in zip(names, (weight.T, bias), strict=True)
        ]
        return str(graph.add("Add", graph.add("MatMul", rows, made[0]), made[1]))

    def by_head(rows: str) -> str:
        split = graph.add("Reshape", rows, graph.ints(-1, tokens, heads, width // heads))
        return str(graph.add("Transpose", split, perm=[0, 2, 1, 3]))

    x = graph.add("Reshape", x, graph.ints(-1, tokens, width))
    normed = graph.norm(x, block.norm1)
    parts = zip(block.qkv.weight.chunk(3), block.qkv.bias.chunk(3), strict=True)
    q, k, v = (by_head(product(normed, weight, bias)) for weight, bias in parts)
    scores = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2]))
    seen = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    rows = graph.add("Reshape", graph.add("Transpose", seen, perm=[0, 2, 1, 3]), graph.ints(-1, tokens, width))
    x = graph.add("Add", x, product(rows, block.out.weight, block.out.bias))
    wide = product(graph.norm(x, block.norm2), block.fc1.weight, block.fc1.bias)
    active = graphs._activation(graph, wide, block)
    x = graph.add("Add", x, product(active, block.fc2.weight, block.fc2.bias))
    return str(graph.add("Reshape", x, graph.ints(-1, width)))


def test_a_refused_build_says_why(small: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    save_graph(small, "fp16", 512, broken)
    with pytest.raises(EngineUnavailable, match=r"does not build for target 'sm90'; it knows .*sm89"):
        trt_gpu.build_plan("tensorrt-rtx", broken, 8, "sm90")
    import onnx

    model = onnx.load(broken)
    model.graph.node[-1].op_type = "NoSuchOperation"
    onnx.save(model, broken)
    with pytest.raises(EngineUnavailable, match=r"tensorrt-rtx cannot read broken\.onnx: .*NoSuchOperation"):
        trt_gpu.build_plan("tensorrt-rtx", broken, 8, TARGET)
