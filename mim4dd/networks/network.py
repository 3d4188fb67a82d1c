"""What all networks have in common: a row of blocks, and a linear classifier."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from ..errors import InputError
from .precision import autocast

Size = tuple[int, int]
ImageSize = int | Sequence[int]  # a side, or height and width


def size_of(image_size: object) -> Size:
    """Return the height and width: of a square, given one side, or of any sequence of the two.

    Raises:
        InputError: it is neither.
    """
    match [image_size] * 2 if isinstance(image_size, Integral) else image_size:
        case [Integral() as height, Integral() as width] if min(int(height), int(width)) > 0:
            return int(height), int(width)
    raise InputError(f"image_size is {image_size!r}, expected (height, width) or one side, in pixels")


class Network(nn.Module):
    """Blocks in a row and a linear classifier on the last block's flattened output.

    Args:
        blocks: modules; each maps the output of the one before.
        channels: channels of the images.
        num_classes: outputs of the classifier.
        image_size: (height, width) of the images, or one side.

    Attributes:
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
        x = torch.empty(2, channels, *size_of(image_size), device="meta")
        self.feature_sizes = tuple((x := block(x))[0].numel() for block in shapes)
        self.classifier = nn.Linear(self.feature_sizes[-1], num_classes)
        self.batch_normalised = any(isinstance(m, nn.BatchNorm2d) for m in self.blocks.modules())

    def features(self, x: Tensor, layers: Collection[int] | None = None) -> list[Tensor]:
        """Return the output of every block, first to last, for images x [B, C, H, W].

        Where `layers` is given, the outputs of all other blocks are empty.
        """
        maps = []
        with autocast(self.precision, x.device):
            for k, block in enumerate(self.blocks):
                x = block(x)
                wanted = x if layers is None or k in layers else nothing_of(x)
                maps.append(wanted.to(torch.promote_types(x.dtype, torch.float32)))
        return maps

    def embed(self, x: Tensor) -> Tensor:
        """Return the last block's output, flattened to [B, D]."""
        return self.features(x, (len(self.blocks) - 1,))[-1].flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class logits [B, num_classes]."""
        return self.classifier(self.embed(x))


def nothing_of(x: Tensor) -> Tensor:
    """Return an empty map [B, 0, ...] in place of x [B, C, ...]."""
    return x[:, :0].clone()  # a view would keep all of x in memory
