"""Products of rows with weights on AMD's CPUs, as one operation with what follows: bias, SiLU, the residual stream.

    pack_products(towers.vision)      # in place, fp32 or bf16; `export.int8` packs 8-bit weights itself

In a compiled library it is `product.c`; in torch it is the same in parts. With the shapes of B/32 oneDNN reaches .81 of
what the vector units of a Zen 5 can in bf16, product.c .94 to .97; a whole tower is 1.10 times as fast, 1.14 in fp32,
1.14 in 8 bits, with the norms and attention in C that came with it (docs/LOG.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.in_c import shims
from export.towers import Block, VisionTower

PRODUCT = Path(__file__).with_name("product.c")
PANEL = 64  # outputs whose weights lie together
WORD = 4  # bytes of a row that are multiplied at once


def pack(weight_oi: Tensor) -> Tensor:
    """(out, in) -> (out / 64, words, 64, values of a word): what product.c reads from the first byte to the last."""
    panels, of_word = len(weight_oi) // PANEL, WORD // weight_oi.element_size()
    return weight_oi.view(panels, PANEL, -1, of_word).transpose(1, 2).contiguous()


def unpack(packed: Tensor) -> Tensor:
    return packed.transpose(1, 2).reshape(packed.shape[0] * PANEL, -1)


def can_pack(layer: nn.Linear, value_bytes: int) -> bool:
    return layer.out_features % PANEL == 0 and layer.in_features * value_bytes % WORD == 0


def _product(x: Tensor, packed: Tensor, bias: Tensor, add: Tensor | None, silu: bool) -> Tensor:
    return _followed(functional.linear(x.float(), unpack(packed).float(), bias), add, silu, x.dtype)


def _followed(made: Tensor, add: Tensor | None, silu: bool, dtype: torch.dtype) -> Tensor:
    made = functional.silu(made) if silu else made
    return (made if add is None else made + add).to(dtype)


product = torch.library.custom_op(
    "nightjar::product",
    _product,
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor bias, Tensor? add, bool silu) -> Tensor",
)


@product.register_fake
def _product_shape(x: Tensor, packed: Tensor, *_: object) -> Tensor:
    return x.new_empty(len(x), packed.shape[0] * PANEL)


def _product_of_levels(
    levels: Tensor, packed: Tensor, columns: Tensor, rows: Tensor, add: Tensor | None, silu: bool, bf16: bool
) -> Tensor:
    (scale, ones, true_ones, bias), (step, low, mean) = columns, rows[:, :, None]
    product = functional.linear(levels.double(), unpack(packed).double()).float() * scale
    corrected = product * step + ((low - mean) * ones + mean * true_ones + bias)
    return _followed(corrected, add, silu, torch.bfloat16 if bf16 else torch.float32)


product_of_levels = torch.library.custom_op(
    "nightjar::product_of_levels",
    _product_of_levels,
    mutates_args=(),
    schema="(Tensor levels, Tensor packed, Tensor columns, Tensor rows, Tensor? add, bool silu, bool bf16) -> Tensor",
)


@product_of_levels.register_fake
def _product_of_levels_shape(levels: Tensor, packed: Tensor, *given: Any) -> Tensor:
    dtype = torch.bfloat16 if given[-1] else torch.float32
    return levels.new_empty(len(levels), packed.shape[0] * PANEL, dtype=dtype)


class PackedLinear(nn.Module):
    """(n, in) -> (n, out) of the dtype of the weights: x @ weight.T + bias, then SiLU, then `add`."""

    packed: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear, silu: bool = False) -> None:
        super().__init__()
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().float()
        self.register_buffer("packed", pack(layer.weight.detach()))
        self.register_buffer("bias", bias)
        self.silu = silu

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        made: Tensor = product(x.contiguous(), self.packed, self.bias, add, self.silu)
        return made


def add_in_product(layer: nn.Module, x: Tensor, stream: Tensor) -> Tensor:
    """As `plain_add`, in one operation."""
    added: Tensor = layer(x, stream.contiguous())
    return added


def pack_products(tower: VisionTower) -> None:
    """Let every product of `tower` that product.c covers use it."""
    for block in (*tower.blocks, tower.last):
        assert isinstance(block, Block)
        if block.activation is functional.silu and can_pack(block.fc1, block.fc1.weight.element_size()):
            block.fc1, block.activation = PackedLinear(block.fc1, silu=True), nn.Identity()
    for parent in (tower, tower.patch, *tower.blocks, tower.last):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and can_pack(layer, layer.weight.element_size()):
                setattr(parent, name, PackedLinear(layer))
    for block in (*tower.blocks, tower.last):
        if isinstance(block.out, PackedLinear) and isinstance(block.fc2, PackedLinear):
            block.add = add_in_product


def c_shims() -> dict[Any, list[str]]:
    operations = torch.ops.nightjar
    return shims(PRODUCT, operations.product.default, operations.product_of_levels.default)
