"""The add-on's own networks: trained on the real images for a while, they tell its classes apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import augment
from ..networks import Network, initialise
from ..seeding import generator
from .base import Matched, Objective, Problem

NETWORKS = 10
STEPS = 100  # of the last network; the others take 1/10, 2/10, ... of them
BATCH = 128
LR = 0.01
MOMENTUM = 0.9
REAL_BATCH = 64  # real images per class that the add-on compares, at most


class TrainedFeatures(Objective):
    """A base method, whose features for the add-on come from networks trained on the real images.

    Every call looks through one of `NETWORKS` networks, drawn anew, at real images of its own, augmented
    alike with the synthetic ones by class. The loss is that of the base method, which is left as it is.

    Args:
        base: the base method.
        problem: with the layers of the add-on.
        weights: of the networks, see `trained_weights`.
    """

    def __init__(self, base: Objective, problem: Problem, weights: Tensor) -> None:
        self.base, self.problem, self.weights = base, problem, weights
        self.trained = base.trained
        self.network = problem.network()
        seed, device = problem.seed, problem.real.images.device
        self.choices, self.draws, self.augmentations, self.statistics = (
            generator(seed, f"mim/{purpose}", device)
            for purpose in ("choice", "real", "augmentation", "statistics")
        )

    @property
    def network_lr(self) -> float | None:
        """That of the base method."""
        return self.base.network_lr

    def __call__(self, images: Tensor, targets: Tensor) -> Matched:
        """Return the base method's loss, and the features of a trained network."""
        problem, real = self.problem, self.problem.real
        loss = self.base(images, targets).loss
        chosen = torch.randint(
            len(self.weights), (1,), generator=self.choices, device=self.weights.device
        )  # a tensor: looking at it would wait for the device
        _load(self.network, self.weights.index_select(0, chosen)[0])
        problem.settle(self.network, self.statistics)
        params = augment.sample(
            problem.augmentation, real.num_classes, real.image_size, generator=self.augmentations
        )
        index = real.sample(min(problem.real_batch, REAL_BATCH), self.draws).flatten()
        real_images = real.augmented(index, params, real.labels[index])
        return Matched(
            loss,
            problem.features(self.network, augment.apply(images, params, rows=problem.labels)),
            problem.real_features(self.network, real_images),
            *problem.pair_labels(index),
        )


def trained_weights(problem: Problem) -> Tensor:
    """Train `NETWORKS` networks on the real images and return their weights, float32 [NETWORKS, all of one].

    A few steps are enough: networks that were trained for longer were measured to help no more.
    """
    network, device = problem.network(), problem.real.images.device
    rows = []
    for k in range(NETWORKS):
        random = generator(problem.seed, f"mim/network/{k}", device)
        initialise(network, random)
        _train(network, problem, STEPS * (k + 1) // NETWORKS, random)
        rows.append(torch.cat([weight.detach().flatten() for weight in network.parameters()]))
    return torch.stack(rows)


def _train(network: Network, problem: Problem, steps: int, random: torch.Generator) -> None:
    real = problem.real
    network.train().requires_grad_()
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM)
    for _ in range(steps):
        index = torch.randint(len(real), (BATCH,), generator=random, device=random.device)
        params = augment.sample(problem.augmentation, BATCH, real.image_size, generator=random)
        loss = F.cross_entropy(network(real.augmented(index, params)), real.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.requires_grad_(False)


@torch.no_grad()
def _load(network: Network, flat: Tensor) -> None:
    weights = [*network.parameters()]
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        weight.copy_(part.view(weight.shape))
