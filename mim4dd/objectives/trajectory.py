"""Trajectory matching (MTT, CVPR 2022): training on either set ends at the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .. import augment, experts
from ..errors import InputError
from ..experts import ExpertConfig, Experts, Recipe, Weights
from ..seeding import generator
from .base import Matched, Problem
from .repeatable import Repeatable

# Takes the images and targets of one step from all of them, differentiably.
Batch = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrajectoryConfig(ExpertConfig):
    """Trajectory matching (mtt): its experts, which are kept and found again, and how they are followed."""

    max_start: int | None = None
    """A match starts from one of this many first snapshots."""
    span: int = 2
    """Snapshots from the start of a match to its target."""
    student_steps: int | None = None
    """Steps on the synthetic images that are to lead there."""
    student_batch: int | None = None
    """Images per step; default: all."""
    student_lr: float = 0.01
    """Size of those steps at first; it is learned."""
    student_lr_rate: float = 0.1
    """Learning rate of its logarithm."""


def trajectory_distance(
    network: nn.Module,
    start: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    step_size: float | Tensor,
    memory: str = "constant",
) -> Tensor:
    """Return ‖end - target‖² / ‖start - target‖², end being `start` after SGD on all the images, a scalar.

    Differentiable in `images` and `step_size`, once, or with `memory="unrolled"` any number of times.

    Args:
        network: its parameters' names are the keys of `start`; its own values are not used.
        start: weights before the first step.
        target: weights to arrive at.
        images: float [n, C, H, W].
        labels: int64 [n], or probabilities [n, num_classes], which get their gradient.
        steps: number of full-batch steps on the cross entropy.
        step_size: their size; a 0-d tensor gets its gradient.
        memory: "unrolled" keeps the graph of every step; "constant" keeps the weights of every step and the
            graph of one, and computes the same gradient, cross-step terms included (as TESLA, ICML 2023, but
            exact): the steps are taken back one by one, each recomputed from its stored weights.

    Raises:
        ValueError: weights that do not fit the network, or an unknown kind of memory.
    """
    names = {name for name, _ in network.named_parameters()}
    for argument, weights in (("start", start), ("target", target)):
        if weights.keys() != names:
            odd = min(weights.keys() ^ names)
            raise ValueError(
                f"mim4dd.trajectory_distance: {argument} does not fit the network, see weight {odd!r}"
            )
    if memory not in ("constant", "unrolled"):
        raise ValueError(
            f"mim4dd.trajectory_distance: memory is {memory!r}, expected 'constant' or 'unrolled'"
        )
    step = torch.as_tensor(step_size, dtype=images.dtype, device=images.device)
    start = {name: value.detach() for name, value in start.items()}
    batches: list[Batch] = [lambda images, targets: (images, targets)] * steps
    if memory == "constant":
        end = _follow(network, start, batches, images, labels, step)
    else:
        end = start
        for _ in range(steps):
            gradient = _gradient(network, end, images, labels, create_graph=True)
            end = {name: value - step * gradient[name] for name, value in end.items()}
    return _squared_distance(end, target) / _squared_distance(start, target)


def _follow(
    network: nn.Module,
    start: Weights,
    batches: Sequence[Batch],
    images: Tensor,
    targets: Tensor,
    step: Tensor,
) -> Weights:
    end = _Trajectory.apply(network, start, batches, images, targets, step)
    return dict(zip(start, end, strict=True))


class _Trajectory(torch.autograd.Function):
    """(images, targets, step size) -> the weights after a step on every batch."""

    @staticmethod
    def forward(
        ctx: Any,
        network: nn.Module,
        start: Weights,
        batches: Sequence[Batch],
        images: Tensor,
        targets: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, ...]:
        path = [start]
        for batch in batches:
            gradient = _gradient(network, path[-1], *batch(images.detach(), targets.detach()))
            path.append({name: value - step * gradient[name] for name, value in path[-1].items()})
        ctx.network, ctx.batches, ctx.path = network, batches, path[:-1]
        ctx.save_for_backward(images, targets, step)
        # A new tensor even after no step at all: an output must not be an input.
        return tuple(value.clone() for value in path[-1].values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Any, ...]:
        images, targets, step = ctx.saved_tensors
        soft = targets.is_floating_point()
        data = [images.detach().requires_grad_(), targets.detach().requires_grad_(soft)]
        learned = data if soft else data[:1]
        grads = [torch.zeros_like(tensor) for tensor in learned]
        grad_step = torch.zeros_like(step)
        for weights, batch in zip(reversed(ctx.path), reversed(ctx.batches), strict=True):
            # One step is w' = w - step * g(w, data). With a the gradient with respect to w', the product
            # <a, g> holds all of its derivatives: by w the Hessian's part, by the data, and by the step.
            with torch.enable_grad():
                leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
                gradient = _gradient(ctx.network, leaves, *batch(*data), create_graph=True)
                product = sum((a * g).sum() for a, g in zip(adjoints, gradient.values(), strict=True))
                assert isinstance(product, Tensor)
                by_all = torch.autograd.grad(product, [*leaves.values(), *learned])
            by_weights, by_data = by_all[: len(leaves)], by_all[len(leaves) :]
            grad_step -= product.detach()
            for total, by in zip(grads, by_data, strict=True):
                total -= step * by
            adjoints = tuple(a - step * h for a, h in zip(adjoints, by_weights, strict=True))
        return None, None, None, grads[0], grads[1] if soft else None, grad_step


def _gradient(
    network: nn.Module, weights: Weights, images: Tensor, targets: Tensor, *, create_graph: bool = False
) -> Weights:
    """Gradient of the cross entropy with respect to the weights."""
    with torch.enable_grad():
        leaves = {n: (v if create_graph else v.detach()).requires_grad_() for n, v in weights.items()}
        loss = F.cross_entropy(functional_call(network, leaves, (images,)), targets)
        gradient = torch.autograd.grad(loss, [*leaves.values()], create_graph=create_graph)
    return dict(zip(leaves, gradient, strict=True))


def _squared_distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(a[name] - b[name].detach()).square().sum() for name in a]).sum()


def settings(problem: Problem) -> TrajectoryConfig:
    """Return the problem's settings of trajectory matching.

    Raises:
        ValueError: it has none.
    """
    if problem.trajectory is None:
        raise ValueError(
            "mim4dd.objectives.TrajectoryMatching: Problem(trajectory=TrajectoryConfig(...)) is needed"
        )
    return problem.trajectory


def recipe(problem: Problem) -> Recipe:
    """Return what shapes the experts of a problem.

    Raises:
        InputError: a network that cannot be followed, or snapshots that end before a match would.
    """
    config, network = settings(problem), problem.network()
    if next(network.buffers(), None) is not None:
        raise InputError(
            "mtt follows weights only, and batch normalisation keeps more; use another --network"
        )
    needed = (config.max_start or 0) - 1 + config.span
    if config.expert_snapshots is not None and needed > config.expert_snapshots:
        raise InputError(
            f"--expert-snapshots is {config.expert_snapshots}, but --max-start {config.max_start} "
            f"with --span {config.span} needs {needed}"
        )
    return Recipe(network, problem.real, problem.architecture, problem.width, problem.augmentation, config)


def train_experts(problem: Problem) -> Iterator[tuple[int, int]]:
    """Train the experts of a problem if there are none yet; see `mim4dd.experts.train`."""
    made = recipe(problem)
    if made.path().exists():
        open_experts(problem, made)  # only to see whether it can be
    return experts.train(made)


def open_experts(problem: Problem, made: Recipe) -> Experts:
    """Open the file of a recipe's experts.

    Raises:
        InputError: they do not fit the problem, or their trajectories are too short for it.
    """
    found = Experts(made.path(), made)
    config = settings(problem)
    last = (config.max_start or 1) - 1 + config.span
    if last > found.num_snapshots:
        raise InputError(
            f"{made.path()} holds {found.num_snapshots} snapshots, but --max-start {config.max_start} with "
            f"--span {config.span} needs {last}"
        )
    return found


class TrajectoryMatching(Repeatable):
    """From a snapshot of an expert, steps on the synthetic images lead to a later snapshot.

    The steps' size is learned, as its logarithm, so that it stays positive.
    """

    def __init__(self, problem: Problem) -> None:
        for _ in train_experts(problem):
            pass
        self.problem, self.config = problem, settings(problem)
        made = recipe(problem)
        self.network, self.experts = made.network, open_experts(problem, made)
        self.starts = self.config.max_start or 1
        seed, device = problem.seed, problem.real.images.device
        self.matches = generator(seed, "mtt/match")  # on the CPU: they say what to read from a file
        self.draws, self.augmentations, self.training = (
            generator(seed, f"mtt/{purpose}", device) for purpose in ("real", "augmentation", "training")
        )
        self.generators = (self.draws, self.augmentations, self.training)
        # The weights of a match are copied into these, so that it always reads the same memory.
        self.start, self.target = (
            {name: torch.empty(shape, device=device) for name, shape in made.shapes.items()} for _ in range(2)
        )
        self.log_lr = torch.tensor(math.log(self.config.student_lr), device=device, requires_grad=True)
        self.trained = [{"params": [self.log_lr], "lr": self.config.student_lr_rate}]

    @property
    def network_lr(self) -> float:
        """The size of the steps, as it is by now."""
        return self.log_lr.exp().item()

    def prepare(self, images: Tensor, targets: Tensor) -> None:
        """Read two snapshots of an expert."""
        expert, snapshot = (
            int(torch.randint(count, (), generator=self.matches))
            for count in (self.experts.num_experts, self.starts)
        )
        for held, k in ((self.start, snapshot), (self.target, snapshot + self.config.span)):
            for name, weight in self.experts.weights(expert, k, images.device).items():
                held[name].copy_(weight)

    def match(self, images: Tensor, targets: Tensor) -> Matched:
        """Return the distance for the synthetic images [n, C, H, W]; features only if the add-on wants them.

        They are those of the network that the match starts from.
        """
        start, target = self.start, self.target
        batches = [self._batch(index) for index in self._indices(len(images))]
        end = _follow(self.network, start, batches, images, targets, self.log_lr.exp())
        distance = _squared_distance(end, target) / _squared_distance(start, target)
        return self._with_features(distance, start, images)

    def _indices(self, count: int) -> Iterator[Tensor]:
        """Yield the images of every step: each in turn, in a new order every time around."""
        size = min(self.config.student_batch or count, count)
        rounds = -(-(self.config.student_steps or 0) * size // count)
        orders = [
            torch.randperm(count, generator=self.training, device=self.training.device) for _ in range(rounds)
        ]
        yield from torch.cat(orders).split(size)[: self.config.student_steps]

    def _batch(self, index: Tensor) -> Batch:
        params = augment.sample(
            self.problem.augmentation, len(index), self.problem.real.image_size, generator=self.training
        )
        return lambda images, targets: (augment.apply(images[index], params), targets[index])

    def _with_features(self, distance: Tensor, weights: Weights, images: Tensor) -> Matched:
        problem, real = self.problem, self.problem.real
        if not problem.layers:
            return Matched(distance, [], [], problem.labels, problem.labels)
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(weights[name])
        params = augment.sample(
            problem.augmentation, real.num_classes, real.image_size, generator=self.augmentations
        )
        index = real.sample(problem.real_batch, self.draws).flatten()
        real_images = real.augmented(index, params, real.labels[index])
        real_maps = problem.real_features(self.network, real_images)
        maps = problem.features(self.network, augment.apply(images, params, rows=problem.labels))
        return Matched(distance, maps, real_maps, *problem.pair_labels(index))
