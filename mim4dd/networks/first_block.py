"""The first block of a network: its convolution of few channels and all that follows, compiled as one.

The convolution's output is the largest map of a network, and cheap to compute: image by image it stays in the
cache, and is computed again for the gradients instead of being saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import extension
from ..derivatives import not_differentiable
from . import batching, on_gpu
from .normalisation import TWICE
from .precision import computed_in

MOST_CHANNELS = 4
_CPU_DTYPES = (torch.float32, torch.bfloat16)


def is_compiled(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> bool:
    """Return whether `first_block` can run on images x [B, I, H, W] and a weight [O, I, h, w]."""
    dtype = computed_in(x)
    on_cpu = x.device.type == "cpu" and dtype in _CPU_DTYPES
    runs = extension.available() and (on_cpu or on_gpu.runs(dtype, x.device))
    return runs and weight.dtype == torch.float32 and fits(x, weight, padding)


def fits(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> bool:
    """Return whether `first_block` is made for the sizes of images [B, I, H, W] and a weight [O, I, h, w]."""
    return (
        x.shape[1] <= MOST_CHANNELS
        and weight.shape[0] % 32 == 0
        and weight.shape[2:] == (3, 3)
        and padding[0] == padding[1]
        and x.shape[2] + 2 * padding[0] > 2
        and x.shape[3] + 2 * padding[0] - 2 >= 8
    )


def first_block(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: float,
    *,
    padding: int,
    relu: bool,
    pool: int,
) -> Tensor:
    """Convolve without a bias, normalise every channel of every image, ReLU, pool; differentiable twice.

    Args:
        x: float32 or bfloat16 [B, I, H, W], I from 1 to 4. On a CPU sums are in float32, as products with so
            few channels are no faster in bfloat16; what is rounded is x, the result, and their gradients.
        weight: float32 [O, I, 3, 3], O a multiple of 32.
        scale: float32 [O], the factor of the normalised channel.
        bias: float32 [O], added to it.
        eps: added to the variance.
        padding: rows and columns of zeros added on each side; the sum is at least 8 wide.
        relu: whether negative values become 0.
        pool: 1, or 2 for windows of 2x2; a last odd row or column is left out.

    Returns:
        Tensor [B, O, (H + 2 padding - 2) // pool, (W + 2 padding - 2) // pool] of x's dtype, or autocast's.
    """
    x = x.to(computed_in(x))
    taps = weight.flatten(1).t()
    return _FirstBlock.apply(x, taps, scale, bias, eps, padding, relu, pool)[0]


class _FirstBlock(torch.autograd.Function):
    """(x, taps [9 I, O], scale, bias, eps, padding, relu, pool) -> y, mean, rstd.

    See csrc/first_block/image.cpp for the formulas.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.mim4dd.first_block(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, _, padding, relu, pool = inputs
        ctx.options = padding, relu, pool
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)  # mean and rstd have none
        ctx.save_for_backward(*tensors, mean, rstd)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Any, ...]:
        if grad_y is None:
            return (None,) * 8
        want_x, want_taps = ctx.needs_input_grad[:2]
        grad_x, grad_taps, *others = _Backward.apply(
            grad_y, *ctx.saved_tensors, *ctx.options, want_x, want_taps
        )
        return grad_x if want_x else None, grad_taps if want_taps else None, *others, *[None] * 4


class _Backward(torch.autograd.Function):
    """(grad_y, x, taps, scale, bias, mean, rstd, padding, relu, pool, want_x, want_taps) -> four gradients.

    They are by x, taps, scale and bias; of the first two, what is not wanted is empty.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        grad_x, *per_image = torch.ops.mim4dd.first_block_backward(*inputs)
        return grad_x, *(each.sum(0) if each.ndim > 1 else each for each in per_image)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, padding, relu, pool, _, _ = inputs
        ctx.options = padding, relu, pool
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    @not_differentiable(TWICE)
    def backward(ctx: Any, grad_grad_x: Tensor | None, *of_weights: Tensor | None) -> tuple[Any, ...]:
        _, x, *weights, _, _ = ctx.saved_tensors
        grad_grad_y, grad_x, grad_taps, grad_scale = torch.ops.mim4dd.first_block_backward_twice(
            x.new_empty(0) if grad_grad_x is None else grad_grad_x,
            *(torch.zeros_like(w) if g is None else g for g, w in zip(of_weights, weights, strict=True)),
            *ctx.saved_tensors,
            *ctx.options,
        )
        # None for the bias, which decides only where the ReLU is open, and for mean and rstd, which are
        # functions of x and taps.
        return grad_grad_y, grad_x, grad_taps.sum(0), grad_scale.sum(0), *[None] * 8


def _register() -> None:
    """Give the compiled operators their shapes, for torch.compile, and their rules for vmap."""

    def like_y(x: Tensor, taps: Tensor, padding: int, pool: int) -> Tensor:
        down, across = ((side + 2 * padding - 2) // pool for side in x.shape[2:])
        return x.new_empty(x.shape[0], taps.shape[1], down, across).to(memory_format=torch.channels_last)

    def like_x(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    def per_image(x: Tensor, taps: Tensor) -> Tensor:
        return taps.new_empty(x.shape[0], taps.shape[1])

    def taps_per_image(x: Tensor, taps: Tensor) -> Tensor:
        return taps.new_empty(x.shape[0], *taps.shape)

    @torch.library.register_fake("mim4dd::first_block")
    def _(x, taps, scale, bias, eps, padding, relu, pool):  # type: ignore[no-untyped-def]
        return like_y(x, taps, padding, pool), per_image(x, taps), per_image(x, taps)

    @torch.library.register_fake("mim4dd::first_block_backward")
    def _(grad_y, x, taps, scale, bias, mean, rstd, padding, relu, pool, want_x, want_taps):  # type: ignore[no-untyped-def]
        return (
            like_x(x) if want_x else x.new_empty(0),
            taps_per_image(x, taps) if want_taps else taps.new_empty(0),
            per_image(x, taps),
            per_image(x, taps),
        )

    @torch.library.register_fake("mim4dd::first_block_backward_twice")
    def _(  # type: ignore[no-untyped-def]
        grad_grad_x, grad_grad_taps, grad_grad_scale, grad_grad_bias,
        grad_y, x, taps, scale, bias, mean, rstd, padding, relu, pool,
    ):  # fmt: skip
        return like_y(x, taps, padding, pool), like_x(x), taps_per_image(x, taps), per_image(x, taps)

    block = ("map", "taps", "channel", "channel")
    kept = ("value", "value")
    gradients = ("map", "taps of images", "value", "value")
    batching.register("first_block", block, ("map", *kept), grouped=False)
    batching.register("first_block_backward", ("map", *block, *kept), gradients, grouped=False)
    twice = ("map", "taps", "channel", "channel", "map", *block, *kept)
    results = ("map", "map", "taps of images", "value")
    batching.register("first_block_backward_twice", twice, results, grouped=False)


if extension.available():
    _register()
