"""The gradient of the weight of a 3x3 convolution in groups, padded by 1.

For small maps the library works on one group after the other. Here all groups are worked on at once, and the
images in as many parts as it takes to fill a GPU, whose sums are then added in their order: equal calls give
equal bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import launch
from .grad_weight_kernels import sums_kernel, total_kernel

TOTAL_BLOCK = 1024


class Tile(NamedTuple):
    """Channels of grad_y and of x, at most, taps and pixels of a program's products, and how it is run."""

    out: int
    channels: int
    taps: int
    pixels: int
    warps: int
    stages: int
    at_once: int  # programs that a multiprocessor is to have


# By how products are formed, as in `launch`. Tiles are read through the L2, and the larger, the less is read.
TILES = {
    "half": Tile(128, 64, 3, 64, 8, 3, 1),
    "tf32": Tile(128, 32, 3, 32, 8, 3, 1),
    "ieee": Tile(64, 64, 1, 32, 4, 3, 4),
}


def grad_weight(grad_y: Tensor, x: Tensor, groups: int) -> Tensor:
    """Return the gradient of a weight [O, I, 3, 3], of x's type with channels last.

    Args:
        grad_y: the gradient of the convolution's output, [B, O, H, W] of x's type.
        x: float32, bfloat16 or float16 [B, groups * I, H, W]. Maps are copied unless channels come last.
        groups: as in torch's convolutions.
    """
    grad_y, x = (maps.contiguous(memory_format=torch.channels_last) for maps in (grad_y, x))
    batch, channels, height, width = x.shape
    num_out, num_in = grad_y.shape[1] // groups, channels // groups
    precision = launch.precision_of_convolutions(x.dtype)
    tile = TILES[precision]
    block_o, block_c = (
        min(largest, max(16, triton.next_power_of_2(size)))
        for largest, size in ((tile.out, num_out), (tile.channels, num_in))
    )
    tiles = groups * triton.cdiv(num_out, block_o) * triton.cdiv(num_in, block_c) * (9 // tile.taps)
    _, multiprocessors = launch.device_limits(x.device)
    images = max(1, triton.cdiv(batch, max(1, multiprocessors * tile.at_once // tiles)))
    parts = max(1, triton.cdiv(batch, images))
    grad = torch.empty(
        (groups * num_out, num_in, 3, 3), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    sums = grad
    if parts > 1:
        sums = torch.empty((parts, grad.numel()), dtype=torch.float32, device=x.device)
    with launch.on_device_of(x):
        sums_kernel[(tiles, parts)](
            grad_y, x, sums, batch, images, groups, num_out, num_in, HEIGHT=height, WIDTH=width,
            TAPS=tile.taps, PRECISION="tf32" if precision == "tf32" else "ieee",
            BLOCK_O=block_o, BLOCK_C=block_c, BLOCK_P=tile.pixels,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if parts > 1:
            size = grad.numel()
            total_kernel[(triton.cdiv(size, TOTAL_BLOCK),)](sums, grad, size, PARTS=parts, BLOCK=TOTAL_BLOCK)
    return grad
