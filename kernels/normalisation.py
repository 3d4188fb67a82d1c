"""Instance normalisation, then ReLU, then average pooling by two, with first and second derivatives.

Maps are [B, C, H, W] of float32, bfloat16 or float16, copied unless their channels come last in memory; the
returned ones have x's dtype and channels last. Weight and bias are float32 [C]. The mean, the inverse
deviation `rstd`, and every gradient of weight and bias (`grad_weight`, `grad_grad_weight`, ...) are float32
[B, C], image by image. `pool` is 1, or 2 for windows of 2x2: a last odd row or column is normalised but not
pooled. Sums are in float32.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from .launch import on_device_of
from .normalisation_kernels import backward_kernel, backward_twice_kernel, forward_kernel


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool, pool: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output [B, C, H // pool, W // pool], mean and rstd."""
    x = _channels_last(x)
    out, mean, rstd = _map_like(x, pool), _per_image(x), _per_image(x)
    affine = _contiguous(weight, bias)
    _launch(forward_kernel, x, relu, pool, x, *affine, out, mean, rstd, x.shape[1], eps)
    return out, mean, rstd


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    relu: bool,
    pool: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias, given that of the output."""
    grad_out, x = _channels_last(grad_out), _channels_last(x)
    grad_x, grad_weight, grad_bias = _map_like(x), _per_image(x), _per_image(x)
    _launch(
        backward_kernel, x, relu, pool,
        grad_out, x, *_contiguous(weight, bias, mean, rstd), grad_x, grad_weight, grad_bias, x.shape[1],
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def backward_twice(
    grad_grad_x: Tensor,
    grad_grad_weight: Tensor,
    grad_grad_bias: Tensor,
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    relu: bool,
    pool: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of grad_out, x and weight, given those of what `backward` returned."""
    grad_grad_x, grad_out, x = _channels_last(grad_grad_x), _channels_last(grad_out), _channels_last(x)
    grad_grad_out, grad_x, grad_weight = _map_like(x, pool), _map_like(x), _per_image(x)
    _launch(
        backward_twice_kernel, x, relu, pool,
        grad_grad_x, *_contiguous(grad_grad_weight, grad_grad_bias), grad_out,
        x, *_contiguous(weight, bias, mean, rstd), grad_grad_out, grad_x, grad_weight, x.shape[1],
    )  # fmt: skip
    return grad_grad_out, grad_x, grad_weight


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last)


def _contiguous(*values: Tensor) -> tuple[Tensor, ...]:
    return tuple(value.contiguous() for value in values)


def _map_like(x: Tensor, pool: int = 1) -> Tensor:
    batch, channels, height, width = x.shape
    return torch.empty(
        (batch, channels, height // pool, width // pool),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _per_image(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def _launch(kernel: Any, x: Tensor, relu: bool, pool: int, *arguments: Any) -> None:
    if not x.numel():
        return
    batch, channels, height, width = x.shape
    windows = triton.cdiv(height, pool) * triton.cdiv(width, pool)
    block, block_c, warps = _blocks(windows, pool, channels, kernel is backward_twice_kernel)
    exact = height % pool == 0 and width % pool == 0 and windows % block == 0
    with on_device_of(x):
        kernel[(batch * triton.cdiv(channels, block_c),)](
            *arguments, H=height, W=width, RELU=relu, POOL=pool, EXACT=exact, BLOCK=block, BLOCK_C=block_c,
            num_warps=warps,
        )  # fmt: skip


def _blocks(windows: int, pool: int, channels: int, twice: bool) -> tuple[int, int, int]:
    """Return the windows and channels of a block, and its number of warps: the fastest on an H100.

    Channels are few, as what is read again comes from a cache if the maps of all programs fit there, but
    enough to read whole sectors of memory. The second derivative keeps more values of each pixel in
    registers, and so takes fewer pixels.
    """
    pixels = triton.next_power_of_2(windows) * pool**2
    if pixels > 256:
        size, per_thread = 8192, 32
    elif twice:
        size, per_thread = 2048, 16
    else:
        size, per_thread = 8192, 64 if pixels > 64 else 32
    block_c = min(triton.next_power_of_2(channels), 128, max(32, min(size, 4096) // pixels))
    block = max(1, min(pixels, size // block_c) // pool**2)
    return block, block_c, max(1, block * pool**2 * block_c // (32 * per_thread))
