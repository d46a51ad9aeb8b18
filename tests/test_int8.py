"""Promise: 8-bit products stay close to fp32 ones, row by row, and the comparison would notice if they did not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engines.hardware import has_int8
from export.int8 import Int8Linear, Int8Patches

pytestmark = pytest.mark.skipif(not has_int8(), reason="int8 needs VNNI or AMX, this CPU has neither")
ERROR_MAX = 0.01  # of the spread of a product: 256 levels for a row of activations, 255 for the weights of an output


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / (want - want.mean(0)).norm())


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 48)


def test_products_are_those_of_the_layer(layer: nn.Linear) -> None:
    x = torch.randn(200, 96)
    with torch.no_grad():
        want, got = layer(x), Int8Linear(layer.weight, layer.bias)(x)
        assert 1e-4 < error(got, want) < ERROR_MAX
        assert error(got.flip(0), want) > 1
        assert error(got - layer.bias, want) > ERROR_MAX


def test_a_row_does_not_depend_on_its_neighbours(layer: nn.Linear) -> None:
    """One token with a value a thousand times as large leaves the others as they were, to the bit."""
    x = torch.randn(32, 96)
    with_outlier = x.clone()
    with_outlier[7, 3] = 1e4
    quantised = Int8Linear(layer.weight, layer.bias)
    others = torch.arange(32) != 7
    with torch.no_grad():
        assert torch.equal(quantised(x)[others], quantised(with_outlier)[others])


@pytest.mark.parametrize("value", [0.0, -3.5, 1e-20])
def test_a_row_of_one_value_is_exact(layer: nn.Linear, value: float) -> None:
    with torch.no_grad():
        got = Int8Linear(layer.weight, None)(torch.full((2, 96), value))
        want = value * layer.weight.sum(1)
    torch.testing.assert_close(got, want.expand(2, -1), rtol=1e-5, atol=1e-6 * abs(value))


def test_activations_of_one_sign_use_all_levels(layer: nn.Linear) -> None:
    x = torch.rand(200, 96) + 5  # levels symmetric around zero would leave 18 of 255 for what differs
    with torch.no_grad():
        want, got = layer(x), Int8Linear(layer.weight, layer.bias)(x)
    assert error(got, want) < ERROR_MAX


def test_patches_are_those_of_the_convolution() -> None:
    torch.manual_seed(1)
    patch = nn.Conv2d(3, 40, kernel_size=8, stride=8, bias=False)
    pixels = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        want, got = patch(pixels), Int8Patches(patch)(pixels)
    assert got.shape == want.shape
    assert error(got.flatten(1), want.flatten(1)) < ERROR_MAX
