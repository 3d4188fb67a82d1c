"""3x3 convolutions: on a CPU in float32 the compiled one by Winograd's method, else torch's operator.

Second derivatives are made of the same three operations as first ones, in bfloat16 and on a GPU too: torch's
own are convolutions with images in place of channels, for which its libraries have slow kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import extension
from . import batching, by_torch, on_gpu
from .precision import computed_in


def conv2d(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Convolve without a bias; differentiable any number of times.

    Winograd's method takes a quarter of the multiplications, and sums in another order: the largest error is
    about twice that of the plain sum in float32.

    Args:
        x: float [B, I, H, W].
        weight: float [O, I, h, w].
        padding: (rows, columns) of zeros added on each side.

    Returns:
        Tensor [B, O, H', W'] of x's dtype, or autocast's.
    """
    if _is_compiled(x, weight, padding):
        dtype = computed_in(x)
        return _Convolve.apply(x.to(dtype), weight.to(dtype), False)
    return F.conv2d(x, weight, padding=padding)


def _is_compiled(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> bool:
    dtype, on_cpu = computed_in(x), x.device.type == "cpu"
    by_winograd = (
        x.dtype == weight.dtype == dtype == torch.float32
        and weight.shape[0] % 32 == weight.shape[1] % 32 == 0
    )
    runs_on_cpu = on_cpu and (by_winograd or dtype == torch.bfloat16) and extension.available()
    runs = runs_on_cpu or on_gpu.runs(dtype, x.device)
    return runs and weight.shape[2:] == (3, 3) and padding == (1, 1)


# The scalar <grad_y, convolve(x, w)> is linear in each of grad_y, x and w. Its gradients are the convolution,
# the transposed one and `convolve_grad_weight`, and the gradients of these are again the same three.


class _Convolve(torch.autograd.Function):
    """(x, weight) -> y, or if `turned`, (grad_y, weight) -> grad_x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, turned: bool) -> Tensor:
        return torch.ops.mim4dd.convolve(x, weight, turned)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, ctx.turned = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        want_x, want_weight, _ = ctx.needs_input_grad
        return (
            _Convolve.apply(grad_y, weight, not ctx.turned) if want_x else None,
            _GradWeight.apply(*((x, grad_y) if ctx.turned else (grad_y, x))) if want_weight else None,
            None,
        )


class _GradWeight(torch.autograd.Function):
    """(grad_y, x) -> grad_weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_y: Tensor, x: Tensor) -> Tensor:
        return torch.ops.mim4dd.convolve_grad_weight(grad_y, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_grad_weight: Tensor) -> tuple[Any, ...]:
        grad_y, x = ctx.saved_tensors
        want_grad_y, want_x = ctx.needs_input_grad
        return (
            _Convolve.apply(x, grad_grad_weight, False) if want_grad_y else None,
            _Convolve.apply(grad_y, grad_grad_weight, True) if want_x else None,
        )


def _batched(
    info: Any, in_dims: batching.Dims, x: Tensor, weight: Tensor, turned: bool, groups: int = 1
) -> Any:
    """How `convolve` runs under `torch.vmap`."""
    (x_dim, weight_dim), size, op = in_dims[:2], info.batch_size, torch.ops.mim4dd.convolve
    if weight_dim is None:
        return batching.unfold(op(batching.fold(x, x_dim, 0, size), weight, turned, groups), 0, size)
    if not batching.takes_groups(x.device):
        each = zip(batching.slices(x, x_dim, size), batching.slices(weight, weight_dim, size), strict=True)
        return torch.stack([op(*own, turned, groups) for own in each]), 0
    folded = batching.fold(x, x_dim, 1, size), batching.fold(weight, weight_dim, 0, size)
    return batching.unfold(op(*folded, turned, groups * size), 1, size)


def _batched_grad_weight(
    info: Any, in_dims: batching.Dims, grad_y: Tensor, x: Tensor, groups: int = 1
) -> Any:
    """How `convolve_grad_weight` runs under `torch.vmap`."""
    (grad_y_dim, x_dim), size, op = in_dims[:2], info.batch_size, torch.ops.mim4dd.convolve_grad_weight
    # To join the channels of maps that lie one after the other, they would have to be copied.
    if not batching.takes_groups(x.device) or grad_y_dim == x_dim == 0:
        each = zip(batching.slices(grad_y, grad_y_dim, size), batching.slices(x, x_dim, size), strict=True)
        return torch.stack([op(*own, groups) for own in each]), 0
    folded = batching.fold(grad_y, grad_y_dim, 1, size), batching.fold(x, x_dim, 1, size)
    return batching.unfold(op(*folded, groups * size), 0, size)


def _convolve_on_cpu(x: Tensor, weight: Tensor, turned: bool, groups: int = 1) -> Tensor:
    by = by_torch.convolve if x.dtype == torch.bfloat16 else torch.ops.mim4dd.winograd
    return by(x, weight, turned, groups)


def _grad_weight_on_cpu(grad_y: Tensor, x: Tensor, groups: int = 1) -> Tensor:
    by = by_torch.grad_weight if x.dtype == torch.bfloat16 else torch.ops.mim4dd.winograd_grad_weight
    return by(grad_y, x, groups)


_library = torch.library.Library("mim4dd", "IMPL")


def _register() -> None:
    """Give the operators their kernels on a CPU, shapes for torch.compile, and rules for vmap."""
    _library.impl("convolve", _convolve_on_cpu, "CPU")
    _library.impl("convolve_grad_weight", _grad_weight_on_cpu, "CPU")

    def empty(like: Tensor, *shape: int) -> Tensor:
        return like.new_empty(shape).to(memory_format=torch.channels_last)

    @torch.library.register_fake("mim4dd::convolve")
    def _(x, weight, turned, groups=1):  # type: ignore[no-untyped-def]
        channels = groups * weight.shape[1] if turned else weight.shape[0]
        return empty(x, x.shape[0], channels, *x.shape[2:])

    @torch.library.register_fake("mim4dd::convolve_grad_weight")
    def _(grad_y, x, groups=1):  # type: ignore[no-untyped-def]
        return empty(x, grad_y.shape[1], x.shape[1] // groups, 3, 3)

    torch.library.register_vmap("mim4dd::convolve", _batched)
    torch.library.register_vmap("mim4dd::convolve_grad_weight", _batched_grad_weight)


if extension.available():
    _register()
