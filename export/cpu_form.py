"""A vision tower in the form CPUs compute fastest: the same vectors, other operations.

The patch embedding becomes a product: windows that do not overlap are rows, and oneDNN's product takes 3.9 ms for 8
pictures of B/32 in bf16 where its convolution takes 7.8. The 1.702 of quick GELU moves into the weights around it: what
is left is SiLU, which oneDNN computes while a sum is still in a register, so that the widest activations are written
once and not read again. On 2 cores of a Zen 5 the two take bf16 from .87 to .92 of the GEMM peak (docs/LOG.md).
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn import functional

from export.towers import QUICK_GELU_SLOPE, Block, VisionTower, quick_gelu


class ProductPatches(nn.Module):
    """The patch embedding, (b, 3, s, s) -> (b, width, down, across), as a product of rows of pixels."""

    def __init__(self, patch: nn.Conv2d) -> None:
        super().__init__()
        self.side, self.width = patch.kernel_size[0], patch.out_channels
        self.product = _linear(patch.weight.flatten(1), patch.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        batch, channels, height, width = pixels.shape
        down, across, side = height // self.side, width // self.side, self.side
        windows = pixels.view(batch, channels, down, side, across, side).permute(0, 2, 4, 1, 3, 5)
        rows: Tensor = self.product(windows.reshape(-1, channels * side * side))
        return rows.view(batch, down * across, self.width).transpose(1, 2).view(batch, self.width, down, across)


def cpu_form(tower: VisionTower) -> VisionTower:
    """`tower` rewritten; what is not rewritten shares its memory."""
    tower = copy.deepcopy(tower, {id(tensor): tensor for tensor in (*tower.parameters(), *tower.buffers())})
    tower.patch = ProductPatches(tower.patch)
    for block in (*tower.blocks, tower.last):
        assert isinstance(block, Block)
        if block.activation is quick_gelu:
            _fold_slope(block)
    return tower


def _fold_slope(block: Block) -> None:
    """x sigmoid(a x) = silu(a x) / a."""
    slope = QUICK_GELU_SLOPE
    block.fc1 = _linear(block.fc1.weight * slope, block.fc1.bias * slope)
    block.fc2 = _linear(block.fc2.weight / slope, block.fc2.bias)
    block.activation = functional.silu


def _linear(weight_oi: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight_oi.shape[1], weight_oi.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight_oi.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
