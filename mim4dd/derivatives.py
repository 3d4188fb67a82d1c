"""Backward passes without a derivative of their own: if asked for one, they raise an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Any, ...]]


def not_differentiable(remedy: str) -> Callable[[Backward], Backward]:
    """Decorate the backward of an `autograd.Function` that cannot be differentiated.

    torch's own `once_differentiable` looks at the upstream gradients alone: where these are constants, the
    part of the saved tensors is silently missing from the next derivative.

    Args:
        remedy: what to do instead, for the RuntimeError of the next derivative.
    """

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def closed(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            if not torch.is_grad_enabled():
                return gradients
            made = [gradient for gradient in gradients if gradient is not None]
            sources = [t for t in (*upstream, *ctx.saved_tensors) if t is not None and t.is_floating_point()]
            kept = iter(_NotDifferentiable.apply(remedy, len(made), *made, *sources))
            return tuple(None if gradient is None else next(kept) for gradient in gradients)

        return closed

    return decorate


class _NotDifferentiable(torch.autograd.Function):
    """(gradients, then what they were made of) -> the gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(remedy: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.remedy = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(f"mim4dd: there is no derivative of this order; {ctx.remedy}")
