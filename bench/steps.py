"""The steps of the loop, ours and the textbook's (baselines.py), on one problem: what test_loop.py compares.

IPC 10, 256 real images a class, images of MNIST's shape with random pixels, width 128, 10 classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench import baselines, problems
from mim4dd import augment, graph, networks
from mim4dd.data import ImageSet
from mim4dd.distill import Distillation
from mim4dd.evaluation import Protocol, evaluate
from mim4dd.networks import memory
from mim4dd.networks.flat import flatten
from mim4dd.objectives import METHODS, GradientMatching, Problem
from mim4dd.objectives.student import Batch, follow
from mim4dd.objectives.trajectory import squared_distance
from mim4dd.seeding import generator

IPC, REAL_BATCH, WIDTH = 10, 256, 128
NETWORKS, TEST = 5, 1000
EPOCHS = {"cpu": 4, "cuda": 1000}  # the published ones, where that takes seconds
STEPS, STEP_SIZE = 20, 0.01


def problem(real: ImageSet, strategy: str, name: str) -> Problem:
    computing = "fp32" if name == "textbook" else name.split()[0]
    return problems.problem(
        real,
        IPC,
        width=WIDTH,
        real_batch=REAL_BATCH,
        augmentation=strategy,
        precision=computing,
        memory=memory.budget(None, real.images.device),
    )


def setting(of: Problem, images: Tensor, weights=None) -> baselines.Setting:
    """The same problem for the textbook loops."""
    real = of.real
    parts = [] if of.augmentation == "none" else of.augmentation.split("_")
    return baselines.Setting(
        real=real.batch(torch.arange(len(real), device=real.images.device)),
        classes=[(real.labels == c).nonzero().flatten() for c in range(real.num_classes)],
        images=images.clone().requires_grad_(),
        labels=of.labels,
        real_batch=of.real_batch,
        width=of.width,
        parts=parts,
        weights=weights,
    )


def matching_step(method: str, of: Problem, images: Tensor) -> Callable[[], object]:
    """An iteration of the distillation loop on a network that is not trained in between."""
    objective = METHODS[method].objective(of)
    if isinstance(objective, GradientMatching):
        objective.inner = 0
    start = problems.synthetic_set(of, images)
    return Distillation(objective, start, METHODS[method].image_lr[1], momentum=0.5).update


def textbook_step(method: str, of: Problem, images: Tensor) -> Callable[[], object]:
    plain = setting(of, images)
    optimizer = torch.optim.SGD([plain.images], lr=METHODS[method].image_lr[1], momentum=0.5)
    if method == "dm":
        return lambda: baselines.distribution_step(plain, optimizer)
    network = plain.network()
    return lambda: baselines.gradient_step(plain, network, optimizer)


def inner_step(of: Problem, images: Tensor) -> Callable[[], object]:
    """An epoch of the network on the 100 synthetic images, as between two image steps."""
    objective = GradientMatching(of)
    networks.initialise(objective.network, objective.random["network"])
    objective.inner = 1
    return lambda: objective.train(images, of.labels)


def textbook_inner_step(of: Problem, images: Tensor) -> Callable[[], object]:
    plain = setting(of, images)
    network = plain.network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    return lambda: baselines.train_epoch(plain, network, optimizer)


def evaluation(of: Problem, images: Tensor) -> Callable[[], object]:
    protocol = Protocol(EPOCHS[images.device.type], of.augmentation, width=WIDTH, precision=of.precision)
    test = of.real.subset(torch.arange(TEST, device=images.device))
    training_set = (images, of.labels)
    return lambda: evaluate(lambda _: training_set, test, protocol, num_networks=NETWORKS, seed=0)


def textbook_evaluation(of: Problem, images: Tensor) -> Callable[[], object]:
    plain = setting(of, images)
    test = (plain.real[:TEST], of.real.labels[:TEST])
    return lambda: baselines.evaluate(plain, test, NETWORKS, EPOCHS[images.device.type])


def trajectory(of: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two points of a made-up trajectory."""
    network = of.network()
    networks.initialise(network, generator(0, "bench/start", of.real.images.device))
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    networks.initialise(network, generator(0, "bench/target", of.real.images.device))
    return start, {n: start[n].lerp(value.detach(), 0.1) for n, value in network.named_parameters()}


def trajectory_step(of: Problem, images: Tensor) -> Callable[[], object]:
    """What `TrajectoryMatching` does between two points, with a new augmentation in every step."""
    network, (start, target) = of.network(), (flatten(weights.values()) for weights in trajectory(of))
    images = images.clone().requires_grad_()
    random = generator(0, "bench/augmentation", images.device)
    step_size, kept = torch.full((), STEP_SIZE, device=images.device), of.graphs_kept(len(images))

    def batch() -> Batch:
        params = augment.sample(of.augmentation, len(images), of.real.image_size, generator=random)
        return lambda images, targets: (augment.apply(images, params), targets)

    def step() -> Tensor:
        batches = [batch() for _ in range(STEPS)]
        end = follow(network, start, batches, images, of.labels, step_size, kept=kept)
        return torch.autograd.grad(squared_distance(end, target) / squared_distance(start, target), images)[0]

    return graph.replayed(step, [random], images.device)


def textbook_trajectory_step(of: Problem, images: Tensor) -> Callable[[], object]:
    plain = setting(of, images)
    start, target = ([*weights.values()] for weights in trajectory(of))

    def step() -> Tensor:
        loss = baselines.trajectory_step(plain, start, target, STEPS, STEP_SIZE)
        return torch.autograd.grad(loss, plain.images)[0]

    return step


OURS: Mapping[str, Callable[[Problem, Tensor], Callable[[], object]]] = {
    "dm": functools.partial(matching_step, "dm"),
    "dc": functools.partial(matching_step, "dc"),
    "dsa": functools.partial(matching_step, "dsa"),
    "inner": inner_step,
    "mtt": trajectory_step,
    "evaluation": evaluation,  # last, for it takes the longest: the time may be up before the end
}
TEXTBOOK: Mapping[str, Callable[[Problem, Tensor], Callable[[], object]]] = {
    "dm": functools.partial(textbook_step, "dm"),
    "dc": functools.partial(textbook_step, "dc"),
    "dsa": functools.partial(textbook_step, "dsa"),
    "inner": textbook_inner_step,
    "evaluation": textbook_evaluation,
    "mtt": textbook_trajectory_step,
}
