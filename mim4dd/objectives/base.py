"""What an objective is: it maps synthetic images to a loss and the features behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import augment
from ..augment import AugmentParams
from ..config import TrajectoryConfig
from ..data import ImageSet
from ..networks import CHUNK, Network, create
from ..networks.memory import per_image
from ..state import State

STATISTICS_PER_CLASS = 16  # real images per class that set the statistics of batch normalisation
WEIGHTS_IN_A_GRAPH = 4  # times all weights, with their gradient and what both are cast to


@dataclass(frozen=True, eq=False)
class Problem:
    """What to match, the same for every objective.

    Attributes:
        real: the training images, on the device of the run.
        labels: int64 [n], of the (decoded) synthetic images, class by class.
        architecture: of the networks, see `mim4dd.networks.ARCHITECTURES`.
        width: of the networks' blocks.
        real_batch: real images per class and iteration.
        augmentation: strategy string, see `mim4dd.augment.sample`.
        layers: indices, from 0, of the maps that the add-on compares; a method may leave the others empty.
        seed: of every random draw.
        partners: int64 [N], the synthetic image that each real one is paired with by the add-on; None: all of
            its class.
        trajectory: settings of trajectory matching, for that alone.
        precision: what the networks compute in, see `mim4dd.networks.create`.
        memory: bytes that a pass of real images may take; None: chunks of `mim4dd.networks.CHUNK` images. The
            graphs of a trajectory's steps may take half as much.
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
    partners: Tensor | None = None
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)

    def pair_labels(self, real_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels [n] of the synthetic images and [...] of real ones [...]: equal where they pair."""
        if self.partners is None:
            return self.labels, self.real.labels[real_index]
        return torch.arange(len(self.labels), device=self.labels.device), self.partners[real_index]

    @cached_property
    def chunk(self) -> int:
        """How many images go through a network at once without gradients."""
        return self._at_once(gradients=False)

    @cached_property
    def classes_at_once(self) -> int:
        """How many classes of real images go through a network at once with gradients; at least one does."""
        return max(1, self._at_once(gradients=True) // self.real_batch)

    def graphs_kept(self, count: int) -> int:
        """How many gradients, each on `count` images, may keep their graphs until they are differentiated.

        They get half of `memory`, beside the real images; without a limit there, none keep theirs.
        """
        return 0 if self.memory is None else self.memory // 2 // self.graph_bytes(count)

    def graph_bytes(self, count: int) -> int:
        """About how many bytes the graph of a gradient on `count` images takes."""
        maps = count * self.bytes_per_image(gradients=True, transformed=True)
        return maps + WEIGHTS_IN_A_GRAPH * self.weight_bytes

    def bytes_per_image(self, *, gradients: bool, transformed: bool = False) -> int:
        """About how many bytes an image takes on its way through a network; see `memory.per_image`."""
        image = (self.real.channels, *self.real.image_size)
        return per_image(self.network(), image, gradients=gradients, transformed=transformed)

    @property
    def weight_bytes(self) -> int:
        """How many bytes the weights of a network take."""
        return sum(weight.nbytes for weight in self.network().parameters())

    @property
    def statistics_batch(self) -> int:
        """How many real images go through a network at once for the statistics of batch normalisation."""
        return STATISTICS_PER_CLASS * self.real.num_classes

    def _at_once(self, *, gradients: bool) -> int:
        if self.memory is None:
            return CHUNK[self.real.images.device.type]
        return max(1, self.memory // self.bytes_per_image(gradients=gradients, transformed=gradients))

    def class_augmentation(self, generator: torch.Generator) -> AugmentParams:
        """Draw a row of parameters for every class, a part of the strategy for each, as DSA does."""
        real = self.real
        return augment.sample(
            self.augmentation, real.num_classes, real.image_size, generator=generator, mode="each"
        )

    def network(self) -> Network:
        """Return a network for these images with uninitialised weights that require no gradient."""
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

    def set_batch_norm_statistics(self, network: Network, generator: torch.Generator) -> None:
        """Set the statistics of batch normalisation to those of 16 real images a class, and freeze them.

        Networks without batch normalisation are unchanged. The published DC code moves the statistics only a
        tenth of the way to these images, which in a new network leaves them mostly at 0 and 1.
        """
        if network.batch_normalised:
            index = self.real.sample(STATISTICS_PER_CLASS, generator).flatten()
            norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
            momenta = [norm.momentum for norm in norms]
            # Not by `torch.optim.swa_utils.update_bn`, which waits for the device.
            for norm in norms:
                norm.reset_running_stats()  # of a new network they may be NaN, which times 0 is not 0
                norm.momentum = 1.0
            with torch.no_grad():
                network.train()(self.real.batch(index))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            network.eval()

    def features(self, network: Network, images: Tensor) -> list[Tensor]:
        """Return the feature maps of images [N, C, H, W], computed in chunks; those not needed are empty.

        Batch normalisation in training mode takes its statistics from all of the images, in one chunk.
        """
        wanted = {len(network.blocks) - 1, *self.layers}
        whole = network.batch_normalised and network.training
        chunks = [
            network.features(c, wanted) for c in images.split(max(1, len(images)) if whole else self.chunk)
        ]
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def siamese(
        self,
        network: Network,
        images: Tensor,
        per_class: int,
        draws: torch.Generator,
        augmentations: torch.Generator,
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """Return features of synthetic images and of real ones, drawn and augmented alike, and their labels.

        Args:
            network: makes the features.
            images: synthetic ones [n, C, H, W].
            per_class: how many real images to draw.
            draws: generator that draws them.
            augmentations: generator that draws the augmentation of every class.
        """
        real, params = self.real, self.class_augmentation(augmentations)
        index = real.sample(per_class, draws).flatten()
        real_maps = self.real_features(network, real.augmented(index, params, real.labels[index]))
        maps = self.features(network, augment.apply(images, params, rows=self.labels))
        return maps, real_maps, *self.pair_labels(index)

    @torch.no_grad()
    def real_features(self, network: Network, images: Tensor) -> list[Tensor]:
        """Return the `features` of real images, as constants."""
        return self.features(network, images)


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
        generators: all that `match` draws from, if a GPU may record one match and replay it for the others:
            each must do the same work, read no values on the host, and change lasting tensors in place, see
            `mim4dd.graph.replayed`. None: it may not.
        remedy: the options to lower if its loss is not finite any more.
    """

    remedy: str = "--image-lr"
    trained: Sequence[dict[str, Any]] = ()
    generators: Sequence[torch.Generator] | None = None

    @property
    def network_lr(self) -> float | None:
        """The learning rate for training networks on these images, if the method learns one."""
        return None

    def prepare(self, images: Tensor, targets: Tensor) -> None:  # noqa: B027 - most need nothing
        """Do the part of a match that varies, such as training a network; called before it.

        Takes the images [n, C, H, W] and targets that are matched next, as constants.
        """

    def state(self) -> State | None:
        """Return what one match passes on to the next, so that an interrupted run can be resumed.

        By default the `generators`; networks that are trained meanwhile, and whatever else `prepare` keeps,
        belong to it too. None: unknown, so a run cannot be resumed.
        """
        if self.generators is None:
            return None
        return {f"generator {k}": generator for k, generator in enumerate(self.generators)}

    @abstractmethod
    def match(self, images: Tensor, targets: Tensor) -> Matched:
        """Match synthetic images against the problem's real ones.

        Args:
            images: float32 [n, C, H, W], normalised, in the order of the problem's labels.
            targets: what a network should predict: those labels, or probabilities [n, num_classes].
        """
