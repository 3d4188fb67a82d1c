"""The add-on's own networks: trained on the real images for a moment, they tell its classes apart."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import augment
from ..augment import AugmentParams
from ..networks import Network, initialise
from ..seeding import generator
from ..stacked import Stack
from .base import Matched, Objective, Problem
from .repeatable import Repeatable

NETWORKS = 10
STEPS = 100  # of the last network; the others take 1/10, 2/10, ... of them
BATCH = 128
LR = 0.01
MOMENTUM = 0.9
REAL_BATCH = 64  # real images per class that the add-on compares, at most


def through_trained(base: Objective, problem: Problem, weights: Tensor) -> Objective:
    """Return a base method whose features for the add-on come from networks trained on the real images.

    Every match looks through one of the networks, drawn anew, at real images of its own, augmented alike with
    the synthetic ones by class. The loss is that of the base method, which is left as it is.

    Args:
        base: the base method.
        problem: with the layers of the add-on.
        weights: of the networks, see `TrainedNetworks`.
    """
    if isinstance(base, Repeatable):
        return _RepeatableTrained(base, problem, weights)
    return _Trained(base, problem, weights)


class _Trained(Objective):
    def __init__(self, base: Objective, problem: Problem, weights: Tensor) -> None:
        self.base, self.problem, self.weights = base, problem, weights
        self.trained = base.trained
        self.network = problem.network()
        self.draws = tuple(
            generator(problem.seed, f"mim/{purpose}", weights.device)
            for purpose in ("choice", "statistics", "augmentation", "real")
        )

    @property
    def network_lr(self) -> float | None:
        return self.base.network_lr

    def __call__(self, images: Tensor, targets: Tensor) -> Matched:
        return self.seen(self.base(images, targets).loss, images)

    def seen(self, loss: Tensor, images: Tensor) -> Matched:
        """Return the loss of the base method with features of a trained network."""
        problem, real = self.problem, self.problem.real
        choice, statistics, augmentation, draws = self.draws
        # Not an int: looking at it would wait for the device.
        chosen = torch.randint(len(self.weights), (1,), generator=choice, device=self.weights.device)
        _load(self.network, self.weights.index_select(0, chosen)[0])
        problem.settle(self.network, statistics)
        params = augment.sample(
            problem.augmentation, real.num_classes, real.image_size, generator=augmentation
        )
        index = real.sample(min(problem.real_batch, REAL_BATCH), draws).flatten()
        real_images = real.augmented(index, params, real.labels[index])
        return Matched(
            loss,
            problem.features(self.network, augment.apply(images, params, rows=problem.labels)),
            problem.real_features(self.network, real_images),
            *problem.pair_labels(index),
        )


class _RepeatableTrained(Repeatable, _Trained):
    base: Repeatable

    def __init__(self, base: Repeatable, problem: Problem, weights: Tensor) -> None:
        super().__init__(base, problem, weights)
        self.generators = (*base.generators, *self.draws)

    def prepare(self, images: Tensor, targets: Tensor) -> None:
        self.base.prepare(images, targets)

    def match(self, images: Tensor, targets: Tensor) -> Matched:
        return self.seen(self.base.match(images, targets).loss, images)


class TrainedNetworks:
    """Networks trained on the real images of a problem, `NETWORKS` of them.

    A few steps are enough: networks trained ten times as long helped no more.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._finished: list[Tensor] = []

    @property
    def weights(self) -> Tensor:
        """Their weights, float32 [NETWORKS, all of one]; trains what is not trained yet."""
        for _ in self.train():
            pass
        return torch.stack(self._finished)

    def train(self) -> Iterator[tuple[int, int]]:
        """Train the networks that are not trained yet, yielding (steps done, steps in all)."""
        network, device = self.problem.network(), self.problem.real.images.device
        steps = [STEPS * (k + 1) // NETWORKS for k in range(NETWORKS)]
        for k in range(len(self._finished), NETWORKS):
            random = generator(self.problem.seed, f"mim/network/{k}", device)
            initialise(network, random)
            for done in _train(network, self.problem, steps[k], random):
                yield sum(steps[:k]) + done, sum(steps)
            self._finished.append(torch.cat([weight.detach().flatten() for weight in network.parameters()]))


def _train(network: Network, problem: Problem, steps: int, random: torch.Generator) -> Iterator[int]:
    real = problem.real

    def batch(index: Tensor, params: AugmentParams) -> tuple[Tensor, Tensor]:
        return real.augmented(index, params), real.labels[index]

    stack = Stack.of(network.train(), random)
    optimizer = torch.optim.SGD(stack.weights.values(), lr=LR, momentum=MOMENTUM)
    step = stack.step(optimizer, batch, problem.augmentation, real.image_size)
    for done in range(1, steps + 1):
        step(torch.randint(len(real), (1, BATCH), generator=random, device=random.device))
        yield done


@torch.no_grad()
def _load(network: Network, flat: Tensor) -> None:
    weights = [*network.parameters()]
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        weight.copy_(part.view(weight.shape))
