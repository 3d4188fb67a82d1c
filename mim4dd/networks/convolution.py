"""Convolutions 3x3: on a CPU in float32 Winograd's, compiled, else torch's operator.

On a GPU too, the gradients of gradients are made of the three operations that the gradients are: torch's own
are convolutions with images for channels, for which its library has slow kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import extension
from . import batching, on_gpu


def conv2d(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Convolve without a bias; differentiable any number of times.

    A quarter of the multiplications of torch's, with sums in another order: the largest error is about twice
    that of the plain sum in float32.

    Args:
        x: float [B, I, H, W].
        weight: float [O, I, h, w].
        padding: (rows, columns) of zeros added on each side.

    Returns:
        Tensor [B, O, H', W'] of x's dtype, or autocast's.
    """
    if _is_compiled(x, weight, padding):
        dtype = on_gpu.computed_in(x)
        return _Convolve.apply(x.to(dtype), weight.to(dtype), False)
    return F.conv2d(x, weight, padding=padding)


def _is_compiled(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> bool:
    by_winograd = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.shape[0] % 32 == weight.shape[1] % 32 == 0
        and not torch.is_autocast_enabled("cpu")
    )
    runs = (by_winograd and extension.available()) or on_gpu.runs(on_gpu.computed_in(x), x.device)
    return runs and weight.shape[2:] == (3, 3) and padding == (1, 1)


# The sum over outputs <g, convolve(x, w)> is linear in each of g, x and w. Its gradients are the three
# operations below, and theirs are these again.


class _Convolve(torch.autograd.Function):
    """(x, w) -> y, or `turned`, (g, w) -> the gradient by x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, turned: bool) -> Tensor:
        return torch.ops.mim4dd.convolve(x, weight, turned)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, ctx.turned = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, _ = ctx.needs_input_grad
        return (
            _Convolve.apply(grad, weight, not ctx.turned) if by_x else None,
            _ByWeight.apply(*((x, grad) if ctx.turned else (grad, x))) if by_weight else None,
            None,
        )


class _ByWeight(torch.autograd.Function):
    """(g, x) -> the gradient by w."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        return torch.ops.mim4dd.convolve_by_weight(grad, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, of_weight: Tensor) -> tuple[Any, ...]:
        grad, x = ctx.saved_tensors
        by_grad, by_x = ctx.needs_input_grad
        return (
            _Convolve.apply(x, of_weight, False) if by_grad else None,
            _Convolve.apply(grad, of_weight, True) if by_x else None,
        )


def _batched(
    info: Any, in_dims: batching.Dims, x: Tensor, weight: Tensor, turned: bool, groups: int = 1
) -> Any:
    """How `convolve` runs under `torch.vmap`."""
    (of_x, of_weight), size, op = in_dims[:2], info.batch_size, torch.ops.mim4dd.convolve
    if of_weight is None:
        return batching.unfold(op(batching.fold(x, of_x, 0, size), weight, turned, groups), 0, size)
    if not batching.takes_groups(x.device):
        each = zip(batching.slices(x, of_x, size), batching.slices(weight, of_weight, size), strict=True)
        return torch.stack([op(*own, turned, groups) for own in each]), 0
    folded = batching.fold(x, of_x, 1, size), batching.fold(weight, of_weight, 0, size)
    return batching.unfold(op(*folded, turned, groups * size), 1, size)


def _batched_by_weight(info: Any, in_dims: batching.Dims, grad: Tensor, x: Tensor, groups: int = 1) -> Any:
    """How `convolve_by_weight` runs under `torch.vmap`."""
    (of_grad, of_x), size, op = in_dims[:2], info.batch_size, torch.ops.mim4dd.convolve_by_weight
    # On more channels, maps that lie one after the other would be copied.
    if not batching.takes_groups(x.device) or of_grad == of_x == 0:
        each = zip(batching.slices(grad, of_grad, size), batching.slices(x, of_x, size), strict=True)
        return torch.stack([op(*own, groups) for own in each]), 0
    folded = batching.fold(grad, of_grad, 1, size), batching.fold(x, of_x, 1, size)
    return batching.unfold(op(*folded, groups * size), 0, size)


def _register() -> None:
    """Give the compiled operators their shapes, for torch.compile, and their rules for vmap."""

    def empty(like: Tensor, *shape: int) -> Tensor:
        return like.new_empty(shape).to(memory_format=torch.channels_last)

    @torch.library.register_fake("mim4dd::convolve")
    def _(x, weight, turned, groups=1):  # type: ignore[no-untyped-def]
        channels = groups * weight.shape[1] if turned else weight.shape[0]
        return empty(x, x.shape[0], channels, *x.shape[2:])

    @torch.library.register_fake("mim4dd::convolve_by_weight")
    def _(grad, x, groups=1):  # type: ignore[no-untyped-def]
        return empty(x, grad.shape[1], x.shape[1] // groups, 3, 3)

    torch.library.register_vmap("mim4dd::convolve", _batched)
    torch.library.register_vmap("mim4dd::convolve_by_weight", _batched_by_weight)


if extension.available():
    _register()
