"""Instance normalisation, ReLU and average pooling: compiled as one, else torch's operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import extension
from ..derivatives import not_differentiable
from . import batching, on_gpu


def instance_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, relu: bool = False, pool: int = 1
) -> Tensor:
    """Normalise every channel of every image, then ReLU, then average pooling; differentiable twice.

    Args:
        x: float [B, C, H, W].
        weight: float [C], the factor of the normalised channel.
        bias: float [C], added to it.
        eps: added to the variance.
        relu: whether negative values become 0.
        pool: 1, or 2 for windows of 2x2; a last odd row or column is left out.

    Returns:
        Tensor [B, C, H // pool, W // pool] of x's dtype. Sums are in float32 at least.
    """
    if is_compiled(x):
        sums = torch.promote_types(x.dtype, torch.float32)
        return _InstanceNorm.apply(x, weight.to(sums), bias.to(sums), eps, relu, pool)[0]
    return reference(x, weight, bias, eps, relu, pool)


def is_compiled(x: Tensor) -> bool:
    """Return whether the compiled operator runs on x."""
    on_cpu = x.device.type == "cpu" and x.dtype in _CPU_DTYPES
    return (on_cpu and extension.available()) or on_gpu.runs(x.dtype, x.device)


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool, pool: int) -> Tensor:
    """Return the same as `instance_norm`, computed by torch's operators."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        # torch's own goes through one channel at a time where channels come last: 10.3 ms against 0.6 ms
        # for 32x64x16x16 on one core.
        centred = x - x.mean((2, 3), keepdim=True)
        variance = centred.square().mean((2, 3), keepdim=True)
        scale = (variance + eps).rsqrt() * weight[:, None, None]
        out = torch.addcmul(bias[:, None, None], centred, scale)
    else:
        out = F.group_norm(x, x.shape[1], weight, bias, eps)
    if relu:
        out = out.relu()
    return F.avg_pool2d(out, 2) if pool == 2 else out


TWICE = "compiled layers are differentiable twice, those of torch (install with MIM4DD_NO_EXT=1) more often"
_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class _InstanceNorm(torch.autograd.Function):
    """(x, weight, bias, eps, relu, pool) -> out, mean, rstd; see csrc/normalisation/image.cpp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.mim4dd.instance_norm(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, _, relu, pool = inputs
        ctx.options = relu, pool
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)  # mean and rstd have none
        ctx.save_for_backward(*tensors, mean, rstd)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Any, ...]:
        if grad_out is None:
            return (None,) * 6
        grad_x, grad_weight, grad_bias = _Backward.apply(grad_out, *ctx.saved_tensors, *ctx.options)
        return grad_x, grad_weight.sum(0), grad_bias.sum(0), None, None, None


class _Backward(torch.autograd.Function):
    """(grad_out, x, weight, bias, mean, rstd, relu, pool) -> grad_x, and by image grad_weight, grad_bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.mim4dd.instance_norm_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, relu, pool = inputs
        ctx.options = relu, pool
        ctx.save_for_backward(*tensors)

    @staticmethod
    @not_differentiable(TWICE)
    def backward(
        ctx: Any, grad_grad_x: Tensor, grad_grad_weight: Tensor, grad_grad_bias: Tensor
    ) -> tuple[Any, ...]:
        grad_grad_out, grad_x, grad_weight = torch.ops.mim4dd.instance_norm_backward_twice(
            grad_grad_x,
            # Each has one row for all images: one copy makes both whole.
            *torch.stack([grad_grad_weight, grad_grad_bias]),
            *ctx.saved_tensors,
            *ctx.options,
        )
        # None for the bias, which decides only where the ReLU is open, and for mean and rstd, which are
        # functions of x and counted in grad_x.
        return grad_grad_out, grad_x, grad_weight.sum(0), None, None, None, None, None


def _register() -> None:
    """Give the compiled operators their shapes, for torch.compile, and their rules for vmap."""

    def like_out(x: Tensor, pool: int) -> Tensor:
        out = x.new_empty(x.shape[0], x.shape[1], x.shape[2] // pool, x.shape[3] // pool)
        return out.to(memory_format=torch.channels_last)

    def like_x(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.channels_last)

    def per_image(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))

    @torch.library.register_fake("mim4dd::instance_norm")
    def _(x, weight, bias, eps, relu, pool):  # type: ignore[no-untyped-def]
        return like_out(x, pool), per_image(x), per_image(x)

    @torch.library.register_fake("mim4dd::instance_norm_backward")
    def _(grad_out, x, weight, bias, mean, rstd, relu, pool):  # type: ignore[no-untyped-def]
        return like_x(x), per_image(x), per_image(x)

    @torch.library.register_fake("mim4dd::instance_norm_backward_twice")
    def _(grad_grad_x, grad_grad_weight, grad_grad_bias, grad_out, x, weight, bias, mean, rstd, relu, pool):  # type: ignore[no-untyped-def]
        return like_out(x, pool), like_x(x), per_image(x)

    norm = ("map", "channel", "channel")
    kept = ("value", "value")
    batching.register("instance_norm", norm, ("map", *kept))
    batching.register("instance_norm_backward", ("map", *norm, *kept), ("map", "value", "value"))
    twice = ("map", "value", "value", "map", *norm, *kept)
    batching.register("instance_norm_backward_twice", twice, ("map", "map", "value"))


if extension.available():
    _register()
