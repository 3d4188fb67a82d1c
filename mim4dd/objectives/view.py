"""A base method, and the add-on looking through networks of its own."""

from __future__ import annotations

from torch import Tensor

from ..lasting import Lasting, within
from ..seeding import generator
from .base import Matched, Objective, Problem
from .own_networks import OwnNetworks

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
        self.generators = None if base.generators is None else (*base.generators, *self.draws)

    @property
    def network_lr(self) -> float | None:
        return self.base.network_lr

    def prepare(self, images: Tensor, targets: Tensor) -> None:
        self.base.prepare(images, targets)
        self.networks.renew(images, targets)

    def lasting(self) -> Lasting | None:
        base = self.base.lasting()
        if base is None:
            return None
        own: Lasting = {f"draw {k}": draw for k, draw in enumerate(self.draws)}
        return own | within("base", base) | within("networks", self.networks.lasting())

    def match(self, images: Tensor, targets: Tensor) -> Matched:
        problem = self.problem
        choice, statistics, augmentations, draws = self.draws
        loss = self.base.match(images, targets).loss
        self.networks.load_into(self.network, choice)
        problem.settle(self.network, statistics)
        per_class = min(problem.real_batch, REAL_BATCH)
        return Matched(loss, *problem.siamese(self.network, images, per_class, draws, augmentations))
