"""One contrastive loss as torch sees it: an autograd node in eager mode, a registered op under torch.compile.

Both evaluate loss and gradients together in the forward (`_evaluate`: the fused kernels or the chunked
reference); the backward only scales the gradients. A derivative of the gradients is taken from the plain
formula, with its M x N matrix. In eager mode the node is called directly, since the boundary of a registered
op costs more than a small kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._subclasses.fake_tensor import FakeTensor

from ..backends import kernel_obstacle
from . import reference
from .form import LossForm, saved_dtype
from .scales import without_autocast


def contrastive_losses(
    form: LossForm,
    backend: str,
    scales: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    anchors: Sequence[Tensor],
    keys: Sequence[Tensor],
) -> Tensor:
    """The losses [L] of L layers that share their labels.

    Args:
        form: which loss.
        backend: "reference" or "fused".
        scales: [2, L], the temperature and the noise ratio of each layer (1 for InfoNCE, which has none).
        anchor_labels: int [M].
        key_labels: int [N].
        anchors: L tensors [M, D_l], all of one dtype.
        keys: L tensors [N, D_l] of that dtype.
    """
    features = [*anchors, *keys]
    grad = torch.is_grad_enabled()
    wanted = [grad and any(value.requires_grad for value in group) for group in ([scales], anchors, keys)]
    options = (form.name, form.negatives, form.symmetric, form.exclude_self, backend, wanted)
    if torch.compiler.is_compiling() or scales.is_meta or isinstance(scales, FakeTensor):
        return _op(scales, anchor_labels, key_labels, features, *options)[0]
    tensors = [scales, anchor_labels, key_labels, *features]
    if any(wanted):  # what was made in inference mode cannot be saved for the backward
        tensors = [tensor.clone() if tensor.is_inference() else tensor for tensor in tensors]
    if torch._C._are_functorch_transforms_active():
        return _TransformableNode.apply(options, *tensors)[0]
    return _Node.apply(options, *tensors)


def _evaluate(
    scales: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    features: Sequence[Tensor],
    name: str,
    negatives: float | None,
    symmetric: bool,
    exclude_self: bool,
    backend: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Return the losses [L], then the gradients for scales and each feature, empty where not `wanted`."""
    form = LossForm(name, negatives, symmetric, exclude_self)
    half = len(features) // 2
    # Checked again: while the call is traced, it is not known what the GPU can do.
    if backend == "fused" and not kernel_obstacle(features[0].dtype, features[0].device):
        from ..kernels import contrast

        return contrast(form, scales, anchor_labels, key_labels, features[:half], features[half:], wanted)
    layers = zip(scales.unbind(1), features[:half], features[half:], strict=True)
    with without_autocast(scales):
        single = [
            reference.chunked(form, own_scales, anchor_labels, key_labels, anchors, keys, wanted)
            for own_scales, anchors, keys in layers
        ]
    losses, grad_scales, grad_anchors, grad_keys = zip(*single, strict=True)
    grad_all_scales = torch.stack(grad_scales, -1) if wanted[0] else scales.new_empty(0)
    return [torch.stack(losses), grad_all_scales, *grad_anchors, *grad_keys]


# ------------------------------------------------------------------------------------------------ gradients


def _save(ctx: Any, tensors: Sequence[Tensor], options: tuple, gradients: Sequence[Tensor]) -> None:
    ctx.options = options
    ctx.save_for_backward(*tensors, *gradients)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_losses: Tensor | None) -> list[Tensor | None]:
    """The gradients for scales and each feature, None where not needed."""
    # Saved: scales, two labels and the features; then the gradients for scales and features.
    saved = ctx.saved_tensors
    half = (len(saved) - 4) // 4
    tensors, gradients = saved[: 3 + 2 * half], saved[3 + 2 * half :]
    for_scales, *for_sides = ctx.options[-1]
    wanted = [for_scales, *(want for want in for_sides for _ in range(half))]
    if grad_losses is None:
        return [None] * (1 + 2 * half)
    if torch.is_grad_enabled():
        # Of one tensor in two places, or one made of another, each place has a gradient of its own. A view
        # is also rid of the transform that it was saved in, as by `torch.func.vjp`, if that is over.
        tensors = [tensor.view_as(tensor) for tensor in tensors]
        if any(tensor.requires_grad for tensor in tensors):
            return _differentiable_gradients(ctx.options, wanted, tensors, grad_losses)
    scales, _, _, *features = tensors
    grad_each = [grad_losses, *grad_losses.unbind(), *grad_losses.unbind()]
    return [
        (gradient * grad).to(value.dtype) if want else None
        for value, gradient, grad, want in zip((scales, *features), gradients, grad_each, wanted, strict=True)
    ]


def _differentiable_gradients(
    options: tuple, wanted: Sequence[bool], tensors: Sequence[Tensor], grad_losses: Tensor
) -> list[Tensor | None]:
    """The same through the plain formula: for a derivative of the gradients (`create_graph=True`)."""
    *form_options, _, _ = options
    scales, anchor_labels, key_labels, *features = tensors
    half = len(features) // 2
    form = LossForm(*form_options)
    with enable_inplace_requires_grad(True):  # what a transform that is over was to differentiate
        needed = [v.requires_grad_() for v, want in zip((scales, *features), wanted, strict=True) if want]
    with without_autocast(scales):
        losses = [
            reference.plain(form, scales[:, k], anchor_labels, key_labels, features[k], features[half + k])
            for k in range(half)
        ]
        gradients = iter(torch.autograd.grad(torch.stack(losses), needed, grad_losses, create_graph=True))
    return [next(gradients) if want else None for want in wanted]


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: tuple, *tensors: Tensor) -> Tensor:
        scales, anchor_labels, key_labels, *features = tensors
        losses, *gradients = _evaluate(scales, anchor_labels, key_labels, features, *options)
        _save(ctx, tensors, options, gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        grad_scales, *grad_features = _gradients(ctx, grad_losses)
        return None, grad_scales, None, None, *grad_features


class _TransformableNode(_Node):
    """The same in the form that torch.func asks for; a small call takes a fifth longer."""

    @staticmethod
    def forward(options: tuple, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        scales, anchor_labels, key_labels, *features = tensors
        return tuple(_evaluate(scales, anchor_labels, key_labels, features, *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        options, *tensors = inputs
        _save(ctx, tensors, options, output[1:])
        ctx.mark_non_differentiable(*output[1:])


# -------------------------------------------------------------------------------------------- registered op


_op = torch.library.custom_op("mim4dd::contrastive", _evaluate, mutates_args=())


@_op.register_fake
def _(
    scales: Tensor, anchor_labels: Tensor, key_labels: Tensor, features: Sequence[Tensor], *options: Any
) -> list[Tensor]:
    wanted = options[-1]
    half = len(features) // 2
    return [
        scales.new_empty(half),
        scales.new_empty(scales.shape if wanted[0] else 0),
        *(
            feature.new_empty(
                feature.shape if wanted[1 + index // half] else 0, dtype=saved_dtype(feature.dtype)
            )
            for index, feature in enumerate(features)
        ),
    ]


def _op_setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    scales, anchor_labels, key_labels, features, *options = inputs
    _save(ctx, (scales, anchor_labels, key_labels, *features), tuple(options), output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _op_backward(ctx: Any, grad_output: list[Tensor | None]) -> tuple:
    grad_scales, *grad_features = _gradients(ctx, grad_output[0])
    return grad_scales, None, None, grad_features, *[None] * len(ctx.options)


_op.register_autograd(_op_backward, setup_context=_op_setup_context)
