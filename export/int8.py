"""A vision tower with 8-bit matrix products: weights per output, activations per row, both at run time exact in int32.

    quantised = int8_tower(towers.vision)      # same call, same shape of result; compile it with export.to_aoti

Every row of activations gets the 256 levels between its own smallest and largest value when it is computed, so nothing
has to be calibrated, no row depends on another, and outliers of one token do not blur the rest. Residual stream, norms,
softmax and the final projection stay fp32, the products of attention too where the CPU has no bf16. Error/spread on
photos: .04 with random B/32 weights, .009 with the demo model, where bf16 is allowed .06; one scale for a whole tensor
gives .05 and .017.
Needs VNNI or AMX (`engines.hardware.has_int8`): older CPUs add pairs of products in 16 bits, which overflow.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.in_c import shims
from export.products import add_in_product, can_pack, pack, product_of_levels
from export.towers import Block, VisionTower, plain_attention

LEVELS = 255  # between the smallest and the largest value of a row
RANGE_MIN = 1e-12  # of a row of one value
WEIGHT_MAX = 127
LEVELS_C = Path(__file__).with_name("levels.c")
SIXTEEN = 16  # values that levels.c takes at a time


class Rows(NamedTuple):
    """Activations in 8 bits: a value is low + level * step of its row."""

    levels: Tensor  # (n, width) uint8
    numbers: Tensor  # (3, n) float32: step, low, mean


def _levels(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    low, high, mean = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), x.mean(-1, keepdim=True)
    step = (high - low).clamp(min=RANGE_MIN) / LEVELS
    levels = ((x - low) * step.reciprocal()).round().to(torch.uint8)
    return levels, torch.cat((step, low, mean), 1).T.contiguous()


def _norm_levels(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _levels(functional.layer_norm(x, x.shape[1:], weight, bias, eps))


def _silu_levels(product: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    return _levels(functional.silu(_corrected(product, rows, columns)))


def _corrected(product: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The mean times the true weights, the rest of the row times the rounded ones."""
    (step, low, mean), (_, ones, true_ones, bias) = rows[:, :, None], columns
    corrected: Tensor = product * step + ((low - mean) * ones + mean * true_ones + bias)
    return corrected


def _operation(function: Any, schema: str) -> Any:
    """`function` as one operation, in C in a compiled library."""
    operation = torch.library.custom_op(f"nightjar::{function.__name__[1:]}", function, mutates_args=(), schema=schema)
    operation.register_fake(
        lambda x, *_: (x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(3, len(x), dtype=torch.float32))
    )
    return operation


levels_in_c = _operation(_levels, "(Tensor x) -> (Tensor, Tensor)")
norm_levels = _operation(_norm_levels, "(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)")
silu_levels = _operation(_silu_levels, "(Tensor product, Tensor rows, Tensor columns) -> (Tensor, Tensor)")


class Int8Linear(nn.Module):
    """x (rows, in) -> x @ weight.T + bias, in float32, then `add`; by oneDNN's u8 x s8 kernel."""

    levels: Tensor
    zero: Tensor
    columns: Tensor

    def __init__(self, layer: nn.Linear, in_c: bool = False) -> None:
        """`in_c`: whether this CPU runs levels.c."""
        super().__init__()
        weight_oi, bias = layer.weight.detach().float(), layer.bias
        scale_o = weight_oi.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / WEIGHT_MAX
        levels_oi = (weight_oi / scale_o[:, None]).round().to(torch.int8)
        bias_o = torch.zeros(len(scale_o)) if bias is None else bias.detach().float()
        ones_o = scale_o * levels_oi.float().sum(1)  # the product of a row of ones; then with the true weights
        self.register_buffer("levels", levels_oi)
        self.register_buffer("zero", torch.zeros(len(scale_o), dtype=torch.int64))
        self.register_buffer("columns", torch.stack([scale_o, ones_o, weight_oi.sum(1), bias_o]))
        self.levels_of = levels_in_c if in_c and weight_oi.shape[1] % SIXTEEN == 0 else _levels

    def forward(self, x: Tensor | Rows, add: Tensor | None = None) -> Tensor:
        levels, numbers = x if isinstance(x, Rows) else self.levels_of(x.contiguous())
        made = _corrected(self.product(levels), numbers, self.columns)
        return made if add is None else made + add

    def product(self, levels: Tensor) -> Tensor:
        """The levels times the weights, float32: what a row gives were its step 1 and its smallest value 0."""
        packed = torch.ops.onednn.qlinear_prepack(self.levels, None)  # of a constant: done once, when compiled
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, 0, packed, self.columns[0], self.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product


class PackedInt8Linear(Int8Linear):
    """The same by product.c, SiLU included; in bf16 what only attention or the next product reads."""

    packed: Tensor

    def __init__(self, layer: nn.Linear, in_c: bool = False, silu: bool = False, bf16: bool = False) -> None:
        super().__init__(layer, in_c)
        self.register_buffer("packed", pack(self.levels))
        self.silu, self.bf16 = silu, bf16

    def forward(self, x: Tensor | Rows, add: Tensor | None = None) -> Tensor:
        levels, numbers = x if isinstance(x, Rows) else self.levels_of(x.contiguous())
        made: Tensor = product_of_levels(levels, self.packed, self.columns, numbers, add, self.silu, self.bf16)
        return made


class NormLevels(nn.Module):
    """A LayerNorm whose rows are written in 8 bits alone."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Rows:
        return Rows(*norm_levels(x, self.norm.weight, self.norm.bias, self.norm.eps))


def silu_hidden(block: Block, x: Rows) -> Rows:
    """As `plain_hidden` with SiLU between two products of oneDNN, whose activations are written in 8 bits alone."""
    return Rows(*silu_levels(block.fc1.product(x.levels), x.numbers, block.fc1.columns))


def c_shims() -> dict[Any, list[str]]:
    operations = torch.ops.nightjar
    return shims(LEVELS_C, operations.levels.default, operations.norm_levels.default, operations.silu_levels.default)


def bf16_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As `plain_attention`, its products in bf16: where the CPU has them, fp32 ones take 8 % of the time of B/32."""
    seen = plain_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), None if mask is None else mask.bfloat16())
    return seen.float()


def int8_tower(tower: VisionTower, bf16: bool, avx512: bool, product_kernel: bool) -> VisionTower:
    """A copy of `tower`, in the form for CPUs, whose products with weights are 8-bit, but for the projection.

    `bf16`: whether the CPU multiplies bf16 in hardware; then attention does. `avx512`: whether it runs levels.c,
    `product_kernel`: product.c, which needs both.
    """
    tower = copy.deepcopy(tower)
    blocks = (*tower.blocks, tower.last)
    for block in blocks:
        assert isinstance(block, Block)
        if bf16:
            block.attention = bf16_attention
        if by_sixteen := avx512 and block.width % SIXTEEN == 0:
            block.norm2 = NormLevels(block.norm2)
            if block is not tower.last:  # which takes its queries out of what norm1 made
                block.norm1 = NormLevels(block.norm1)
        if block.activation is functional.silu and product_kernel and can_pack(block.fc1, 1):
            block.fc1, block.activation = PackedInt8Linear(block.fc1, avx512, silu=True, bf16=True), nn.Identity()
        elif block.activation is functional.silu and by_sixteen and block.fc1.out_features % SIXTEEN == 0:
            block.hidden = silu_hidden
        block.add = add_in_product
    for parent in (tower.patch, *blocks):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and product_kernel and can_pack(layer, 1):
                setattr(parent, name, PackedInt8Linear(layer, avx512, bf16=name == "qkv"))
            elif isinstance(layer, nn.Linear):
                setattr(parent, name, Int8Linear(layer, avx512))
    return tower


def _packed_shape(levels_oi: Tensor, _shape: list[int] | None) -> Tensor:
    return levels_oi.new_empty(levels_oi.shape[::-1])


# torch knows this operation's kernel and not its shape, which torch.export asks for: (in, out).
torch.library.register_fake("onednn::qlinear_prepack", _packed_shape)
