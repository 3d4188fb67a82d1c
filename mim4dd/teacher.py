"""Soft labels: the answers of a network trained on the real images."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .data import ImageSet
from .evaluation import Protocol, train_on_real
from .networks import Network
from .networks.memory import chunk_size

STEPS = 500  # at least an epoch: a teacher need not be perfect to tell which classes are alike


def teach(network: Network, real: ImageSet, protocol: Protocol, generator: torch.Generator) -> None:
    """Train `network` in place, from scratch, on the real images: `protocol`, but about `STEPS` steps."""
    epochs = max(1, STEPS // math.ceil(len(real) / protocol.batch))
    train_on_real(network, real, dataclasses.replace(protocol, epochs=epochs), generator)


@torch.no_grad()
def probabilities(network: Network, images: Tensor) -> Tensor:
    """Return the class probabilities float32 [n, num_classes] that `network` gives images [n, C, H, W]."""
    network.eval()
    return torch.cat([network(chunk).softmax(1) for chunk in images.split(chunk_size(network, images))])
