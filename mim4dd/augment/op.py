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
    fields: Sequence[Tensor],
    rows: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    align_corners: bool,
) -> Tensor:
    """What `augment.apply` promises, on checked arguments; `fields` are AugmentParams' in its order."""
    call = torch.ops.mim4dd.augment if torch.compiler.is_compiling() else _node().apply
    return call(images, fields, rows, mean, std, align_corners, False)


def _node() -> type[torch.autograd.Function]:
    return _TransformableNode if torch._C._are_functorch_transforms_active() else _Node


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs)
        return torch.ops.mim4dd.augment_no_grad(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        twice = torch.is_grad_enabled()  # create_graph: the gradient has a gradient
        call = _node().apply if twice else torch.ops.mim4dd.augment_no_grad
        return _gradient(ctx, gradient, call), *[None] * 6


class _TransformableNode(_Node):
    """The same in the form that torch.func asks for; a small call takes nearly twice as long."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return torch.ops.mim4dd.augment_no_grad(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _save(ctx, inputs)


def _save(ctx: Any, inputs: Sequence[Any]) -> None:
    _, fields, rows, _, std, ctx.align_corners, ctx.adjoint = inputs
    ctx.save_for_backward(rows, std, *fields)


def _gradient(ctx: Any, gradient: Tensor, op: Any) -> Tensor:
    """The same op with `adjoint` inverted, for the op is linear in its images but for a constant."""
    rows, std, brightness, *fields = ctx.saved_tensors
    if ctx.adjoint:  # the gradient of the gradient: the op without that constant
        brightness = brightness.mul(0)
    gradient = op(gradient, [brightness, *fields], rows, None, None, ctx.align_corners, not ctx.adjoint)
    return gradient if std is None else gradient / std[:, None, None]


def _register() -> None:
    def fake(images, fields, rows, mean, std, align_corners, adjoint):  # type: ignore[no-untyped-def]
        # One tensor without data is enough to come here.
        if any(given is not None and given.device != images.device for given in (*fields, rows, mean, std)):
            raise ValueError("mim4dd.augment.apply: params, rows, mean, std must be on the device of images")
        return torch.empty_like(images, dtype=None if images.is_floating_point() else torch.float32)

    for name in ("augment", "augment_no_grad"):
        torch.library.register_fake(f"mim4dd::{name}", fake)

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _save(ctx, inputs)

    def backward(ctx: Any, gradient: Tensor) -> tuple:
        no_fields = [None] * (len(ctx.saved_tensors) - 2)
        return _gradient(ctx, gradient, torch.ops.mim4dd.augment), no_fields, *[None] * 5

    torch.library.register_autograd("mim4dd::augment", backward, setup_context=setup_context)


if extension.available():
    _register()
