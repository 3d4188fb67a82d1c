"""Several networks of one architecture trained as one: weights stacked, each with its own generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, vmap

from . import augment
from .augment import AugmentParams
from .graph import replayed
from .networks import Network, flat, initialise
from .networks.memory import budget, per_image

# Networks trained as one, at most. On a CPU a stack of five ConvNets took 1.08 times as long as one by one
# (100 images a step, one thread of an EPYC); on an H100 0.68 times (bfloat16, 200 steps and their recording),
# before their weights were one vector.
LARGEST_STACK = {"cpu": 1, "cuda": 10}

# Where an update is one kernel, whose learning rate is a tensor: a recorded step reads it anew.
FUSED = {"cuda"}
PIECES = 48  # of the weights, for that kernel: as many as one launch takes, each for blocks of its own

# Where the images of a single batch come in a drawn order as well. It changes nothing, but without it a CPU
# would draw other augmentations than it always has.
ORDERED = {"cpu"}

# Takes which images, int64 [K, b], their augmentation, and whatever the step was given beside them; returns
# the images [K, b, C, H, W] and their targets [K, b, ...].
Batch = Callable[..., tuple[Tensor, Tensor]]


def stack_size(network: Network, image: tuple[int, ...], batch: int, device: torch.device) -> int:
    """Return how many networks to train as one on batches of images [C, H, W], within half the free memory.

    It is 1 with batch normalisation, which keeps statistics beside the weights.
    """
    if network.batch_normalised:
        return 1
    most, free = LARGEST_STACK[device.type], budget(None, device)
    if free is None:
        return most
    return max(1, min(most, free // (batch * per_image(network, image, gradients=True))))


def one_unordered_batch(count: int, batch: int, device: torch.device) -> bool:
    """Return whether there is a single batch of `count` images, whose order is not drawn on this device."""
    return count <= batch and device.type not in ORDERED


@dataclass(frozen=True)
class Stack:
    """K networks.

    Attributes:
        network: of their architecture; its own weights are ignored unless they are the stack's.
        weights: all of theirs as one vector, see `mim4dd.networks.flat`, trained in place.
        random: a generator for each network, of all that is drawn for it.
    """

    network: Network
    weights: Tensor
    random: Sequence[torch.Generator]

    @classmethod
    def initialised(cls, network: Network, random: Sequence[torch.Generator]) -> Stack:
        """Return a stack of new networks, one per generator."""
        starts = []
        for r in random:
            initialise(network, r)
            starts.append(flat.flatten(network.parameters()))
        return cls(network, flat.stack(starts, network), random)

    @classmethod
    def of(cls, network: Network, generator: torch.Generator) -> Stack:
        """Return a stack of one whose weights are the network's own: training it trains the network."""
        weights = flat.flatten(network.parameters())
        for name, view in flat.unflatten(weights, network).items():
            network.get_parameter(name).data = view
        return cls(network, weights, [generator])

    def epoch(self, count: int, batch: int) -> Iterator[Tensor]:
        """Yield batches int64 [K, b] that go through `count` images once; several in each network's order."""
        device = self.weights.device
        if one_unordered_batch(count, batch, device):
            yield torch.arange(count, device=device).expand(len(self.random), count)
            return
        orders = [torch.randperm(count, generator=r, device=r.device) for r in self.random]
        yield from torch.stack(orders).split(batch, 1)

    def sgd(self, lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0) -> torch.optim.SGD:
        """Return an optimiser of the weights, whose learning rate is for `set_lr` to change."""
        device = self.weights.device
        fused = device.type in FUSED
        return torch.optim.SGD(
            _pieces(self.weights) if fused else [self.weights],
            lr=torch.full((), lr, dtype=torch.float32, device=device) if fused else lr,
            momentum=momentum,
            weight_decay=weight_decay,
            fused=fused,
        )

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
        pieces = optimizer.param_groups[0]["params"]

        def step(index: Tensor, *data: Tensor) -> None:
            params = augment.sample_each(augmentation, index.shape[1], size, generators=self.random)
            gradient = self._gradient(*batch(index, params, *data))
            for piece, grad in zip(pieces, gradient.split([len(piece) for piece in pieces]), strict=True):
                piece.grad = grad
            optimizer.step()

        return replayed(step, self.random, self.random[0].device)

    def _gradient(self, images: Tensor, targets: Tensor) -> Tensor:
        """The gradient of the networks' cross entropies, each on its own images, by the weights."""
        weights = self.weights.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._logits(flat.unflatten_all(weights, self.network, len(images)), images)
            mean = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))
            # Of K times the mean over all: the sum of the networks' own means.
            return torch.autograd.grad(mean, weights, torch.full_like(mean, len(images)))[0]

    def _logits(self, weights: dict[str, Tensor], images: Tensor) -> Tensor:
        def logits(weights: dict[str, Tensor], images: Tensor) -> Tensor:
            return functional_call(self.network, weights, (images,))

        if len(images) > 1:
            return vmap(logits)(weights, images)
        # Without the stack, whose convolutions are grouped ones, and whose statistics cannot be kept.
        return logits({name: weight.squeeze(0) for name, weight in weights.items()}, images[0])[None]

    def rows(self) -> Tensor:
        """Return the weights [K, all of one] of each as they are now."""
        return flat.unstack(self.weights, self.network, len(self.random))

    def unstack(self) -> Iterator[Network]:
        """Yield the network with the weights of each of the stack in turn."""
        for weights in self.rows():
            flat.load(self.network, weights)
            yield self.network


def _pieces(weights: Tensor) -> Sequence[Tensor]:
    """Cut a vector into about `PIECES` views, each aligned for wide loads."""
    size = -(-len(weights) // PIECES)
    return weights.split(size + -size % 1024)


def set_lr(optimizer: torch.optim.SGD, lr: float) -> None:
    """Set the learning rate, also of steps that have been recorded."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def augmented_batch(
    index: Tensor, params: AugmentParams, images: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the images, augmented, and targets at an index [1, b]: the `Batch` of a single network."""
    return augment.apply(images[index[0]], params)[None], targets[index]
