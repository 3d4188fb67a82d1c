"""What an objective is: it maps synthetic images to a loss and the features behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..data import ImageSet
from ..memory import per_image
from ..networks import CHUNK, Network, create


@dataclass(frozen=True)
class Problem:
    """What is to be matched, the same for every objective.

    Attributes:
        real: the training images, on the device of the run.
        labels: int64 [n], of the synthetic images, class by class.
        architecture: of the networks, see `mim4dd.networks.ARCHITECTURES`.
        width: of the networks' blocks.
        real_batch: real images per class and iteration.
        augmentation: strategy string, see `mim4dd.augment.sample`.
        layers: maps that the add-on compares; the last one is always kept.
        seed: of every random draw.
        precision: what the networks compute in, see `mim4dd.networks.create`.
        memory: bytes that a pass of real images may take; None: chunks of `mim4dd.networks.CHUNK` images.
    """

    real: ImageSet
    labels: Tensor
    architecture: str
    width: int
    real_batch: int
    augmentation: str
    layers: Sequence[int]
    seed: int
    precision: str = "fp32"
    memory: int | None = None

    @cached_property
    def chunk(self) -> int:
        """How many images go through a network at once without gradients."""
        return self._at_once(gradients=False)

    @cached_property
    def classes_at_once(self) -> int:
        """How many classes of real images go through a network at once with gradients; at least one does."""
        return max(1, self._at_once(gradients=True) // self.real_batch)

    def _at_once(self, *, gradients: bool) -> int:
        if self.memory is None:
            return CHUNK[self.real.images.device.type]
        image = (self.real.channels, *self.real.image_size)
        return max(1, self.memory // per_image(self.network(), image, gradients=gradients))

    def network(self) -> Network:
        """Return a network for these images with unset weights that want no gradient."""
        real = self.real
        return create(
            self.architecture,
            real.channels,
            real.num_classes,
            real.image_size,
            width=self.width,
            device=real.images.device,
            precision=self.precision,
        ).requires_grad_(False)

    def features(self, network: Network, images: Tensor) -> list[Tensor]:
        """Return the feature maps of images [N, C, H, W], computed in chunks; those not needed are empty."""
        wanted = {len(network.blocks) - 1, *self.layers}
        chunks = [network.features(c, wanted) for c in images.split(self.chunk)]
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    @torch.no_grad()
    def real_features(self, network: Network, images: Tensor) -> list[Tensor]:
        """Return the `features` of real images, as constants."""
        return self.features(network, images)


@dataclass(frozen=True)
class Matched:
    """The outcome of one matching: the loss, differentiable in the images, and the features it came from."""

    loss: Tensor
    synthetic_features: Sequence[Tensor]
    real_features: Sequence[Tensor]
    synthetic_labels: Tensor
    real_labels: Tensor


class Objective(Protocol):
    """A base method for one problem. It draws what it needs, real images and networks, by itself."""

    def __call__(self, images: Tensor) -> Matched:
        """Match the synthetic images [n, C, H, W] against the problem's real ones."""
        ...
