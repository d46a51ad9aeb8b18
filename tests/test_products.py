"""Promise: products in C compute what their twin in torch computes, and so do towers that use them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from compare import spread_error
from torch import Tensor, nn

from engines.hardware import cxx_compiler, has_product_kernel
from export.cpu_form import cpu_form
from export.int8 import PackedInt8Linear
from export.products import PANEL, PackedLinear, _product, c_shims, pack, pack_products, unpack
from export.random_model import ARCHS, byte_vocab, random_clip
from export.towers import rewrite

ROWS, INPUTS, OUTPUTS = (1, 5, 6, 7, 12, 50), 96, 3 * PANEL  # a part of a strip of six rows, one, one and a part, two
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # of values around 1
LEVEL = 0.005  # what one of 256 may change: whether one half is rounded up differs


class Each(nn.Module):
    """Every number of rows: alone, with SiLU, with a stream to add to, with both."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.plain, self.with_silu = PackedLinear(linear), PackedLinear(linear, silu=True)

    def forward(self, *x_and_stream: Tensor) -> tuple[Tensor, ...]:
        made: list[Tensor] = []
        for x, stream in zip(x_and_stream[::2], x_and_stream[1::2], strict=True):
            made += [layer(x, add) for layer in (self.plain, self.with_silu) for add in (None, stream)]
        return tuple(made)


@pytest.mark.skipif(not has_product_kernel(), reason="product.c is compiled on AMD's CPUs with AVX512-BF16 alone")
@pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler: nothing is compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_c_of_products_is_its_twin(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS).to(dtype)
    each = Each(linear)
    given = tuple(torch.randn(n, width).to(dtype) for n in ROWS for width in (INPUTS, OUTPUTS))
    given[0][0, 3] = float("nan")
    program = torch.export.export(each, given, strict=False)
    package, in_c = f"{tmp_path}/each.pt2", {"aot_inductor.custom_ops_to_c_shims": c_shims()}
    torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=in_c)
    all_made = torch._inductor.aoti_load_package(package)(*given)
    assert all(made.isnan().all() for made in all_made[:4])  # a row that cannot be computed says so
    exact = [rows.float() for rows in given]
    want = Each(linear.float())(*exact)
    for made, wanted in zip(all_made[4:], want[4:], strict=True):
        assert made.dtype == dtype
        assert made.shape == wanted.shape
        assert (made.float() - wanted).abs().max() < TOLERANCE[dtype]
        assert (made.float().flip(1) - wanted).abs().max() > 10 * TOLERANCE[dtype]


class EachOfLevels(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        hows = itertools.product((False, True), repeat=2)
        self.layers = nn.ModuleList(PackedInt8Linear(linear, silu=silu, bf16=bf16) for silu, bf16 in hows)

    def forward(self, *x_and_stream: Tensor) -> tuple[Tensor, ...]:
        made: list[Tensor] = []
        for x, stream in zip(x_and_stream[::2], x_and_stream[1::2], strict=True):
            for layer in self.layers:
                made += [layer(x), layer(x, stream.bfloat16() if layer.bf16 else stream)]
        return tuple(made)


@pytest.mark.skipif(not has_product_kernel(), reason="product.c is compiled on AMD's CPUs with AVX512-BF16 alone")
@pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler: nothing is compiled")
def test_the_c_of_products_of_levels_is_its_twin(tmp_path: Path) -> None:
    torch.manual_seed(3)
    each = EachOfLevels(nn.Linear(INPUTS, OUTPUTS))
    given = tuple(torch.randn(n, width) for n in ROWS for width in (INPUTS, OUTPUTS))
    program = torch.export.export(each, given, strict=False)
    package, in_c = f"{tmp_path}/each.pt2", {"aot_inductor.custom_ops_to_c_shims": c_shims()}
    torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=in_c)
    for made, want in zip(torch._inductor.aoti_load_package(package)(*given), each(*given), strict=True):
        assert (made.dtype, made.shape) == (want.dtype, want.shape)
        tolerance = TOLERANCE[torch.bfloat16] if made.dtype == torch.bfloat16 else LEVEL
        assert (made.float() - want.float()).abs().max() < tolerance
        assert (made.float().flip(1) - want.float()).abs().max() > 10 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twin_is_the_layer_and_packing_loses_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(INPUTS, OUTPUTS).to(dtype)
    assert torch.equal(unpack(pack(linear.weight)), linear.weight)
    x, stream = torch.randn(7, INPUTS).to(dtype), torch.randn(7, OUTPUTS).to(dtype)
    want = stream.float() + nn.functional.silu(linear.float()(x.float()))
    packed = PackedLinear(linear.to(dtype), silu=True)
    got = _product(x, packed.packed, packed.bias, stream, packed.silu)
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() < TOLERANCE[dtype]


def test_a_packed_tower_gives_the_same_vectors() -> None:
    vision, _ = rewrite(random_clip(ARCHS["ViT-B-32"], byte_vocab([]), layers=2))
    pictures = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    packed = cpu_form(vision)
    pack_products(packed)
    assert not [name for name, layer in packed.named_modules() if isinstance(layer, nn.Linear)]
    with torch.inference_mode():
        want, got = vision(pictures), packed(pictures)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        packed.last.fc2.packed = packed.last.fc2.packed.flip(0)
        assert spread_error(packed(pictures).numpy(), want.numpy()) > 0.01


def test_what_does_not_fit_in_panels_stays_as_it_is() -> None:
    tiny, _ = rewrite(random_clip(ARCHS["tiny"], byte_vocab([])))
    tower = cpu_form(tiny)
    layers = {name for name, layer in tower.named_modules() if isinstance(layer, nn.Linear)}
    fitting = {name for name in layers if tower.get_submodule(name).out_features % PANEL == 0}
    pack_products(tower)
    assert {name for name, layer in tower.named_modules() if isinstance(layer, PackedLinear)} == fitting
    assert fitting < layers
    pictures = torch.randn(3, 3, ARCHS["tiny"].image, ARCHS["tiny"].image)
    with torch.inference_mode():
        torch.testing.assert_close(tower(pictures), tiny(pictures), rtol=0, atol=1e-5)
