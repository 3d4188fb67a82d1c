"""The first block of a ConvNet in one pass: a 3x3 convolution of few channels and all that follows.

The convolution's output, four times as large as the block's, is computed again for every pass over an image
and never written. See csrc/first_block/image.cpp for the formulas.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .first_block_kernels import backward_kernel, forward_kernel
from .launch import on_device_of, precision_of_convolutions


class Tile(NamedTuple):
    """Channels, at most, and pixels of a program's products, and how it is run."""

    channels: int
    pixels: int
    warps: int
    stages: int


# By how products are formed: "half" (bfloat16, float16; the fastest on an H100), "tf32", "ieee" (float32
# without tensor cores).
TILES = {"half": Tile(128, 64, 4, 1), "tf32": Tile(128, 32, 8, 1), "ieee": Tile(32, 32, 8, 1)}


def forward(
    x: Tensor,
    taps: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: float,
    padding: int,
    relu: bool,
    pool: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve without a bias, normalise every channel of every image, ReLU, pool.

    Args:
        x: float32, bfloat16 or float16 [B, G * I, H, W] of any strides, I from 1 to 4; each of the G groups
            of the output's channels sees I channels, as in torch's convolutions.
        taps: float32 [9 * I, O], which is weight.flatten(1).t() of a weight [O, I, 3, 3]; O / G is a multiple
            of 16.
        scale: float32 [O], the factor of the normalised channel.
        bias: float32 [O], added to it.
        eps: added to the variance.
        padding: rows and columns of zeros added on each side.
        relu: whether negative values become 0.
        pool: 1, or 2 for windows of 2x2; a last odd row or column counts in the statistics only.

    Returns:
        The block's output [B, O, (H + 2 padding - 2) // pool, (W + 2 padding - 2) // pool], of x's type with
        channels last, and each channel's mean and inverse deviation, float32 [B, O].
    """
    batch, channels = x.shape[0], taps.shape[1]
    down, across = _map_size(x, padding)
    out = torch.empty(
        batch,
        channels,
        down // pool,
        across // pool,
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    mean, rstd = (torch.empty(batch, channels, dtype=torch.float32, device=x.device) for _ in range(2))
    if batch:
        x, grid, given, options = _call(x, taps, padding, relu, pool)
        with on_device_of(x):
            forward_kernel[grid](
                x, taps, scale.contiguous(), bias.contiguous(), out, mean, rstd, eps, *given, **options
            )
    return out, mean, rstd


def backward(
    grad_out: Tensor,
    x: Tensor,
    taps: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    padding: int,
    relu: bool,
    pool: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each image's gradients of taps [B, 9 * I, O], scale [B, O] and bias [B, O], float32.

    Args:
        grad_out: the gradient of the block's output, of its shape and type.
        x, taps, scale, bias, mean, rstd, padding, relu, pool: what `forward` was given and returned.
    """
    batch, channels = x.shape[0], taps.shape[1]
    grad_taps = torch.empty(batch, *taps.shape, dtype=torch.float32, device=x.device)
    grad_scale, grad_bias = (
        torch.empty(batch, channels, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    if batch:
        grad_out = grad_out.contiguous(memory_format=torch.channels_last)
        x, grid, given, options = _call(x, taps, padding, relu, pool)
        with on_device_of(x):
            backward_kernel[grid](
                grad_out, x, taps, scale.contiguous(), bias.contiguous(),
                mean.contiguous(), rstd.contiguous(), grad_taps, grad_scale, grad_bias, *given, **options,
            )  # fmt: skip
    return grad_taps, grad_scale, grad_bias


def _call(
    x: Tensor, taps: Tensor, padding: int, relu: bool, pool: int
) -> tuple[Tensor, tuple[int, int], tuple[int, ...], dict[str, Any]]:
    """Return what both kernels are launched with: x, the grid, numbers and constants."""
    if sum((size - 1) * stride for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True)) >= 1 << 31:
        x = x.contiguous()  # offsets within a channel have 32 bits
    rows, channels = taps.shape
    per_group = channels // (x.shape[1] // (rows // 9))
    precision = precision_of_convolutions(x.dtype)
    tile = TILES[precision]
    block = min(tile.channels, per_group & -per_group)
    down, across = _map_size(x, padding)
    options = {
        "IN": rows // 9,
        "HEIGHT": x.shape[2],
        "WIDTH": x.shape[3],
        "DOWN": down,
        "ACROSS": across,
        "PADDING": padding,
        "RELU": relu,
        "POOL": pool,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "BLOCK_K": max(16, triton.next_power_of_2(rows)),
        "BLOCK_C": block,
        "BLOCK_P": tile.pixels,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    grid = x.shape[0], channels // block
    return x, grid, (channels, per_group, *x.stride(), *taps.stride()), options


def _map_size(x: Tensor, padding: int) -> tuple[int, int]:
    """Rows and columns of the convolution's output."""
    return x.shape[2] + 2 * padding - 2, x.shape[3] + 2 * padding - 2
