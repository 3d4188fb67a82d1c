"""The compiled augmentation as torch sees it: an autograd node, and under torch.compile a registered op.

In eager mode the node is called directly, since the boundary of a registered op with a gradient costs as much
as augmenting a small batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import extension


def augment(
    images: Tensor,
    params: Sequence[Tensor],
    rows: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    align_corners: bool,
) -> Tensor:
    """`augment.apply` on checked arguments; `params` as `AugmentParams.stored` returns them."""
    call = torch.ops.mim4dd.augment if torch.compiler.is_compiling() else _with_gradient
    return call(images, params, rows, mean, std, align_corners, False)


def _with_gradient(images: Tensor, *others: Any) -> Tensor:
    node = _TransformableNode if torch._C._are_functorch_transforms_active() else _Node
    return node.apply(images, others)


class _Node(torch.autograd.Function):
    # The other arguments of the op come as one: torch looks at each of a node's arguments several times.
    @staticmethod
    def forward(ctx: Any, images: Tensor, others: tuple) -> Tensor:
        _save(ctx, others)
        return _no_grad(images, *others)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        twice = torch.is_grad_enabled()  # create_graph: the gradient has a gradient
        return _gradient(ctx, gradient, _with_gradient if twice else _no_grad), None


class _TransformableNode(_Node):
    """The same in the form that torch.func asks for; a small call takes nearly twice as long."""

    @staticmethod
    def forward(images: Tensor, others: tuple) -> Tensor:  # type: ignore[override]
        return _no_grad(images, *others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _save(ctx, inputs[1])


def _save(ctx: Any, others: Sequence[Any]) -> None:
    params, rows, _, std, ctx.align_corners, ctx.adjoint = others
    ctx.save_for_backward(rows, std, *params)


def _gradient(ctx: Any, gradient: Tensor, op: Any) -> Tensor:
    """The same op with `adjoint` inverted, since the op is linear in its images up to a constant."""
    rows, std, *params = ctx.saved_tensors
    if ctx.adjoint:  # the gradient of the gradient: the op without that constant, the brightness
        first = params[0].clone()
        (first if first.ndim == 1 else first[:, 0]).mul_(0)
        params[0] = first
    gradient = op(gradient, params, rows, None, None, ctx.align_corners, not ctx.adjoint)
    return gradient if std is None else gradient / std[:, None, None]


def _register() -> None:
    def fake(images, params, rows, mean, std, align_corners, adjoint):  # type: ignore[no-untyped-def]
        # One tensor without data is enough to come here.
        if any(given is not None and given.device != images.device for given in (*params, rows, mean, std)):
            raise ValueError("mim4dd.augment.apply: params, rows, mean, std must be on the device of images")
        return torch.empty_like(images, dtype=None if images.is_floating_point() else torch.float32)

    for name in ("augment", "augment_no_grad"):
        torch.library.register_fake(f"mim4dd::{name}", fake)

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _save(ctx, inputs[1:])

    def backward(ctx: Any, gradient: Tensor) -> tuple:
        no_params = [None] * (len(ctx.saved_tensors) - 2)
        return _gradient(ctx, gradient, torch.ops.mim4dd.augment), no_params, *[None] * 5

    torch.library.register_autograd("mim4dd::augment", backward, setup_context=setup_context)


if extension.available():
    _register()
    _no_grad = torch.ops.mim4dd.augment_no_grad.default  # looked up once, as that is slow
