"""A base method whose add-on compares features of networks of its own."""

from __future__ import annotations

from torch import Tensor

from ..seeding import generator
from ..state import State, prefixed
from .base import Matched, Objective, Problem
from .term_networks import TermNetworks

COMPARED = 64  # real images per class that the add-on compares, at most


class ThroughTermNetworks(Objective):
    """A base method whose features for the add-on come from networks of the add-on's own.

    Every match draws one of the networks and real images of its own, augmented alike with the synthetic ones
    by class. The loss is that of the base method, unchanged.

    Args:
        networks: those of the add-on.
        base: the base method.
        problem: with the layers of the add-on.
    """

    def __init__(self, networks: TermNetworks, base: Objective, problem: Problem) -> None:
        self.networks, self.base, self.problem = networks, base, problem
        self.remedy, self.trained = base.remedy, base.trained
        self.network = problem.network()
        self.draws = tuple(
            generator(problem.seed, f"mim/{purpose}", networks.weights.device)
            for purpose in ("choice", "statistics", "augmentation", "real")
        )
        self.generators = None if base.generators is None else (*base.generators, *self.draws)

    @property
    def network_lr(self) -> float | None:
        """That of the base method."""
        return self.base.network_lr

    def prepare(self, images: Tensor, targets: Tensor) -> None:
        """Prepare the base method and the networks."""
        self.base.prepare(images, targets)
        self.networks.renew(images, targets)

    def state(self) -> State | None:
        """The base method's, that of the networks, and what is drawn from; None if the base has none."""
        base = self.base.state()
        if base is None:
            return None
        own: State = {f"draw {k}": draw for k, draw in enumerate(self.draws)}
        return own | prefixed("base", base) | prefixed("networks", self.networks.state())

    def match(self, images: Tensor, targets: Tensor) -> Matched:
        """Return the base method's loss for the images [n, C, H, W], and features of one of the networks."""
        problem = self.problem
        choice, statistics, augmentations, draws = self.draws
        loss = self.base.match(images, targets).loss
        self.networks.load_into(self.network, choice)
        problem.set_batch_norm_statistics(self.network, statistics)
        return Matched(loss, *problem.siamese(self.network, images, compared(problem), draws, augmentations))


def compared(problem: Problem) -> int:
    """How many real images per class the add-on compares."""
    return min(problem.real_batch, COMPARED)
