"""The evaluation protocol, and `python -m mim4dd.evaluate` that scores a saved set by it.

A network is trained from nothing on the images alone and tested once, after the last epoch, on images that
took no part in anything before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import augment, networks
from .data import ImageSet
from .networks import Network
from .seeding import generator

TEST_CHUNK = {"cpu": 32}  # as in the objectives: what keeps a map in the cache
TEST_CHUNK_ELSEWHERE = 1024


@dataclass(frozen=True)
class Protocol:
    """How a network is trained on a synthetic set (DSA's protocol).

    Attributes:
        epochs: the learning rate falls to a tenth after half of them.
        augmentation: strategy string, one part drawn per step and parameters per image; see `augment.sample`.
        architecture: see `mim4dd.networks.ARCHITECTURES`.
        width: of the ConvNet's blocks.
        lr: of SGD.
        momentum: of SGD.
        weight_decay: of SGD.
        batch: images per step.
    """

    epochs: int
    augmentation: str
    architecture: str = "convnet"
    width: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 256


@dataclass(frozen=True)
class Score:
    """Test accuracies of several networks, each from 0 to 1."""

    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Sample standard deviation over the networks; 0 for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def evaluate(
    training_set: Callable[[int], tuple[Tensor, Tensor]],
    test: ImageSet,
    protocol: Protocol,
    *,
    num_networks: int,
    seed: int,
    on_network: Callable[[float], None] = lambda _: None,
) -> Score:
    """Train `num_networks` networks and test each once.

    Args:
        training_set: the images float32 [n, C, H, W] and labels int64 [n] for network k.
        test: on the device of the run.
        protocol: how to train.
        num_networks: how many.
        seed: of the weights, batches and augmentations; network k is the same for every training set.
        on_network: called with each accuracy.
    """
    device = test.images.device
    network = networks.create(
        protocol.architecture,
        test.channels,
        test.num_classes,
        test.image_size,
        width=protocol.width,
        device=device,
    )
    accuracies = []
    for k in range(num_networks):
        random = generator(seed, f"evaluation/{k}", device)
        networks.initialise(network, random)
        train(network, *training_set(k), protocol, random)
        accuracies.append(accuracy(network, test))
        on_network(accuracies[-1])
    return Score(tuple(accuracies))


def train(
    network: Network, images: Tensor, labels: Tensor, protocol: Protocol, generator: torch.Generator
) -> None:
    """Train `network` in place on images [n, C, H, W] and labels [n], every epoch in a new order."""
    network.train()
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=protocol.lr,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [protocol.epochs // 2 + 1])
    size = (images.shape[2], images.shape[3])
    for _ in range(protocol.epochs):
        order = torch.randperm(len(images), generator=generator, device=images.device)
        for index in order.split(protocol.batch):
            params = augment.sample(protocol.augmentation, len(index), size, generator=generator)
            loss = F.cross_entropy(network(augment.apply(images[index], params)), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(network: Network, test: ImageSet) -> float:
    """Return the share of `test` that `network` classifies rightly."""
    network.eval()
    device = test.images.device
    chunk = TEST_CHUNK.get(device.type, TEST_CHUNK_ELSEWHERE)
    right = torch.zeros((), device=device)
    for index in torch.arange(len(test), device=device).split(chunk):
        right += (network(test.batch(index)).argmax(1) == test.labels[index]).sum()
    return right.item() / len(test)
