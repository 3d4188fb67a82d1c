"""Training on the synthetic images, differentiable in them with the graphs of as few steps as wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from ..derivatives import not_differentiable
from ..networks.flat import unflatten

# Takes the images and targets of one step from all of them, differentiably.
Batch = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def follow(
    network: nn.Module,
    start: Tensor,
    batches: Sequence[Batch],
    images: Tensor,
    targets: Tensor,
    step: Tensor,
    *,
    kept: int = 0,
) -> Tensor:
    """Return the weights after a step on every batch, differentiable once in images, targets and step.

    Weights are one vector, see `mim4dd.networks.flat`.

    Args:
        network: of the weights; its own are not used.
        start: weights before the first step.
        batches: take what a step is on from all images and targets.
        images: float [n, C, H, W].
        targets: int64 [n], or probabilities [n, num_classes].
        step: size of the steps, a 0-d tensor.
        kept: steps whose graphs are kept for the gradient, at most; those of the others are made again.
    """
    return _Trajectory.apply(network, start, batches, images, targets, step, kept)


class _Trajectory(torch.autograd.Function):
    """(images, targets, step size) -> the weights after a step on every batch."""

    @staticmethod
    def forward(
        ctx: Any,
        network: nn.Module,
        start: Tensor,
        batches: Sequence[Batch],
        images: Tensor,
        targets: Tensor,
        step: Tensor,
        kept: int,
    ) -> Tensor:
        if not any(ctx.needs_input_grad):
            kept = 0
        path, graphs = [start], []
        data = images.detach().requires_grad_(), targets.detach().requires_grad_(targets.is_floating_point())
        for k, batch in enumerate(batches):
            if k < len(batches) - kept:
                gradient = loss_gradient(network, path[-1], *batch(images.detach(), targets.detach()))
            else:
                graphs.append(_graph(network, path[-1], batch, data))
                gradient = graphs[-1][1].detach()
            path.append(path[-1] - step * gradient)
        ctx.network, ctx.batches, ctx.path = network, batches, path[:-1]
        ctx.data, ctx.graphs = data, graphs
        ctx.save_for_backward(images, targets, step)
        return path[-1].clone()  # a new tensor even after no step at all: an output must not be an input

    @staticmethod
    @not_differentiable("a trajectory in constant memory is differentiable once: use memory='unrolled'")
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Any, ...]:
        _, _, step = ctx.saved_tensors
        data = ctx.data
        learned = [tensor for tensor in data if tensor.requires_grad]
        grads = [torch.zeros_like(tensor) for tensor in learned]
        grad_step = torch.zeros_like(step)
        for start, batch in zip(reversed(ctx.path), reversed(ctx.batches), strict=True):
            # One step is w' = w - step * g(w, data). With a the gradient with respect to w', the product
            # <a, g> holds all of its derivatives: by w the Hessian's part, by the data, and by the step.
            weights, gradient = ctx.graphs.pop() if ctx.graphs else _graph(ctx.network, start, batch, data)
            grad_weights, *grad_data = torch.autograd.grad(gradient, [weights, *learned], adjoint)
            grad_step -= (adjoint * gradient.detach()).sum()
            for total, part in zip(grads, grad_data, strict=True):
                total -= step * part
            adjoint = adjoint - step * grad_weights
        return None, None, None, grads[0], grads[1] if len(grads) > 1 else None, grad_step, None


def _graph(
    network: nn.Module, weights: Tensor, batch: Batch, data: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the weights as a leaf, and the gradient of a step as a function of them and of the data."""
    weights = weights.detach().requires_grad_()
    with torch.enable_grad():
        return weights, loss_gradient(network, weights, *batch(*data))


def loss_gradient(network: nn.Module, weights: Tensor, images: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of the cross entropy by the weights, as one vector, differentiable in all three."""

    def loss(weights: Tensor) -> Tensor:
        # Batch normalisation writes its statistics: into copies, for they are as little used as the weights.
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        logits = functional_call(network, buffers | unflatten(weights, network), (images,))
        return F.cross_entropy(logits, targets)

    # Not by torch.autograd.grad, which has the first layer work out the gradient by the images as well.
    return grad(loss)(weights)
