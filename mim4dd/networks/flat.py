"""The weights of a network as one vector: one copy, update or sum takes the place of one for each weight.

The weight of a convolution has its channels last, as the convolutions want it. The vector of several networks
holds the first weight of all of them, then the second of all, and so on, so that each is one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def flatten(weights: Iterable[Tensor]) -> Tensor:
    """Return a copy of the weights, one after the other, as constants."""
    return torch.cat([(w.permute(0, 2, 3, 1) if w.ndim == 4 else w).detach().flatten() for w in weights])


def unflatten(flat: Tensor, network: nn.Module) -> dict[str, Tensor]:
    """Return the weights by name, of the network's shapes and in its order, as views of the vector."""
    return {name: weight.squeeze(0) for name, weight in unflatten_all(flat, network, 1).items()}


def unflatten_all(flat: Tensor, network: nn.Module, count: int) -> dict[str, Tensor]:
    """Return the same for several networks: every weight is [count, ...]."""
    parts = flat.split([count * size for size in _sizes(network)])
    named = network.named_parameters()
    return {name: _shaped(part, (count, *w.shape)) for part, (name, w) in zip(parts, named, strict=True)}


def stack(rows: Iterable[Tensor], network: nn.Module) -> Tensor:
    """Return one vector made of the vectors of several networks."""
    return torch.cat([part.flatten() for part in torch.stack([*rows]).split(_sizes(network), 1)])


def unstack(flat: Tensor, network: nn.Module, count: int) -> Tensor:
    """Return the vectors of several networks as rows [count, weights of one], a copy."""
    parts = flat.split([count * size for size in _sizes(network)])
    return torch.cat([part.view(count, -1) for part in parts], 1)


@torch.no_grad()
def load(network: nn.Module, flat: Tensor) -> None:
    """Give the network these weights, in place."""
    for weight, value in zip(network.parameters(), unflatten(flat, network).values(), strict=True):
        weight.copy_(value)


def _sizes(network: nn.Module) -> list[int]:
    return [weight.numel() for weight in network.parameters()]


def _shaped(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(shape) != 5:
        return part.view(shape)
    count, outputs, inputs, *window = shape
    return part.view(count, outputs, *window, inputs).movedim(-1, 2)
