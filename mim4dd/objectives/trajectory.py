"""Trajectory matching (MTT, CVPR 2022): training on either set ends at the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

Weights = dict[str, Tensor]


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
        labels: int64 [n].
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
    if memory not in ("constant", "unrolled"):
        raise ValueError(
            f"mim4dd.trajectory_distance: memory is {memory!r}, expected 'constant' or 'unrolled'"
        )
    step = torch.as_tensor(step_size, dtype=images.dtype, device=images.device)
    start = {name: value.detach() for name, value in start.items()}
    if memory == "constant":
        end = dict(zip(start, _Trajectory.apply(network, start, labels, steps, images, step), strict=True))
    else:
        end = start
        for _ in range(steps):
            gradient = _gradient(network, end, images, labels, create_graph=True)
            end = {name: value - step * gradient[name] for name, value in end.items()}
    return _squared_distance(end, target) / _squared_distance(start, target)


class _Trajectory(torch.autograd.Function):
    """(images, step size) -> the weights after the last step."""

    @staticmethod
    def forward(
        ctx: Any,
        network: nn.Module,
        start: Weights,
        labels: Tensor,
        steps: int,
        images: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, ...]:
        path = [start]
        for _ in range(steps):
            gradient = _gradient(network, path[-1], images.detach(), labels)
            path.append({name: value - step * gradient[name] for name, value in path[-1].items()})
        ctx.network, ctx.labels, ctx.path = network, labels, path[:-1]
        ctx.save_for_backward(images, step)
        # A new tensor even after no step at all: an output must not be an input.
        return tuple(value.clone() for value in path[-1].values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Any, ...]:
        images, step = ctx.saved_tensors
        grad_images, grad_step = torch.zeros_like(images), torch.zeros_like(step)
        for weights in reversed(ctx.path):
            # One step is w' = w - step * g(w, images). With a the gradient with respect to w', the product
            # <a, g> holds all of its derivatives: by w the Hessian's part, by the images, and by the step.
            with torch.enable_grad():
                leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
                x = images.detach().requires_grad_()
                gradient = _gradient(ctx.network, leaves, x, ctx.labels, create_graph=True)
                product = sum((a * g).sum() for a, g in zip(adjoints, gradient.values(), strict=True))
                assert isinstance(product, Tensor)
                *by_weights, by_images = torch.autograd.grad(product, [*leaves.values(), x])
            grad_step -= product.detach()
            grad_images -= step * by_images
            adjoints = tuple(a - step * h for a, h in zip(adjoints, by_weights, strict=True))
        return None, None, None, None, grad_images, grad_step


def _gradient(
    network: nn.Module, weights: Weights, images: Tensor, labels: Tensor, *, create_graph: bool = False
) -> Weights:
    """Gradient of the cross entropy with respect to the weights."""
    with torch.enable_grad():
        leaves = {n: (v if create_graph else v.detach()).requires_grad_() for n, v in weights.items()}
        loss = F.cross_entropy(functional_call(network, leaves, (images,)), labels)
        gradient = torch.autograd.grad(loss, [*leaves.values()], create_graph=create_graph)
    return dict(zip(leaves, gradient, strict=True))


def _squared_distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(a[name] - b[name].detach()).square().sum() for name in a]).sum()
