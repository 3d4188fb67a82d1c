"""Training on the synthetic images, differentiable in them with the memory of a single step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from ..experts import Weights

# Takes the images and targets of one step from all of them, differentiably.
Batch = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def trajectory_distance(
    network: nn.Module,
    start: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    step_size: float | Tensor,
    memory: str = "constant",
) -> Tensor:
    """Return ‖end - target‖² / ‖start - target‖², end being `start` after SGD on all the images, a scalar.

    Differentiable in `images` and `step_size`, once, or with `memory="unrolled"` any number of times.

    Args:
        network: its parameters' names are the keys of `start`; its own values are not used.
        start: weights before the first step.
        target: weights to arrive at.
        images: float [n, C, H, W].
        labels: int64 [n], or probabilities [n, num_classes], which get their gradient.
        steps: number of full-batch steps on the cross entropy.
        step_size: their size; a 0-d tensor gets its gradient.
        memory: "unrolled" keeps the graph of every step; "constant" keeps the weights of every step and the
            graph of one, and computes the same gradient, cross-step terms included (as TESLA, ICML 2023, but
            exact): the steps are taken back one by one, each recomputed from its stored weights.

    Raises:
        ValueError: weights that do not fit the network, or an unknown kind of memory.
    """
    names = {name for name, _ in network.named_parameters()}
    for argument, weights in (("start", start), ("target", target)):
        if weights.keys() != names:
            odd = min(weights.keys() ^ names)
            raise ValueError(
                f"mim4dd.trajectory_distance: {argument} does not fit the network, see weight {odd!r}"
            )
        if any(weights[name].shape != value.shape for name, value in network.named_parameters()):
            raise ValueError(
                f"mim4dd.trajectory_distance: {argument} has weights of other shapes than the network"
            )
    if steps < 0:
        raise ValueError(f"mim4dd.trajectory_distance: steps is {steps}, expected at least 0")
    if memory not in ("constant", "unrolled"):
        raise ValueError(
            f"mim4dd.trajectory_distance: memory is {memory!r}, expected 'constant' or 'unrolled'"
        )
    if isinstance(step_size, Tensor):
        step = step_size.to(images.device, images.dtype)
    else:  # filled in there, not copied from the host, so that a CUDA graph can hold it
        step = torch.full((), step_size, dtype=images.dtype, device=images.device)
    start = {name: value.detach() for name, value in start.items()}
    batches: list[Batch] = [lambda images, targets: (images, targets)] * steps
    if memory == "constant":
        end = follow(network, start, batches, images, labels, step)
    else:
        end = start
        for _ in range(steps):
            gradient = _gradient(network, end, images, labels, create_graph=True)
            end = {name: value - step * gradient[name] for name, value in end.items()}
    return squared_distance(end, target) / squared_distance(start, target)


def follow(
    network: nn.Module,
    start: Weights,
    batches: Sequence[Batch],
    images: Tensor,
    targets: Tensor,
    step: Tensor,
) -> Weights:
    """Return the weights after a step on every batch, differentiable once in images, targets and step.

    Args:
        network: its parameters' names are the keys of `start`; its own values are not used.
        start: weights before the first step.
        batches: take what a step is on from all images and targets.
        images: float [n, C, H, W].
        targets: int64 [n], or probabilities [n, num_classes].
        step: size of the steps, a 0-d tensor.
    """
    end = _Trajectory.apply(network, start, batches, images, targets, step)
    return dict(zip(start, end, strict=True))


class _Trajectory(torch.autograd.Function):
    """(images, targets, step size) -> the weights after a step on every batch."""

    @staticmethod
    def forward(
        ctx: Any,
        network: nn.Module,
        start: Weights,
        batches: Sequence[Batch],
        images: Tensor,
        targets: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, ...]:
        path = [start]
        for batch in batches:
            gradient = _gradient(network, path[-1], *batch(images.detach(), targets.detach()))
            path.append({name: value - step * gradient[name] for name, value in path[-1].items()})
        ctx.network, ctx.batches, ctx.path = network, batches, path[:-1]
        ctx.save_for_backward(images, targets, step)
        # A new tensor even after no step at all: an output must not be an input.
        return tuple(value.clone() for value in path[-1].values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Any, ...]:
        images, targets, step = ctx.saved_tensors
        soft = targets.is_floating_point()
        data = [images.detach().requires_grad_(), targets.detach().requires_grad_(soft)]
        learned = data if soft else data[:1]
        grads = [torch.zeros_like(tensor) for tensor in learned]
        grad_step = torch.zeros_like(step)
        for weights, batch in zip(reversed(ctx.path), reversed(ctx.batches), strict=True):
            # One step is w' = w - step * g(w, data). With a the gradient with respect to w', the product
            # <a, g> holds all of its derivatives: by w the Hessian's part, by the data, and by the step.
            with torch.enable_grad():
                leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
                gradient = _gradient(ctx.network, leaves, *batch(*data), create_graph=True)
                product = sum((a * g).sum() for a, g in zip(adjoints, gradient.values(), strict=True))
                assert isinstance(product, Tensor)
                by_all = torch.autograd.grad(product, [*leaves.values(), *learned])
            by_weights, by_data = by_all[: len(leaves)], by_all[len(leaves) :]
            grad_step -= product.detach()
            for total, by in zip(grads, by_data, strict=True):
                total -= step * by
            adjoints = tuple(a - step * h for a, h in zip(adjoints, by_weights, strict=True))
        return None, None, None, grads[0], grads[1] if soft else None, grad_step


def _gradient(
    network: nn.Module, weights: Weights, images: Tensor, targets: Tensor, *, create_graph: bool = False
) -> Weights:
    """Gradient of the cross entropy with respect to the weights."""
    with torch.enable_grad():
        leaves = {n: (v if create_graph else v.detach()).requires_grad_() for n, v in weights.items()}
        loss = F.cross_entropy(functional_call(network, leaves, (images,)), targets)
        gradient = torch.autograd.grad(loss, [*leaves.values()], create_graph=create_graph)
    return dict(zip(leaves, gradient, strict=True))


def squared_distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Return ‖a - b‖² over all weights, a scalar; differentiable in `a`."""
    return torch.stack([(a[name] - b[name].detach()).square().sum() for name in a]).sum()
