"""Trajectory matching (MTT, CVPR 2022): training on either set ends at the same weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .. import augment
from ..config import TrajectoryConfig, settled
from ..errors import InputError
from ..losses.checks import check_positive
from ..networks.flat import flatten, load
from ..seeding import generator, generators
from ..stacked import one_unordered_batch
from ..state import State
from . import experts
from .base import Matched, Objective, Problem
from .experts import Experts, Recipe
from .student import Batch, follow, loss_gradient


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

    It is the loss of MTT (CVPR 2022), on all images in every step. Differentiable in `images` and
    `step_size`, once, or with `memory="unrolled"` as often as the gradient of the network is (through the
    compiled layers also once).

    Args:
        network: its parameters' names are the keys of `start`; its own values are not used. Whatever
            `torch.func.grad` takes: no checkpointing, and no `autograd.Function` without `setup_context`.
        start: weights before the first step.
        target: weights to reach.
        images: float [n, C, H, W].
        labels: int64 [n], or probabilities [n, num_classes], which get their gradient.
        steps: number of full-batch steps on the cross entropy.
        step_size: their size; a 0-d tensor gets its gradient.
        memory: "unrolled" keeps the graph of every step; "constant" keeps the weights of every step and the
            graph of one, and computes the same gradient, cross-step terms included (as TESLA, ICML 2023, but
            exact): the steps are taken back one by one, each recomputed from its stored weights.

    Raises:
        ValueError: weights that do not fit the network, a number of steps or a size of theirs that makes no
            sense, or an unknown kind of memory.
    """
    names = [name for name, _ in network.named_parameters()]
    for argument, weights in (("start", start), ("target", target)):
        if weights.keys() != {*names}:
            odd = min(weights.keys() ^ {*names})
            raise ValueError(
                f"mim4dd.trajectory_distance: {argument} does not fit the network, see weight {odd!r}"
            )
        if any(weights[name].shape != value.shape for name, value in network.named_parameters()):
            raise ValueError(
                f"mim4dd.trajectory_distance: {argument} has weights of other shapes than the network"
            )
    if steps < 0 or steps % 1:
        raise ValueError(f"mim4dd.trajectory_distance: steps is {steps}, expected a whole number from 0")
    check_positive("trajectory_distance", "step_size", step_size)
    if memory not in ("constant", "unrolled"):
        raise ValueError(
            f"mim4dd.trajectory_distance: memory is {memory!r}, expected 'constant' or 'unrolled'"
        )
    if isinstance(step_size, Tensor):
        step = step_size.to(images.device, images.dtype)
    else:  # filled in there, not copied from the host, so that a CUDA graph can hold it
        step = torch.full((), step_size, dtype=images.dtype, device=images.device)
    begin, aim = (flatten(weights[name] for name in names) for weights in (start, target))
    batches: list[Batch] = [lambda images, targets: (images, targets)] * steps
    if memory == "constant":
        end = follow(network, begin, batches, images, labels, step)
    else:
        end = begin
        for _ in range(steps):
            end = end - step * loss_gradient(network, end, images, labels)
    return squared_distance(end, aim) / squared_distance(begin.detach(), aim)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return ‖a - b‖² of two vectors, a scalar."""
    return (a - b).square().sum()


def recipe(problem: Problem) -> Recipe:
    """Return what shapes the experts of a problem.

    Raises:
        ValueError: the problem's settings of trajectory matching have no number of starts or steps.
        InputError: data or a network that cannot be followed.
    """
    config, network = problem.trajectory, problem.network()
    if not config.max_start or not config.student_steps:
        raise ValueError(
            "mim4dd.objectives.TrajectoryMatching: Problem(trajectory=TrajectoryConfig(max_start=..., "
            "student_steps=...)) is needed"
        )
    if problem.real.num_classes == 1:
        raise InputError("mtt follows networks that learn to tell classes apart, but there is only one class")
    if next(network.buffers(), None) is not None:
        raise InputError(
            "mtt follows weights only, but batch normalisation keeps statistics too; use another --network"
        )
    return Recipe(network, problem.real, problem.architecture, problem.width, problem.augmentation, config)


def train_experts(problem: Problem) -> Iterator[tuple[int, int]]:
    """Train the experts of a problem if there are none yet; see `experts.train`.

    Raises:
        InputError: trajectories that end before a match would, or what `recipe` and `open_experts` refuse.
    """
    made = recipe(problem)
    config = made.config
    if made.path().exists():
        open_experts(made)  # only to see whether it can be
    elif config.expert_snapshots is not None and _last(config) > config.expert_snapshots:
        raise InputError(
            f"--expert-snapshots is {config.expert_snapshots}, but --max-start {config.max_start} "
            f"with --span {config.span} needs {_last(config)}"
        )
    return experts.train(made)


def _last(config: TrajectoryConfig) -> int:
    """Return the last snapshot that a match may lead to."""
    return settled(config.max_start) - 1 + config.span


def open_experts(made: Recipe) -> Experts:
    """Open the file of a recipe's experts.

    Raises:
        InputError: they do not fit the recipe, or their trajectories are too short for it.
    """
    found, config = Experts(made.path(), made), made.config
    if _last(config) > found.num_snapshots:
        raise InputError(
            f"{made.path()} holds {found.num_snapshots} snapshots, but --max-start {config.max_start} with "
            f"--span {config.span} needs {_last(config)}"
        )
    return found


def student_batch(problem: Problem) -> int:
    """Return how many synthetic images a step takes."""
    count = len(problem.labels)
    return min(problem.trajectory.student_batch or count, count)


class TrajectoryMatching(Objective):
    """From a snapshot of an expert, steps on the synthetic images lead to a later snapshot.

    The steps' size is learned, as its logarithm, so that it stays positive.
    """

    remedy = "--image-lr, --student-lr or --student-lr-rate"

    def __init__(self, problem: Problem) -> None:
        for _ in train_experts(problem):
            pass
        made = recipe(problem)
        self.problem, self.config = problem, made.config
        self.network, self.experts = made.network, open_experts(made)
        self.batch = student_batch(problem)
        self.kept = problem.graphs_kept(self.batch)
        device = problem.real.images.device
        self.matches = generator(problem.seed, "mtt/match")  # on the CPU: it says what to read from a file
        self.random = generators(problem.seed, "mtt", ("real", "augmentation", "training"), device)
        self.generators = tuple(self.random.values())
        # The weights of a match are copied into these, so that it always reads the same memory.
        self.start, self.target = (flatten(self.network.parameters()) for _ in range(2))
        self.log_lr = torch.full(
            (), math.log(self.config.student_lr), dtype=torch.float32, device=device, requires_grad=True
        )
        self.trained = [{"params": [self.log_lr], "lr": self.config.student_lr_rate}]

    @property
    def network_lr(self) -> float:
        """The size of the steps, as it is by now."""
        return self.log_lr.exp().item()

    def prepare(self, images: Tensor, targets: Tensor) -> None:
        """Read two snapshots of an expert."""
        expert, snapshot = (
            int(torch.randint(count, (), generator=self.matches, device="cpu"))
            for count in (self.experts.num_experts, settled(self.config.max_start))
        )
        for held, k in ((self.start, snapshot), (self.target, snapshot + self.config.span)):
            held.copy_(self.experts.weights(expert, k, images.device))

    def state(self) -> State:
        """All that is drawn from; the experts are in their file."""
        return {"matches": self.matches, **self.random}

    def match(self, images: Tensor, targets: Tensor) -> Matched:
        """Return the distance for the synthetic images [n, C, H, W]; features only if the add-on wants them.

        They are those of the network that the match starts from.
        """
        start, target = self.start, self.target
        batches = [self._batch(index) for index in self._indices(len(images))]
        end = follow(self.network, start, batches, images, targets, self.log_lr.exp(), kept=self.kept)
        distance = squared_distance(end, target) / squared_distance(start, target)
        if not self.problem.layers:
            return Matched(distance, [], [], self.problem.labels, self.problem.labels)
        load(self.network, start)
        draws = self.random["real"], self.random["augmentation"]
        return Matched(distance, *self.problem.siamese(self.network, images, self.problem.real_batch, *draws))

    def _indices(self, count: int) -> Iterator[Tensor | slice]:
        """Yield the images of every step: each in turn, in a new order every time around."""
        steps = settled(self.config.student_steps)
        random = self.random["training"]
        if one_unordered_batch(count, self.batch, random.device):
            yield from [slice(count)] * steps
            return
        rounds = -(-steps * self.batch // count)
        orders = [torch.randperm(count, generator=random, device=random.device) for _ in range(rounds)]
        yield from torch.cat(orders).split(self.batch)[:steps]

    def _batch(self, index: Tensor | slice) -> Batch:
        params = augment.sample(
            self.problem.augmentation,
            self.batch,
            self.problem.real.image_size,
            generator=self.random["training"],
        )
        return lambda images, targets: (augment.apply(images[index], params), targets[index])
