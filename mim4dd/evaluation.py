"""The evaluation protocol.

A network is trained from scratch on the images alone and tested once, after the last epoch, on images that
took no part in distilling; a validation split counted only in the mean and deviation of all pixels.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import augment, networks, stacked
from .augment import AugmentParams
from .config import Config, settled
from .data import ImageSet
from .networks import Network
from .networks.memory import chunk_size
from .seeding import generator
from .stacked import Batch, Stack, set_lr

OnNetwork = Callable[[float], None]


@dataclass(frozen=True)
class Protocol:
    """How a network is trained on a synthetic set (DSA's protocol except for an epoch, see docs/runs.md).

    Attributes:
        epochs: the learning rate falls to a tenth after half of them.
        augmentation: strategy string, one part drawn per step and parameters per image; see `augment.sample`.
        architecture: see `mim4dd.networks.ARCHITECTURES`.
        width: of the ConvNet's blocks.
        lr: of SGD.
        momentum: of SGD.
        weight_decay: of SGD.
        batch: images per step.
        precision: what the networks compute in, see `mim4dd.networks.create`.
    """

    epochs: int
    augmentation: str
    architecture: str = "convnet"
    width: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 256
    precision: str = "fp32"

    @classmethod
    def of(cls, config: Config, architecture: str | None = None, lr: float | None = None) -> Protocol:
        """Return the protocol of a run, from its settings.

        Args:
            config: with defaults filled in.
            architecture: another one than the run's.
            lr: the learning rate that a set was distilled with; default: the usual one.
        """
        return cls(
            epochs=settled(config.eval.eval_epochs),
            augmentation=settled(config.distill.augmentation),
            architecture=architecture or config.distill.network,
            width=settled(config.distill.width),
            lr=lr or cls.lr,
            precision=config.precision,
        )


@dataclass(frozen=True)
class Score:
    """Test accuracies of several networks or runs, each from 0 to 1."""

    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Sample standard deviation, if there are two."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def percent(self, digits: int) -> str:
        """Return the mean, and the deviation if there is one, in percent, to so many digits."""
        numbers = [self.mean] if self.std is None else [self.mean, self.std]
        return " ± ".join(f"{100 * number:.{digits}f}" for number in numbers)

    def __str__(self) -> str:
        return f"{self.percent(1)} %"


def evaluate(
    training_set: Callable[[int], tuple[Tensor, Tensor]],
    test: ImageSet,
    protocol: Protocol,
    *,
    num_networks: int,
    seed: int,
    on_network: OnNetwork = lambda _: None,
) -> Score:
    """Train `num_networks` networks and test each once.

    Args:
        training_set: for network k, images float32 [n, C, H, W] and their targets: labels int64 [n], or
            probabilities float32 [n, num_classes]. The same n for all of them.
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
        precision=protocol.precision,
    )
    image = (test.channels, *test.image_size)
    together = stacked.stack_size(network, image, protocol.batch, device)
    accuracies = []
    for first in range(0, num_networks, together):
        group = range(num_networks)[first : first + together]
        stack = Stack.initialised(network, [generator(seed, f"evaluation/{k}", device) for k in group])
        train(stack, [training_set(k) for k in group], protocol)
        for trained in stack.unstack():
            accuracies.append(accuracy(trained, test))
            on_network(accuracies[-1])
    return Score(tuple(accuracies))


def train_on_real(network: Network, real: ImageSet, protocol: Protocol, generator: torch.Generator) -> None:
    """Train `network` in place, from scratch, on all real images, which stay stored as bytes."""
    networks.initialise(network, generator)
    _train(Stack.of(network, generator), real.labelled, len(real), real.image_size, protocol)


def train(stack: Stack, sets: Sequence[tuple[Tensor, Tensor]], protocol: Protocol) -> None:
    """Train each network of a stack on its own images [n, C, H, W] and targets [n, ...]."""
    images, targets = (_of_each(parts) for parts in zip(*sets, strict=True))
    network = torch.arange(len(sets), device=images.device)[:, None]

    def batch(index: Tensor, params: AugmentParams) -> tuple[Tensor, Tensor]:
        chosen = augment.apply(images[network, index].flatten(0, 1), params)
        return chosen.unflatten(0, index.shape), targets[network, index]

    _, count, _, height, width = images.shape
    _train(stack, batch, count, (height, width), protocol)


def _of_each(tensors: Sequence[Tensor]) -> Tensor:
    """Stack them, as a view if they are all the same."""
    first, *others = tensors
    if all(other is first for other in others):
        return first.expand(len(tensors), *first.shape)
    return torch.stack([*tensors])


def _train(stack: Stack, batch: Batch, count: int, size: tuple[int, int], protocol: Protocol) -> None:
    """Train a stack on batches of `count` images, every epoch in a new order."""
    stack.network.train()
    optimizer = stack.sgd(protocol.lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay)
    step = stack.step(optimizer, batch, protocol.augmentation, size)
    for epoch in range(protocol.epochs):
        if epoch == protocol.epochs // 2 + 1:
            set_lr(optimizer, protocol.lr / 10)
        for index in stack.epoch(count, protocol.batch):
            step(index)


@torch.no_grad()
def accuracy(network: Network, test: ImageSet) -> float:
    """Return the share of `test` that `network` classifies rightly."""
    network.eval()
    device = test.images.device
    right = torch.zeros((), device=device)
    for index in torch.arange(len(test), device=device).split(chunk_size(network, test.images)):
        right += (network(test.batch(index)).argmax(1) == test.labels[index]).sum()
    return right.item() / len(test)
