"""A vision tower with 8-bit matrix products: weights per output, activations per row, both at run time exact in int32.

    quantised = int8_tower(towers.vision)      # same call, same shape of result; compile it with export.to_aoti

Every row of activations gets the 256 levels between its own smallest and largest value when it is computed, so nothing
has to be calibrated, no row depends on another, and outliers of one token do not blur the rest. Residual stream, norms,
softmax, attention products and the final projection stay fp32. Error/spread on photos: .04 with random B/32 weights,
.009 with the demo model, where bf16 is allowed .06; one scale for a whole tensor gives .05 and .017.
Needs VNNI or AMX (`engines.hardware.has_int8`): older CPUs add pairs of products in 16 bits, which overflow.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from export.towers import VisionTower

LEVELS = 255  # between the smallest and the largest value of a row
WEIGHT_MAX = 127


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

    def forward(self, x: Tensor) -> Tensor:
        low, high, mean = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), x.mean(-1, keepdim=True)
        step = (high - low).clamp(min=1e-12) / LEVELS
        levels = ((x - low) * step.reciprocal()).round().to(torch.uint8)
        packed = torch.ops.onednn.qlinear_prepack(self.levels, None)  # of a constant: done once, when compiled
        product = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, 0, packed, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        # The mean times the true weights, the rest of the row times the rounded ones.
        made: Tensor = product * step + ((low - mean) * self.ones + mean * self.true_ones + self.bias)
        return made


class Int8Patches(nn.Module):
    """The patch embedding, a convolution whose windows do not overlap, as a product of rows of pixels."""

    def __init__(self, patch: nn.Conv2d) -> None:
        super().__init__()
        self.side, self.width = patch.kernel_size[0], patch.out_channels
        self.weight = patch.weight  # only asked for its dtype
        self.linear = Int8Linear(patch.weight, patch.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        batch, channels, height, width = pixels.shape
        down, across, side = height // self.side, width // self.side, self.side
        windows = pixels.view(batch, channels, down, side, across, side).permute(0, 2, 4, 1, 3, 5)
        rows: Tensor = self.linear(windows.reshape(-1, channels * side * side))
        return rows.view(batch, down * across, self.width).transpose(1, 2).view(batch, self.width, down, across)


def int8_tower(tower: VisionTower) -> VisionTower:
    """A copy of `tower` whose products with weights are 8-bit, but for the projection."""
    tower = copy.deepcopy(tower)
    tower.patch = Int8Patches(tower.patch)
    for block in (*tower.blocks, tower.last):
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(block, name, Int8Linear(layer.weight, layer.bias))
    return tower


def _packed_shape(levels_oi: Tensor, _shape: list[int] | None) -> Tensor:
    return levels_oi.new_empty(levels_oi.shape[::-1])


# torch knows this operation's kernel and not its shape, which torch.export asks for: (in, out).
torch.library.register_fake("onednn::qlinear_prepack", _packed_shape)
