"""Promise: attention in C computes what its twin in torch computes, and no picture sees another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.hardware import cxx_compiler, has_avx512_bf16
from export.attention import HEAD, _attention, c_shims, compile_attention, compiled_attend
from export.random_model import ARCHS, byte_vocab, random_clip
from export.towers import plain_attend, rewrite

TOKENS, HEADS = (1, 7, 50, 65), 3  # one; a part of a block of 16; B/32; one beyond a block of 64
ERROR_MAX = 0.01  # of values around 1: bf16 has 3 digits


class Each(nn.Module):
    def forward(self, *qkv: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.nightjar.attention(rows, tokens) for rows, tokens in zip(qkv, TOKENS, strict=True))


@pytest.fixture(scope="module")
def given() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2 * n, 3 * HEADS * HEAD, generator=generator).bfloat16() for n in TOKENS)


@pytest.mark.skipif(not has_avx512_bf16(), reason="attention.c is compiled on CPUs with AVX512-BF16 alone")
@pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler: nothing is compiled")
def test_the_c_of_attention_is_its_twin(given: tuple[Tensor, ...], tmp_path: Path) -> None:
    program = torch.export.export(Each(), given, strict=False)
    package, in_c = f"{tmp_path}/each.pt2", {"aot_inductor.custom_ops_to_c_shims": c_shims()}
    torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=in_c)
    each = torch._inductor.aoti_load_package(package)
    for got, rows, tokens in zip(each(*given), given, TOKENS, strict=True):
        want = _attention(rows.float(), tokens)
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).abs().max() < ERROR_MAX
        assert (got.float().flip(1) - want).abs().max() > 10 * ERROR_MAX
    other = [rows.clone() for rows in given]
    for rows, tokens in zip(other, TOKENS, strict=True):
        rows[tokens:] = 3.0  # another second picture leaves the first as it was, to the bit
    for one, two, tokens in zip(each(*given), each(*other), TOKENS, strict=True):
        assert torch.equal(one[:tokens], two[:tokens])
        assert not torch.equal(one[tokens:], two[tokens:])


def test_the_twin_is_what_the_blocks_compute() -> None:
    vision, _ = rewrite(random_clip(ARCHS["ViT-B-32"], byte_vocab([]), layers=2))
    block = vision.blocks[0]
    qkv = 0.3 * torch.randn(3 * block.tokens, 3 * block.width, generator=torch.Generator().manual_seed(1))
    want, got = plain_attend(block, qkv), compiled_attend(block, qkv)
    assert got.dtype == qkv.dtype
    assert 1e-5 < (got - want).abs().max() < ERROR_MAX
    compile_attention(vision)
    assert block.attend is compiled_attend
    assert vision.last.attend is not compiled_attend  # it asks for one token
    tiny, _ = rewrite(random_clip(ARCHS["tiny"], byte_vocab([])))
    compile_attention(tiny)
    assert tiny.blocks[0].attend is plain_attend  # its heads are smaller
