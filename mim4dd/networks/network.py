"""What all networks have in common: a row of blocks, and a linear classifier."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from ..dtypes import at_least_float32
from ..errors import InputError
from ..sizes import ImageSize, size_of
from .blocks import Classifier
from .precision import autocast


class Network(nn.Module):
    """Blocks in a row and a linear classifier on the last block's flattened output.

    Args:
        blocks: modules; each maps the output of the one before.
        channels: channels of the images.
        num_classes: outputs of the classifier.
        image_size: (height, width) of the images, or one side.

    Attributes:
        image_size: (height, width) of the images.
        feature_sizes: numbers of features an image has after each block.
        batch_normalised: whether, in training mode, an image's features depend on the others in its batch.
        precision: what the blocks compute in, see `mim4dd.networks.precision`; what they return is float32
            at least.
    """

    precision = "fp32"

    def __init__(
        self, blocks: Sequence[nn.Module], channels: int, num_classes: int, image_size: ImageSize
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        shapes = copy.deepcopy(self.blocks).to("meta")
        self.image_size = size_of(image_size)
        x = torch.empty(2, channels, *self.image_size, device="meta")
        self.feature_sizes = tuple((x := block(x))[0].numel() for block in shapes)
        self.classifier: nn.Module = Classifier(self.feature_sizes[-1], num_classes)
        self.batch_normalised = any(isinstance(m, nn.BatchNorm2d) for m in self.blocks.modules())

    def features(self, x: Tensor, layers: Collection[int] | None = None) -> list[Tensor]:
        """Return the output of every block, first to last, for images x [B, C, H, W].

        Where `layers` is given, the outputs of all other blocks are empty.
        """
        maps = []
        with autocast(self.precision, x.device):
            for k, block in enumerate(self.blocks):
                x = block(x)
                wanted = x if layers is None or k in layers else empty_map(x)
                maps.append(at_least_float32(wanted))
        return maps

    def embed(self, x: Tensor) -> Tensor:
        """Return the last block's output, flattened to [B, D]."""
        return self.features(x, (len(self.blocks) - 1,))[-1].flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class logits [B, num_classes].

        Raises:
            InputError: the images are of a size that the classifier was not made for.
        """
        last = self.features(x, (len(self.blocks) - 1,))[-1]
        # The classifier may be another module by now: a user's own, or none (`nn.Identity`).
        count = last.shape[1:].numel()
        if count != getattr(self.classifier, "in_features", count):
            raise InputError(
                f"images are {list(x.shape)}, expected [batch, channels, {self.image_size[0]}, "
                f"{self.image_size[1]}], the image_size that the classifier was made for"
            )
        return self.classify(last)

    def classify(self, last: Tensor) -> Tensor:
        """Return the class logits [B, num_classes] for the last of `features`."""
        if isinstance(self.classifier, Classifier) and last.device.type == "cuda":
            return self.classifier(last)
        features = last.flatten(1)
        weight = next(self.classifier.parameters(), features)
        return self.classifier(features.to(weight.dtype))


def empty_map(x: Tensor) -> Tensor:
    """Return an empty map [B, 0, ...] in place of x [B, C, ...]."""
    return x[:, :0].clone()  # a view would keep all of x in memory
