"""Gradient matching (DC, ICLR 2021; DSA, ICML 2021): equal gradients on real and synthetic images."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from .. import augment
from ..dtypes import at_least_float32
from ..networks import CHUNK, Network, initialise
from ..networks.network import empty_map
from ..seeding import generators
from ..stacked import Stack, augmented_batch
from ..state import State, counter, prefixed
from .base import Matched, Objective, Problem

NETWORK_LR = 0.01
INNER_BATCH = 256
EPSILON = 1e-6  # added to a product of norms, as published


def gradient_distance(
    synthetic_grads: Iterable[Tensor], real_grads: Iterable[Tensor], metric: str = "rowwise"
) -> Tensor:
    """Return the distance between two sets of gradients, a scalar; the real ones are taken as constants.

    The loss of DC (ICLR 2021) is "rowwise". Gradients of half precision are taken to float32.

    Args:
        synthetic_grads: one tensor per parameter, in the same order as `real_grads`.
        real_grads: likewise, of the same shapes.
        metric: "rowwise" sums 1 - cosine over the rows of every tensor with two or more dimensions, a row
            being an output channel; "mse" sums the squared differences of all numbers; "cosine" is 1 - the
            cosine of all numbers as one vector.

    Raises:
        ValueError: the two sets do not match, or an unknown metric.
    """
    synthetic_grads, real_grads = tuple(synthetic_grads), tuple(real_grads)
    shapes = [[tuple(g.shape) for g in grads] for grads in (synthetic_grads, real_grads)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"mim4dd.gradient_distance: synthetic_grads have shapes {shapes[0]} and real_grads {shapes[1]}"
        )
    if metric not in ("rowwise", "mse", "cosine"):
        raise ValueError(
            f"mim4dd.gradient_distance: metric is {metric!r}, expected 'rowwise', 'mse' or 'cosine'"
        )
    synthetic_grads, real_grads = (
        [at_least_float32(g) for g in grads] for grads in (synthetic_grads, real_grads)
    )
    if metric == "rowwise":
        distances = [
            (1 - _cosine(s.flatten(1), r.detach().flatten(1))).sum()
            for s, r in zip(synthetic_grads, real_grads, strict=True)
            if s.ndim > 1
        ]
        return torch.stack(distances).sum() if distances else torch.zeros(())
    synthetic, real = (torch.cat([g.flatten() for g in grads]) for grads in (synthetic_grads, real_grads))
    if metric == "mse":
        return (synthetic - real.detach()).square().sum()
    return 1 - _cosine(synthetic, real.detach())


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + EPSILON)


def loops(ipc: int) -> tuple[int, int]:
    """Return the image steps per network and the epochs of its training between them.

    The published table, (1, 1) at 1 image per class, (10, 50) at 10, (20, 25) at 20, (30, 20) at 30, (40, 15)
    at 40 and (50, 10) at 50, as a rule for any number.
    """
    if ipc == 1:
        return 1, 1
    return min(ipc, 50), max(10, -(-100 // ipc) * 5)


class GradientMatching(Objective):
    """Class by class, equal gradients of a network that is itself trained on the synthetic images meanwhile.

    Batch normalisation trains in training mode and is matched with the statistics of real images, so that the
    gradients of real and synthetic images are those of one network (`Problem.set_batch_norm_statistics`).

    A network serves `loops(ipc)[0]` calls, between which it is trained on the current images.
    With a siamese augmentation this is DSA, without one DC.

    Raises:
        ValueError: the problem's labels are not class by class.
    """

    def __init__(self, problem: Problem) -> None:
        classes, labels = problem.real.num_classes, problem.labels
        in_order = torch.arange(classes, device=labels.device).repeat_interleave(len(labels) // classes)
        if not labels.is_meta and not torch.equal(labels, in_order):
            raise ValueError(
                "mim4dd.GradientMatching: the labels are not in order of class, equally many of each; "
                f"expected {len(labels) // classes} of class 0, as many of class 1, and so on: sort the set"
            )
        self.problem = problem
        self.network = _WithMaps(problem.network(), problem.layers)
        purposes = "network", "real", "augmentation", "training", "statistics"
        self.random = generators(problem.seed, "dc", purposes, problem.real.images.device)
        self.generators = (self.random["real"], self.random["augmentation"])
        self.outer, self.inner = loops(len(problem.labels) // problem.real.num_classes)
        self.calls = counter()
        self.stack = Stack.of(self.network.network, self.random["training"])
        self.step = self.stack.step(
            self.stack.sgd(NETWORK_LR), augmented_batch, problem.augmentation, problem.real.image_size
        )

    def prepare(self, images: Tensor, targets: Tensor) -> None:
        """Start with a new network, or train the one there is on the synthetic images."""
        if int(self.calls) % self.outer == 0:
            initialise(self.network, self.random["network"])
        else:
            self.train(images, targets)
        self.calls += 1
        self.problem.set_batch_norm_statistics(self.network.network, self.random["statistics"])

    def state(self) -> State:
        """The network, how far its training is, and all that is drawn from."""
        return {**self.network.state_dict(), "calls": self.calls, **prefixed("random", self.random)}

    def match(self, images: Tensor, targets: Tensor) -> Matched:
        """Return the distance for the synthetic images [n, C, H, W], and features of the same passes."""
        real = self.problem.real
        params = self.problem.class_augmentation(self.random["augmentation"])
        index = real.sample(self.problem.real_batch, self.random["real"])
        real_labels = real.labels[index]
        real_images = real.augmented(index, params, real_labels)
        real_grads, real_maps = self._class_gradients(real_images, real_labels)
        classes = (real.num_classes, -1)
        augmented = augment.apply(images, params, rows=self.problem.labels).unflatten(0, classes)
        grads, maps = self._class_gradients(augmented, targets.unflatten(0, classes))
        # With the classes as further rows, the sum of the classes' distances is one distance.
        rows, real_rows = ([g.flatten(0, 1) for g in side if g.ndim > 2] for side in (grads, real_grads))
        distance = gradient_distance(rows, real_rows)
        return Matched(
            distance,
            [m.flatten(0, 1) for m in maps],
            [m.detach().flatten(0, 1) for m in real_maps],
            *self.problem.pair_labels(index.flatten()),
        )

    def _class_gradients(self, images: Tensor, targets: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients [C, ...] of each class's cross entropy on images [C, n, ...], and maps [C, n, ...]."""
        # On a CPU the grouped convolutions that batched gradients become are 2.4 times slower.
        if images.device.type == "cpu":
            return _one_by_one(self.network, images, targets)
        return _batched(self.network, images, targets, self.problem.classes_at_once)

    def train(self, images: Tensor, targets: Tensor) -> None:
        """Train the network in place for `inner` epochs on the synthetic images, each in a new order."""
        self.network.network.train()
        for _ in range(self.inner):
            for index in self.stack.epoch(len(images), INNER_BATCH):
                self.step(index, images, targets)


class _WithMaps(nn.Module):
    """A network whose forward returns the logits and the feature maps of some layers, the others empty."""

    def __init__(self, network: Network, layers: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.layers = layers

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        last = len(self.network.blocks) - 1
        maps = self.network.features(x, {last, *self.layers})
        logits = self.network.classify(maps[-1])
        return logits, [m if k in self.layers else empty_map(m) for k, m in enumerate(maps)]


def _loss(
    network: nn.Module, weights: dict[str, Tensor], images: Tensor, targets: Tensor
) -> tuple[Tensor, list[Tensor]]:
    logits, maps = functional_call(network, weights, (images,))
    return F.cross_entropy(logits, targets), maps


def _batched(
    network: nn.Module, images: Tensor, targets: Tensor, classes: int
) -> tuple[list[Tensor], list[Tensor]]:
    weights = dict(network.named_parameters())
    gradient = grad(functools.partial(_loss, network), has_aux=True)
    gradients, maps = vmap(gradient, in_dims=(None, 0, 0), chunk_size=classes)(weights, images, targets)
    return [*gradients.values()], maps


def _one_by_one(network: nn.Module, images: Tensor, targets: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    weights = {name: weight.detach().requires_grad_() for name, weight in network.named_parameters()}
    gradients, maps = [], []
    learned = images.requires_grad or targets.requires_grad
    # A class with as many images as the real ones is taken in chunks that stay in the cache; the gradients of
    # its parts add up.
    for class_images, class_targets in zip(images, targets, strict=True):
        parts = []
        for x, y in zip(class_images.split(CHUNK["cpu"]), class_targets.split(CHUNK["cpu"]), strict=True):
            loss, chunk_maps = _loss(network, weights, x, y)
            share = loss * (len(x) / len(class_images))
            parts.append(torch.autograd.grad(share, [*weights.values()], create_graph=learned))
            maps.append(chunk_maps)
        gradients.append([sum(part) for part in zip(*parts, strict=True)])
    return (
        [torch.stack(of_weight) for of_weight in zip(*gradients, strict=True)],
        [torch.cat(of_layer).unflatten(0, images.shape[:2]) for of_layer in zip(*maps, strict=True)],
    )
