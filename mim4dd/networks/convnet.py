"""The ConvNet of the field, and its depth by image size."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..errors import InputError, unknown
from ..sizes import ImageSize, Size, check_counts, size_of
from .blocks import InstanceNorm, OnePassBlock
from .network import Network

_NORMS: dict[str, Callable[[int, Size], nn.Module]] = {
    "instance": lambda channels, _: InstanceNorm(channels),
    "group": lambda channels, _: nn.GroupNorm(4, channels),
    "layer": lambda channels, size: nn.LayerNorm((channels, *size)),
    "batch": lambda channels, _: nn.BatchNorm2d(channels),
    "none": lambda *_: nn.Identity(),
}
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.01),
    "sigmoid": nn.Sigmoid,
}
_POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "avg": lambda: nn.AvgPool2d(2),
    "max": lambda: nn.MaxPool2d(2),
    "none": nn.Identity,
}


class ConvNet(Network):
    """The field's ConvNet: depth x (convolution 3x3, normalisation, activation, pooling by 2), linear.

    One-channel 28x28 images are padded to 32x32 by the first convolution. With the defaults it has 317,706
    parameters for 1x28x28 and 320,010 for 3x32x32 (10 classes), and 2,048 last features.

    Args:
        channels: channels of the images.
        num_classes: outputs of the classifier.
        width: channels of every block.
        depth: number of blocks; each halves the map when it pools.
        norm: "instance", "group" (4 groups), "layer", "batch" or "none".
        activation: "relu", "leaky_relu" or "sigmoid".
        pooling: "avg", "max" or "none".
        image_size: (height, width) of the images, or one side.

    Raises:
        InputError: an unknown name, something that is no number or image size, or more blocks than the image
            can be halved.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        width: int = 128,
        depth: int = 3,
        norm: str = "instance",
        activation: str = "relu",
        pooling: str = "avg",
        image_size: ImageSize = (32, 32),
    ) -> None:
        make_activation = _pick("activation", activation, _ACTIVATIONS)
        make_pooling = _pick("pooling", pooling, _POOLINGS)
        make_norm = _pick("norm", norm, _NORMS)
        check_counts(channels=channels, num_classes=num_classes, width=width, depth=depth)
        image_size = size_of(image_size)
        padded = channels == 1 and image_size == (28, 28)
        height, width_px = (32, 32) if padded else image_size
        if pooling != "none" and min(height, width_px) >> depth == 0:
            raise InputError(
                f"ConvNet: {depth} blocks halve {height}x{width_px} to nothing; use a smaller depth"
            )
        blocks: list[nn.Module] = []
        for k in range(depth):
            shrink = k if pooling != "none" else 0
            convolution = nn.Conv2d(
                channels if k == 0 else width, width, 3, padding=3 if padded and k == 0 else 1
            )
            if (norm, activation, pooling) == ("instance", "relu", "avg"):
                blocks.append(OnePassBlock(convolution, InstanceNorm(width, relu=True, pool=2)))
            else:
                size = (height >> shrink, width_px >> shrink)
                blocks.append(
                    nn.Sequential(convolution, make_norm(width, size), make_activation(), make_pooling())
                )
        super().__init__(blocks, channels, num_classes, image_size)


def depth_for(image_size: ImageSize) -> int:
    """Return the ConvNet depth the field uses at a size: 2 at 8x8, 3 from 16 to 63, 4 at 64, 5 at 128."""
    halvings = min(size_of(image_size)).bit_length() - 1
    return max(halvings - 2, min(halvings - 1, 3))


def _pick(kind: str, name: str, table: dict[str, Callable]) -> Callable:
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]
