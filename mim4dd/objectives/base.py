"""What an objective is: it maps synthetic images to a loss and the features behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from ..data import ImageSet
from ..networks import CHUNK, Network, create

if TYPE_CHECKING:
    from .trajectory import TrajectoryConfig

STATISTICS_BATCH = 16  # real images per class that set the statistics of batch normalisation


@dataclass(frozen=True)
class Problem:
    """What is to be matched, the same for every objective.

    Attributes:
        real: the training images, on the device of the run.
        labels: int64 [n], of the (decoded) synthetic images, class by class.
        architecture: of the networks, see `mim4dd.networks.ARCHITECTURES`.
        width: of the networks' blocks.
        real_batch: real images per class and iteration.
        augmentation: strategy string, see `mim4dd.augment.sample`.
        layers: maps that the add-on compares; the last one is always kept.
        seed: of every random draw.
        partners: int64 [N], the synthetic image that each real one is paired with by the add-on; None: all of
            its class.
        trajectory: settings of trajectory matching, for that alone.
    """

    real: ImageSet
    labels: Tensor
    architecture: str
    width: int
    real_batch: int
    augmentation: str
    layers: Sequence[int]
    seed: int
    partners: Tensor | None = None
    trajectory: TrajectoryConfig | None = None

    def pair_labels(self, real_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels [n] of the synthetic images and [...] of real ones [...]: equal where they pair."""
        if self.partners is None:
            return self.labels, self.real.labels[real_index]
        return torch.arange(len(self.labels), device=self.labels.device), self.partners[real_index]

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
        ).requires_grad_(False)

    def settle(self, network: Network, generator: torch.Generator) -> None:
        """Set the statistics of batch normalisation to those of 16 real images a class, and keep them so.

        Other networks stay as they are. Published DC lets these images move the statistics by a tenth, which
        in a new network leaves them nine tenths 0 and 1.
        """
        if network.batch_normalised:
            index = self.real.sample(STATISTICS_BATCH, generator).flatten()
            update_bn([self.real.batch(index)], network)
            network.eval()

    @torch.no_grad()
    def real_features(self, network: Network, images: Tensor) -> list[Tensor]:
        """Return the feature maps of images [N, C, H, W], computed in chunks; those not needed are empty.

        Batch normalisation in training mode takes its statistics from all of the images, in one chunk.
        """
        chunks = []
        whole = network.batch_normalised and network.training
        for chunk in images.split(max(1, len(images)) if whole else CHUNK[images.device.type]):
            maps = network.features(chunk)
            needed = {len(maps) - 1, *self.layers}
            chunks.append([m if k in needed else m.new_empty(0) for k, m in enumerate(maps)])
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


@dataclass(frozen=True)
class Matched:
    """The outcome of one matching: the loss, differentiable in the images, and the features it came from.

    The labels are those that say which features make a pair (`Problem.pair_labels`).
    """

    loss: Tensor
    synthetic_features: Sequence[Tensor]
    real_features: Sequence[Tensor]
    synthetic_labels: Tensor
    real_labels: Tensor


class Objective(ABC):
    """A base method for one problem. It draws what it needs, real images and networks, by itself.

    Attributes:
        trained: what it trains along with the images, as groups of parameters for `torch.optim.SGD`.
    """

    trained: Sequence[dict[str, Any]] = ()

    @property
    def network_lr(self) -> float | None:
        """The learning rate that networks are to be trained with on these images, if it has found one."""
        return None

    @abstractmethod
    def __call__(self, images: Tensor, targets: Tensor) -> Matched:
        """Match synthetic images against the problem's real ones.

        Args:
            images: float32 [n, C, H, W], normalised, in the order of the problem's labels.
            targets: what a network is to answer: those labels, or probabilities [n, num_classes].
        """
