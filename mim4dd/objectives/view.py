"""A base method, and the add-on looking through networks of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import augment
from ..networks import Network
from ..seeding import generator
from .base import Matched, Objective, Problem
from .own_networks import OwnNetworks
from .repeatable import Repeatable

REAL_BATCH = 64  # real images per class that the add-on compares, at most


def through(networks: OwnNetworks, base: Objective, problem: Problem) -> Objective:
    """Return a base method whose features for the add-on come from networks of the add-on's own.

    Every match looks through one of the networks, drawn anew, at real images of its own, augmented alike with
    the synthetic ones by class. The loss is that of the base method, which is left as it is.

    Args:
        networks: to look through.
        base: the base method.
        problem: with the layers of the add-on.
    """
    if isinstance(base, Repeatable):
        return _RepeatableThrough(networks, base, problem)
    return _Through(networks, base, problem)


class _Through(Objective):
    def __init__(self, networks: OwnNetworks, base: Objective, problem: Problem) -> None:
        self.networks, self.base, self.problem = networks, base, problem
        self.trained = base.trained
        self.network = problem.network()
        self.draws = tuple(
            generator(problem.seed, f"mim/{purpose}", networks.weights.device)
            for purpose in ("choice", "statistics", "augmentation", "real")
        )

    @property
    def network_lr(self) -> float | None:
        return self.base.network_lr

    def __call__(self, images: Tensor, targets: Tensor) -> Matched:
        self.networks.renew(images.detach(), targets.detach())
        return self.seen(self.base(images, targets).loss, images)

    def seen(self, loss: Tensor, images: Tensor) -> Matched:
        """Return the loss of the base method with features of one of the networks."""
        problem, real, weights = self.problem, self.problem.real, self.networks.weights
        choice, statistics, augmentation, draws = self.draws
        # Not an int: looking at it would wait for the device.
        chosen = torch.randint(len(weights), (1,), generator=choice, device=weights.device)
        _load(self.network, weights.index_select(0, chosen)[0])
        problem.settle(self.network, statistics)
        params = problem.class_augmentation(augmentation)
        index = real.sample(min(problem.real_batch, REAL_BATCH), draws).flatten()
        real_images = real.augmented(index, params, real.labels[index])
        return Matched(
            loss,
            problem.features(self.network, augment.apply(images, params, rows=problem.labels)),
            problem.real_features(self.network, real_images),
            *problem.pair_labels(index),
        )


class _RepeatableThrough(Repeatable, _Through):
    base: Repeatable

    def __init__(self, networks: OwnNetworks, base: Repeatable, problem: Problem) -> None:
        super().__init__(networks, base, problem)
        self.generators = (*base.generators, *self.draws)

    def prepare(self, images: Tensor, targets: Tensor) -> None:
        self.base.prepare(images, targets)
        self.networks.renew(images, targets)

    def match(self, images: Tensor, targets: Tensor) -> Matched:
        return self.seen(self.base.match(images, targets).loss, images)


@torch.no_grad()
def _load(network: Network, flat: Tensor) -> None:
    weights = [*network.parameters()]
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        weight.copy_(part.view(weight.shape))
