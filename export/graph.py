"""The ONNX graph of a tower, written node by node: the same operations in the same order as `export.towers`.

    onnx.save(onnx_model(towers.vision, "fp16", dim=512), "vision-fp16.onnx")

Written by hand because the tower is made of one block and this says exactly which operations a compiler gets to fuse:
no shape arithmetic, one LayerNormalization node per norm, the batch free through reshapes alone. The generic exporter
of torch ends with nearly the same graph after 13 s of CPU for each B/32 tower, 5 s even for two layers; this takes
0.3 s and gives the same bytes every time. The price is a second statement of the block: `to_onnx` proves it on every
export.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from engines.spec import Precision
from export.towers import EOS_IS_LARGEST_ID, QUICK_GELU_SLOPE, Block, LastBlock, TextTower, VisionTower, quick_gelu

OPSET, OPSET_BF16 = 18, 22  # the first in which Conv takes bfloat16
PIXELS, IDS, VECTORS = "pixels", "ids", "vectors"
DTYPES: dict[Precision, npt.DTypeLike] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


class Graph:
    """Nodes in the order they are added; floats are stored and computed in one precision."""

    def __init__(self, tower: nn.Module, precision: Precision) -> None:
        self.dtype = np.dtype(DTYPES[precision])
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}
        self.names = {id(tensor): name for name, tensor in (*tower.named_parameters(), *tower.named_buffers())}

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """The name of the node's output, or their names when there are several."""
        name = f"{op}_{len(self.nodes)}"
        made = [name] if outputs == 1 else [f"{name}.{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, made, name=name, **attributes))
        return made[0] if outputs == 1 else made

    def weight(self, tensor: Tensor) -> str:
        name = self.names[id(tensor)]
        with np.errstate(over="ignore"):  # weights beyond half precision: the check after the export tells
            return self.constant(name, tensor.detach().cpu().numpy().astype(self.dtype))

    def number(self, value: float) -> str:
        return self.constant(f"{value:.6g}", np.array(value, self.dtype))

    def ints(self, *values: int) -> str:
        return self.constant(f"ints{list(values)}", np.array(values, np.int64))

    def linear(self, x: str, layer: nn.Linear) -> str:
        bias = () if layer.bias is None else (self.weight(layer.bias),)
        return str(self.add("Gemm", x, self.weight(layer.weight), *bias, transB=1))

    def norm(self, x: str, layer: nn.LayerNorm) -> str:
        weights = self.weight(layer.weight), self.weight(layer.bias)
        return str(self.add("LayerNormalization", x, *weights, axis=-1, epsilon=layer.eps))

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        if name not in self.tensors:
            self.tensors[name] = numpy_helper.from_array(value, name)
        return name


def onnx_model(tower: nn.Module, precision: Precision, dim: int) -> Any:
    """An `onnx.ModelProto`: input pixels (float32) or ids (int32), output vectors (float32)."""
    graph = Graph(tower, precision)
    if isinstance(tower, VisionTower):
        side = tower.patch.kernel_size[0] * math.isqrt(tower.tokens - 1)
        source = helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, ["batch", 3, side, side])
        pooled = _vision(graph, tower)
    else:
        assert isinstance(tower, TextTower)
        source = helper.make_tensor_value_info(IDS, TensorProto.INT32, ["batch", tower.tokens])
        pooled = _text(graph, tower)
    vectors = graph.linear(graph.norm(pooled, tower.norm_out), tower.projection)
    if graph.dtype != np.float32:
        vectors = graph.add("Cast", vectors, to=TensorProto.FLOAT)
    length = graph.add("ReduceL2", vectors, graph.ints(-1), keepdims=1)
    graph.nodes.append(helper.make_node("Div", [vectors, length], [VECTORS], name="unit"))
    result = helper.make_tensor_value_info(VECTORS, TensorProto.FLOAT, ["batch", dim])
    opsets = [helper.make_opsetid("", OPSET_BF16 if precision == "bf16" else OPSET)]
    return helper.make_model(
        helper.make_graph(graph.nodes, "tower", [source], [result], list(graph.tensors.values())),
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name="nightjar",
    )


def _vision(graph: Graph, tower: VisionTower) -> str:
    own_type = helper.np_dtype_to_tensor_dtype(graph.dtype)
    pixels = PIXELS if graph.dtype == np.float32 else graph.add("Cast", PIXELS, to=own_type)
    patches = graph.add("Conv", pixels, graph.weight(tower.patch.weight), strides=tower.patch.stride)
    flat = graph.add("Reshape", patches, graph.ints(0, tower.width, tower.tokens - 1))
    padded = graph.add("Pad", graph.add("Transpose", flat, perm=[0, 2, 1]), graph.ints(0, 1, 0, 0, 0, 0))
    x = graph.add("Reshape", graph.add("Add", padded, graph.weight(tower.position)), graph.ints(-1, tower.width))
    x = graph.norm(x, tower.norm_in)
    for block in tower.blocks:
        x = _block(graph, x, block)

    def pooled(rows: str) -> str:
        first = graph.constant("class token", np.array(0))
        return str(graph.add("Gather", _by_row(graph, rows, tower), first, axis=1))

    return _last_block(graph, x, tower.last, pooled)


def _text(graph: Graph, tower: TextTower) -> str:
    embedded = graph.add("Gather", graph.weight(tower.embedding.weight), IDS, axis=0)
    x = graph.add("Reshape", graph.add("Add", embedded, graph.weight(tower.position)), graph.ints(-1, tower.width))
    for block in tower.blocks:
        x = _block(graph, x, block)
    ranks = IDS
    if tower.eos != EOS_IS_LARGEST_ID:
        end = graph.constant("eos", np.array(tower.eos, np.int32))
        ranks = graph.add("Cast", graph.add("Equal", IDS, end), to=TensorProto.INT32)
    end = graph.add("ArgMax", ranks, axis=-1, keepdims=1)

    def pooled(rows: str) -> str:
        return str(graph.add("GatherND", _by_row(graph, rows, tower), end, batch_dims=1))

    assert tower.last.mask is not None
    mask = graph.add("GatherND", graph.weight(tower.last.mask), end)
    return _last_block(graph, x, tower.last, pooled, graph.add("Unsqueeze", mask, graph.ints(1, 2)))


def _by_row(graph: Graph, x: str, tower: VisionTower | TextTower) -> str:
    return str(graph.add("Reshape", x, graph.ints(-1, tower.tokens, tower.width)))


def _block(graph: Graph, x: str, block: nn.Module) -> str:
    assert isinstance(block, Block)
    heads, head = block.heads, block.width // block.heads
    fused = graph.linear(graph.norm(x, block.norm1), block.qkv)
    split = graph.add("Reshape", fused, graph.ints(-1, block.tokens, 3 * heads, head))
    q, k, v = graph.add("Split", graph.add("Transpose", split, perm=[0, 2, 1, 3]), outputs=3, axis=1, num_outputs=3)
    scores = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2]))
    if block.mask is not None:
        scores = graph.add("Add", scores, graph.weight(block.mask))
    seen = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    rows = graph.add("Reshape", graph.add("Transpose", seen, perm=[0, 2, 1, 3]), graph.ints(-1, block.width))
    return _mlp(graph, graph.add("Add", x, graph.linear(rows, block.out)), block)


def _last_block(graph: Graph, x: str, block: LastBlock, pooled: Callable[[str], str], mask: str | None = None) -> str:
    heads, head = block.heads, block.width // block.heads
    normed = graph.norm(x, block.norm1)
    q = graph.add("Reshape", graph.linear(pooled(normed), block.q), graph.ints(-1, heads, 1, head))
    split = graph.add("Reshape", graph.linear(normed, block.kv), graph.ints(-1, block.tokens, 2 * heads, head))
    k, v = graph.add("Split", graph.add("Transpose", split, perm=[0, 2, 1, 3]), outputs=2, axis=1, num_outputs=2)
    scores = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2]))
    if mask is not None:
        scores = graph.add("Add", scores, mask)
    seen = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    rows = graph.add("Reshape", seen, graph.ints(-1, block.width))
    return _mlp(graph, graph.add("Add", pooled(x), graph.linear(rows, block.out)), block)


def _mlp(graph: Graph, x: str, block: Block) -> str:
    wide = _activation(graph, graph.linear(graph.norm(x, block.norm2), block.fc1), block)
    return str(graph.add("Add", x, graph.linear(wide, block.fc2)))


def _activation(graph: Graph, x: str, block: Block) -> str:
    if block.activation is quick_gelu:
        return str(graph.add("Mul", x, graph.add("Sigmoid", graph.add("Mul", x, graph.number(QUICK_GELU_SLOPE)))))
    erf = graph.add("Erf", graph.add("Div", x, graph.number(math.sqrt(2))))  # Gelu is one node from opset 20 on
    return str(graph.add("Mul", graph.add("Mul", x, graph.number(0.5)), graph.add("Add", erf, graph.number(1.0))))
