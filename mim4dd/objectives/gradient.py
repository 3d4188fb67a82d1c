"""Gradient matching (DC, ICLR 2021; DSA, ICML 2021): equal gradients on real and synthetic images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-6  # added to a product of norms, as published


def gradient_distance(
    synthetic_grads: Sequence[Tensor], real_grads: Sequence[Tensor], metric: str = "rowwise"
) -> Tensor:
    """Return the distance between two sets of gradients, a scalar; the real ones are taken as constants.

    Args:
        synthetic_grads: one tensor per parameter, in the same order as `real_grads`.
        real_grads: likewise, of the same shapes.
        metric: "rowwise" sums 1 - cosine over the rows of every tensor with two or more dimensions, a row
            being an output channel; "mse" sums the squared differences of all numbers; "cosine" is 1 - the
            cosine of all numbers as one vector.

    Raises:
        ValueError: the two sets do not match, or an unknown metric.
    """
    shapes = [[tuple(g.shape) for g in grads] for grads in (synthetic_grads, real_grads)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"mim4dd.gradient_distance: synthetic_grads have shapes {shapes[0]} and real_grads {shapes[1]}"
        )
    if metric not in ("rowwise", "mse", "cosine"):
        raise ValueError(
            f"mim4dd.gradient_distance: metric is {metric!r}, expected 'rowwise', 'mse' or 'cosine'"
        )
    if metric == "rowwise":
        pairs = [
            (s.flatten(1), r.detach().flatten(1))
            for s, r in zip(synthetic_grads, real_grads, strict=True)
            if s.ndim > 1
        ]
        return _sum([(1 - _cosine(s, r)).sum() for s, r in pairs])
    synthetic, real = (torch.cat([g.flatten() for g in grads]) for grads in (synthetic_grads, real_grads))
    if metric == "mse":
        return (synthetic - real.detach()).square().sum()
    return 1 - _cosine(synthetic, real.detach())


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + EPSILON)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack([*terms]).sum() if terms else torch.zeros(())
