"""Promise: 8-bit products stay close to fp32 ones, row by row, and the comparison would notice if they did not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compare import spread_error
from torch import Tensor, nn

from engines.hardware import cxx_compiler, has_avx512, has_int8
from export.cpu_form import ProductPatches, cpu_form
from export.int8 import (
    Int8Linear,
    PackedInt8Linear,
    bf16_attention,
    c_shims,
    int8_tower,
    levels_in_c,
    norm_levels,
    silu_levels,
)
from export.random_model import ARCHS, byte_vocab, random_clip
from export.towers import plain_attention, rewrite

pytestmark = pytest.mark.skipif(not has_int8(), reason="int8 needs VNNI or AMX, this CPU has neither")
ERROR_MAX = 0.01  # of the spread of a product: 256 levels for a row of activations, 255 for the weights of an output
TOWER_ERROR_MAX = 0.08  # of the spread of the vectors


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / (want - want.mean(0)).norm())


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 48)


def test_products_are_those_of_the_layer(layer: nn.Linear) -> None:
    x = torch.randn(200, 96)
    with torch.no_grad():
        want, got = layer(x), Int8Linear(layer)(x)
        assert 1e-4 < error(got, want) < ERROR_MAX
        assert error(got.flip(0), want) > 1
        assert error(got - layer.bias, want) > ERROR_MAX


def test_a_row_does_not_depend_on_its_neighbours(layer: nn.Linear) -> None:
    """One token with a value a thousand times as large leaves the others as they were, to the bit."""
    x = torch.randn(32, 96)
    with_outlier = x.clone()
    with_outlier[7, 3] = 1e4
    quantised = Int8Linear(layer)
    others = torch.arange(32) != 7
    with torch.no_grad():
        assert torch.equal(quantised(x)[others], quantised(with_outlier)[others])


@pytest.mark.parametrize("value", [0.0, -3.5, 1e-20])
def test_a_row_of_one_value_is_exact(layer: nn.Linear, value: float) -> None:
    with torch.no_grad():
        layer.bias.zero_()
        got = Int8Linear(layer)(torch.full((2, 96), value))
        want = value * layer.weight.sum(1)
    torch.testing.assert_close(got, want.expand(2, -1), rtol=1e-5, atol=1e-6 * abs(value))


def test_activations_of_one_sign_use_all_levels(layer: nn.Linear) -> None:
    x = torch.rand(200, 96) + 5  # levels symmetric around zero would leave 18 of 255 for what differs
    with torch.no_grad():
        want, got = layer(x), Int8Linear(layer)(x)
    assert error(got, want) < ERROR_MAX


def test_patches_are_those_of_the_convolution() -> None:
    torch.manual_seed(1)
    patch = nn.Conv2d(3, 40, kernel_size=8, stride=8, bias=False)
    pixels = torch.randn(5, 3, 32, 32)
    product = ProductPatches(patch)
    with torch.no_grad():
        want = patch(pixels)
        torch.testing.assert_close(product(pixels), want)
        product.product = Int8Linear(product.product)
        got = product(pixels)
    assert got.shape == want.shape
    assert error(got.flatten(1), want.flatten(1)) < ERROR_MAX


class InEightBits(nn.Module):
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        made = (*levels_in_c(x), *levels_in_c(x.bfloat16()), *norm_levels(x, weight, bias, 1e-5))
        return (*made, *silu_levels(x, rows, columns))


@pytest.mark.skipif(not has_avx512(), reason="levels.c is compiled on CPUs with AVX-512 alone")
@pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler: nothing is compiled")
def test_the_c_of_levels_is_its_twin(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    n, width = 9, 64
    x = torch.randn(n, width, generator=generator) * torch.tensor([1e-3, 0.1, 1, 3, 10, 40, 1e3, 1, 1])[:, None]
    x[7], x[8, 5] = 0.25, float("nan")
    weight, bias, *columns = torch.randn(6, width, generator=generator)
    rows = torch.rand(3, n, generator=generator) + torch.tensor([0.5, 0, 0])[:, None]
    given = (x, weight, bias, rows, torch.stack(columns))
    program = torch.export.export(InEightBits(), given, strict=False)
    package, in_c = f"{tmp_path}/levels.pt2", {"aot_inductor.custom_ops_to_c_shims": c_shims()}
    torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=in_c)
    all_got, all_want = torch._inductor.aoti_load_package(package)(*given), InEightBits()(*given)
    sound = slice(0, 8)
    for levels, numbers, want_levels, want_numbers in zip(
        all_got[::2], all_got[1::2], all_want[::2], all_want[1::2], strict=True
    ):
        assert (levels[sound].int() - want_levels[sound].int()).abs().max() <= 1
        torch.testing.assert_close(numbers[:, sound], want_numbers[:, sound], rtol=2e-3, atol=1e-6)
        assert levels[sound].unique().numel() > 100
        assert numbers[2, 8].isnan()  # a row that cannot be computed is told to whoever uses it
        assert (levels[sound].flip(1).int() - want_levels[sound].int()).abs().max() > 50


def test_a_tower_by_every_way_gives_the_same_vectors() -> None:
    """oneDNN's products or product.c, with and without levels.c, as their twins in torch."""
    vision, _ = rewrite(random_clip(ARCHS["ViT-B-32"], byte_vocab([]), layers=2))
    tower, pictures = cpu_form(vision), torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        want = vision(pictures).numpy()
        ways = [int8_tower(tower, *way) for way in ((False, False, False), (True, True, False), (True, True, True))]
        errors = [spread_error(way(pictures).numpy(), want) for way in ways]
        assert all(1e-3 < each < TOWER_ERROR_MAX for each in errors), errors
        assert isinstance(ways[2].blocks[0].fc1, PackedInt8Linear)
        ways[2].blocks[0].fc1.columns.mul_(1.3)
        assert spread_error(ways[2](pictures).numpy(), want) > TOWER_ERROR_MAX


def test_attention_in_bf16_stays_close() -> None:
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 4, 8, 50, 64)
    want, got = plain_attention(q / 8, k, v, None), bf16_attention(q / 8, k, v, None)
    assert got.dtype == torch.float32
    assert 1e-4 < error(got.flatten(0, 2), want.flatten(0, 2)) < ERROR_MAX
    assert error(bf16_attention(k / 8, q, v, None).flatten(0, 2), want.flatten(0, 2)) > ERROR_MAX
