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
from torch.nn.functional import silu

from export.in_c import shims
from export.towers import Block, VisionTower, plain_attention

LEVELS = 255  # between the smallest and the largest value of a row
RANGE_MIN = 1e-12  # of a row of one value
WEIGHT_MAX = 127
SILU_LEVELS = Path(__file__).with_name("silu_levels.c")
SIXTEEN = 16  # values that silu_levels.c takes at a time


class Rows(NamedTuple):
    """Activations in 8 bits: a value is low + level * step of its row."""

    levels: Tensor  # (n, width) uint8
    step: Tensor  # (n, 1) float32, as low and mean
    low: Tensor
    mean: Tensor


def levels_of(x: Tensor) -> Rows:
    low, high, mean = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), x.mean(-1, keepdim=True)
    step = (high - low).clamp(min=RANGE_MIN) / LEVELS
    return Rows(((x - low) * step.reciprocal()).round().to(torch.uint8), step, low, mean)


class Int8Linear(nn.Module):
    """x (rows, in) -> x @ weight.T + bias, in float32, by oneDNN's u8 x s8 kernel."""

    levels: Tensor
    scale: Tensor
    zero: Tensor
    ones: Tensor
    true_ones: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight_oi = weight.detach().float().flatten(1)
        scale_o = weight_oi.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / WEIGHT_MAX
        levels_oi = (weight_oi / scale_o[:, None]).round().to(torch.int8)
        self.register_buffer("levels", levels_oi)
        self.register_buffer("scale", scale_o)
        self.register_buffer("zero", torch.zeros(len(scale_o), dtype=torch.int64))
        self.register_buffer("ones", scale_o * levels_oi.float().sum(1))  # the product of a row of ones
        self.register_buffer("true_ones", weight_oi.sum(1))  # with the weights before they were rounded
        self.register_buffer("bias", torch.zeros(len(scale_o)) if bias is None else bias.detach().float())

    def forward(self, x: Tensor | Rows) -> Tensor:
        rows = x if isinstance(x, Rows) else levels_of(x)
        return _corrected(self.product(rows.levels), rows.step, rows.low, rows.mean, *self.correction)

    def product(self, levels: Tensor) -> Tensor:
        """The levels times the weights, float32: what a row gives were its step 1 and its smallest value 0."""
        packed = torch.ops.onednn.qlinear_prepack(self.levels, None)  # of a constant: done once, when compiled
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, 0, packed, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product

    @property
    def correction(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ones, self.true_ones, self.bias


def _corrected(
    product: Tensor, step: Tensor, low: Tensor, mean: Tensor, ones: Tensor, true_ones: Tensor, bias: Tensor
) -> Tensor:
    """The mean times the true weights, the rest of the row times the rounded ones."""
    return product * step + ((low - mean) * ones + mean * true_ones + bias)


def _silu_levels(
    product: Tensor, step: Tensor, low: Tensor, mean: Tensor, ones: Tensor, true_ones: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """SiLU of a product, in 8 bits: its levels and (3, n) step, low and mean. In a library, silu_levels.c is this."""
    levels, *of_rows = levels_of(silu(_corrected(product, step, low, mean, ones, true_ones, bias)))
    return levels, torch.cat(of_rows, 1).T.contiguous()


silu_levels = torch.library.custom_op(
    "nightjar::silu_levels",
    _silu_levels,
    mutates_args=(),
    schema="(Tensor product, Tensor step, Tensor low, Tensor mean, Tensor ones, Tensor true_ones, Tensor bias)"
    " -> (Tensor, Tensor)",
)


@silu_levels.register_fake
def _silu_levels_shapes(product: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return product.new_empty(product.shape, dtype=torch.uint8), product.new_empty(3, len(product))


def silu_hidden(block: Block, x: Tensor) -> Rows:
    """As `plain_hidden` with SiLU between two 8-bit products, whose activations are written in 8 bits alone."""
    rows = levels_of(x)
    levels, of_rows = silu_levels(block.fc1.product(rows.levels), *rows[1:], *block.fc1.correction)
    return Rows(levels, *of_rows.unsqueeze(-1).unbind())


def c_shims() -> dict[Any, list[str]]:
    return shims(SILU_LEVELS, torch.ops.nightjar.silu_levels.default)


def bf16_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As `plain_attention`, its products in bf16: where the CPU has them, fp32 ones take 8 % of the time of B/32."""
    seen = plain_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), None if mask is None else mask.bfloat16())
    return seen.float()


def int8_tower(tower: VisionTower, bf16: bool, avx512: bool) -> VisionTower:
    """A copy of `tower`, in the form for CPUs, whose products with weights are 8-bit, but for the projection.

    `bf16`: whether the CPU multiplies bf16 in hardware; then attention does. `avx512`: whether it runs silu_levels.c.
    """
    tower = copy.deepcopy(tower)
    for block in (*tower.blocks, tower.last):
        if bf16:
            block.attention = bf16_attention
        if avx512 and block.activation is silu and block.fc1.out_features % SIXTEEN == 0:
            block.hidden = silu_hidden
    for parent in (tower.patch, *tower.blocks, tower.last):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, Int8Linear(layer.weight, layer.bias))
    return tower


def _packed_shape(levels_oi: Tensor, _shape: list[int] | None) -> Tensor:
    return levels_oi.new_empty(levels_oi.shape[::-1])


# torch knows this operation's kernel and not its shape, which torch.export asks for: (in, out).
torch.library.register_fake("onednn::qlinear_prepack", _packed_shape)
