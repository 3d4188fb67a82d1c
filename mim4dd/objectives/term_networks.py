"""The add-on's own networks, briefly trained to tell classes apart, and the objective that uses them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from ..networks import Network, initialise
from ..networks.flat import flatten, load
from ..seeding import generator, generators
from ..stacked import Batch, Stack, augmented_batch
from ..state import State, counter, prefixed
from .base import Matched, Objective, Problem

COMPARED = 64  # real images per class that the add-on compares, at most

LR = 0.01
MOMENTUM = 0.9

REAL_NETWORKS = 10
REAL_STEPS = 100  # of the last network; the others take 1/10, 2/10, ... of them
REAL_BATCH = 128

STUDENT_EVERY = 20  # matches between one student and the next
STUDENT_EPOCHS = (100, 400)  # the least and the most of one; an evaluated network has about 300
STUDENT_BATCH = 256


class TermNetworks(ABC):
    """Networks whose features the add-on compares.

    Attributes:
        weights: of the K networks to choose from, float32 [K, all of one], always the same memory.
    """

    weights: Tensor

    @abstractmethod
    def renew(self, images: Tensor, targets: Tensor) -> None:
        """Provide networks for the synthetic images [n, C, H, W] and targets that come next, as constants."""

    def state(self) -> State:
        """Return the state that differs between two runs of the same problem."""
        return {}

    @torch.no_grad()
    def load_into(self, network: Network, choice: torch.Generator) -> None:
        """Give `network` the weights of one of them, drawn anew."""
        # Not an int: looking at it would wait for the device.
        chosen = torch.randint(len(self.weights), (1,), generator=choice, device=self.weights.device)
        load(network, self.weights.index_select(0, chosen)[0])


class TrainedOnReal(TermNetworks):
    """Ten networks, trained on the real images once.

    A few steps are enough: networks trained ten times as long helped no more.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._network = problem.network()
        self._finished = 0
        self.weights = flatten(self._network.parameters()).repeat(REAL_NETWORKS, 1)

    def train(self) -> Iterator[tuple[int, int]]:
        """Train the networks that are not trained yet, yielding (steps done, steps in all)."""
        network, count = self._network, len(self.problem.real)
        device = self.weights.device
        steps = [REAL_STEPS * (k + 1) // REAL_NETWORKS for k in range(REAL_NETWORKS)]
        for k in range(self._finished, REAL_NETWORKS):
            random = generator(self.problem.seed, f"mim/network/{k}", device)
            training = _Training(self.problem, network, random, self.problem.real.labelled)
            training.restart()
            for done in range(steps[k]):
                training.step(torch.randint(count, (1, REAL_BATCH), generator=random, device=device))
                yield sum(steps[:k]) + done + 1, sum(steps)
            self.weights[k] = training.stack.weights
            self._finished = k + 1

    def renew(self, images: Tensor, targets: Tensor) -> None:
        """Train what is not trained yet."""
        for _ in self.train():
            pass


class TrainedOnSynthetic(TermNetworks):
    """A student: one network, trained on the current synthetic images; every so often a new one.

    What it cannot tell apart among the real images is what the synthetic ones do not teach yet.
    """

    def __init__(self, problem: Problem) -> None:
        network, device = problem.network(), problem.real.images.device
        self._matches = counter()
        self._lengths = generator(problem.seed, "mim/student/steps")  # on the CPU: they say what to do
        self._random = generator(problem.seed, "mim/student", device)
        self._training = _Training(problem, network, self._random, augmented_batch)
        self.weights = self._training.stack.weights[None]

    def renew(self, images: Tensor, targets: Tensor) -> None:
        """Train a new student every `STUDENT_EVERY` calls, the first one included."""
        if int(self._matches) % STUDENT_EVERY == 0:
            least, most = STUDENT_EPOCHS
            self._training.restart()
            epochs = torch.randint(least, most + 1, (), generator=self._lengths, device="cpu")
            for _ in range(int(epochs)):
                for index in self._training.stack.epoch(len(images), STUDENT_BATCH):
                    self._training.step(index, images, targets)
        self._matches += 1

    def state(self) -> State:
        """The student, how many matches it served, and what the next one is drawn from."""
        return {
            "weights": self.weights,
            "matches": self._matches,
            "lengths": self._lengths,
            "random": self._random,
        }


class _Training:
    """Trains a network with SGD; over and over by the same step, which a GPU records once."""

    def __init__(self, problem: Problem, network: Network, random: torch.Generator, batch: Batch) -> None:
        self.network = network.train()
        self.random = random
        self.stack = Stack.of(network, random)
        self.optimizer = self.stack.sgd(LR, momentum=MOMENTUM)
        self.step = self.stack.step(self.optimizer, batch, problem.augmentation, problem.real.image_size)

    def restart(self) -> None:
        """Begin with new weights."""
        initialise(self.network, self.random)
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()


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
        purposes = "choice", "statistics", "real", "augmentation"
        self.random = generators(problem.seed, "mim", purposes, networks.weights.device)
        own = self.random.values()
        self.generators = None if base.generators is None else (*base.generators, *own)

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
        return {
            **prefixed("random", self.random),
            **prefixed("base", base),
            **prefixed("networks", self.networks.state()),
        }

    def match(self, images: Tensor, targets: Tensor) -> Matched:
        """Return the base method's loss for the images [n, C, H, W], and features of one of the networks."""
        problem = self.problem
        draws = self.random["real"], self.random["augmentation"]
        loss = self.base.match(images, targets).loss
        self.networks.load_into(self.network, self.random["choice"])
        problem.set_batch_norm_statistics(self.network, self.random["statistics"])
        return Matched(loss, *problem.siamese(self.network, images, compared(problem), *draws))


def compared(problem: Problem) -> int:
    """How many real images per class the add-on compares."""
    return min(problem.real_batch, COMPARED)
