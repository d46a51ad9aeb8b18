"""Attention of a vision tower in bf16 on CPUs with AVX512-BF16, as one operation.

    compile_attention(towers.vision)

In a compiled library it is `attention.c`; in torch it is the same in parts. It takes the rows of q, k and v as one
product made them and gives rows for the next one, so nothing is rearranged between them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.in_c import shims
from export.towers import Block, VisionTower, plain_attention

ATTENTION = Path(__file__).with_name("attention.c")
HEAD = 64  # values of a head in attention.c


def _attention(qkv: Tensor, tokens: int) -> Tensor:
    heads = qkv.shape[1] // (3 * HEAD)
    q, k, v = qkv.view(-1, tokens, 3 * heads, HEAD).transpose(1, 2).chunk(3, 1)
    return plain_attention(q, k, v, None).transpose(1, 2).reshape(-1, heads * HEAD)


attention = torch.library.custom_op(
    "nightjar::attention", _attention, mutates_args=(), schema="(Tensor qkv, int tokens) -> Tensor"
)


@attention.register_fake
def _attention_shape(qkv: Tensor, tokens: int) -> Tensor:
    return qkv.new_empty(len(qkv), qkv.shape[1] // 3)


def compiled_attend(block: Block, qkv: Tensor) -> Tensor:
    """As `plain_attend`, in bf16 whatever the precision of the rest."""
    seen: Tensor = attention(qkv.bfloat16(), block.tokens).to(qkv.dtype)
    return seen


def compile_attention(tower: VisionTower) -> None:
    """Let every block of `tower` that attention.c covers, all but the last, use it."""
    for block in tower.blocks:
        assert isinstance(block, Block)
        if block.width == block.heads * HEAD:
            block.attend = compiled_attend


def c_shims() -> dict[Any, list[str]]:
    return shims(ATTENTION, torch.ops.nightjar.attention.default)
