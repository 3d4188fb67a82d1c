"""The weights of a network as one vector: one copy, update or sum takes the place of one for each weight.

Those of a convolution lie with the channels last, as everything that convolves wants them.
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
    named = dict(network.named_parameters())
    parts = flat.split([weight.numel() for weight in named.values()])
    return {name: _shaped(part, named[name].shape) for name, part in zip(named, parts, strict=True)}


def _shaped(part: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) != 4:
        return part.view(shape)
    outputs, inputs, *window = shape
    return part.view(outputs, *window, inputs).permute(0, 3, 1, 2)


@torch.no_grad()
def load(network: nn.Module, flat: Tensor) -> None:
    """Give the network these weights, in place."""
    for weight, value in zip(network.parameters(), unflatten(flat, network).values(), strict=True):
        weight.copy_(value)
