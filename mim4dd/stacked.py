"""Several networks of one architecture trained as one: their weights stacked, every draw from their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from . import augment
from .augment import AugmentParams
from .graph import replayed
from .networks import Network, initialise
from .networks.memory import budget, per_image

# Networks trained as one, at most. On a CPU a stack of five ConvNets took 1.08 times as long as one by one
# (100 images a step, one thread of an EPYC); on an H100 0.68 times (bfloat16, 200 steps and their recording).
AT_ONCE = {"cpu": 1, "cuda": 10}

Weights = dict[str, Tensor]

# Takes which images, int64 [K, b], their augmentation, and whatever the step was given beside them; returns
# the images [K, b, C, H, W] and their targets [K, b, ...].
Batch = Callable[..., tuple[Tensor, Tensor]]


def at_once(network: Network, image: tuple[int, ...], batch: int, device: torch.device) -> int:
    """Return how many networks to train as one on batches of images [C, H, W], within half the free memory.

    One where batch normalisation counts statistics of its own beside the weights.
    """
    if network.batch_normalised:
        return 1
    most, free = AT_ONCE[device.type], budget(None, device)
    if free is None:
        return most
    return max(1, min(most, free // (batch * per_image(network, image, gradients=True, transformed=True))))


@dataclass(frozen=True)
class Stack:
    """K networks.

    Attributes:
        network: of their architecture; its own weights are of no account unless they are the stack's.
        weights: [K, ...] by name, trained in place.
        random: a generator for each network, of all that is drawn for it.
    """

    network: Network
    weights: Weights
    random: Sequence[torch.Generator]

    @classmethod
    def initialised(cls, network: Network, random: Sequence[torch.Generator]) -> Stack:
        """Return a stack of new networks, one per generator."""
        starts: dict[str, list[Tensor]] = {name: [] for name, _ in network.named_parameters()}
        for r in random:
            initialise(network, r)
            for name, weight in network.named_parameters():
                starts[name].append(weight.detach().clone())
        return cls(network, {name: torch.stack(values) for name, values in starts.items()}, random)

    @classmethod
    def of(cls, network: Network, generator: torch.Generator) -> Stack:
        """Return a stack of one whose weights are the network's own: training it trains the network."""
        return cls(network, {name: p.detach()[None] for name, p in network.named_parameters()}, [generator])

    def epoch(self, count: int, batch: int) -> Iterator[Tensor]:
        """Yield batches int64 [K, b] that go through `count` images once, for each network in its order."""
        orders = [torch.randperm(count, generator=r, device=r.device) for r in self.random]
        yield from torch.stack(orders).split(batch, 1)

    def step(
        self, optimizer: torch.optim.Optimizer, batch: Batch, augmentation: str, size: tuple[int, int]
    ) -> Callable[..., None]:
        """Return what takes a batch int64 [K, b], and more for `batch`, and trains a step on it.

        Args:
            optimizer: of the weights; what it holds as plain numbers must stay as it is.
            batch: fetches the images and targets.
            augmentation: strategy string, see `augment.sample`; drawn for each network by itself.
            size: (height, width) of the images.
        """
        gradients = _gradients(self.network, len(self.random))

        def step(index: Tensor, *data: Tensor) -> None:
            params = augment.sample_each(augmentation, index.shape[1], size, generators=self.random)
            images, targets = batch(index, params, *data)
            for name, by_weight in gradients(self.weights, images, targets).items():
                self.weights[name].grad = by_weight
            optimizer.step()

        return replayed(step, self.random, self.random[0].device)

    @torch.no_grad()
    def unstack(self) -> Iterator[Network]:
        """Yield the network with the weights of each of the stack in turn."""
        for k in range(len(self.random)):
            for name, parameter in self.network.named_parameters():
                parameter.copy_(self.weights[name][k])
            yield self.network


def augmented_batch(
    index: Tensor, params: AugmentParams, images: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the images, augmented, and targets at an index [1, b]: the `Batch` of a single network."""
    return augment.apply(images[index[0]], params)[None], targets[index]


def _gradients(network: Network, count: int) -> Callable[[Weights, Tensor, Tensor], Weights]:
    """Return what computes the gradients [count, ...] of the cross entropy by stacked weights."""

    def loss(weights: Weights, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, weights, (images,)), targets)

    if count > 1:
        return vmap(grad(loss))

    def alone(weights: Weights, images: Tensor, targets: Tensor) -> Weights:
        # Without the stack, whose convolutions are grouped ones, and whose statistics cannot be kept.
        leaves = {name: weight[0].detach().requires_grad_() for name, weight in weights.items()}
        with torch.enable_grad():
            gradient = torch.autograd.grad(loss(leaves, images[0], targets[0]), [*leaves.values()])
        return {name: by_weight[None] for name, by_weight in zip(leaves, gradient, strict=True)}

    return alone
