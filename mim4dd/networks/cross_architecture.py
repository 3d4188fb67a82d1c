"""The networks of the cross-architecture evaluation, all but the ConvNet itself.

Each takes the channels of the images, the outputs of its classifier, and the (height, width) of the images or
one side, and raises `InputError` where one of them is invalid.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..errors import InputError
from ..sizes import ImageSize, Size, check_counts, size_of
from .blocks import InstanceNorm, Residual
from .network import Network


class _Pixels(nn.Flatten):
    """Flattens images of one size; others would fail in the layer after it, without a mention of images."""

    def __init__(self, channels: int, size: Size) -> None:
        super().__init__()
        self.shape = (channels, *size)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:].numel() != math.prod(self.shape):
            expected = ", ".join(map(str, self.shape))
            raise InputError(
                f"images are {list(x.shape)}, expected [batch, {expected}], as the MLP was made for"
            )
        return super().forward(x)


def mlp(channels: int, num_classes: int, image_size: ImageSize) -> Network:
    """Two hidden layers of 128."""
    check_counts(channels=channels, num_classes=num_classes)
    size = size_of(image_size)
    blocks = [
        nn.Sequential(_Pixels(channels, size), nn.Linear(channels * math.prod(size), 128), nn.ReLU()),
        nn.Sequential(nn.Linear(128, 128), nn.ReLU()),
    ]
    return Network(blocks, channels, num_classes, image_size)


def lenet(channels: int, num_classes: int, image_size: ImageSize) -> Network:
    """LeNet-5 with ReLU and max pooling; the 5x5 map before the linear layers holds for any image size."""
    check_counts(channels=channels, num_classes=num_classes)
    blocks = [
        nn.Sequential(nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 16, 5, padding=2), nn.ReLU(), nn.AdaptiveMaxPool2d(5)),
        nn.Sequential(nn.Flatten(), nn.Linear(400, 120), nn.ReLU()),
        nn.Sequential(nn.Linear(120, 84), nn.ReLU()),
    ]
    return Network(blocks, channels, num_classes, image_size)


def alexnet(channels: int, num_classes: int, image_size: ImageSize) -> Network:
    """AlexNet in its small-image form: five convolutions, three poolings."""
    check_counts(channels=channels, num_classes=num_classes)
    blocks = [
        nn.Sequential(nn.Conv2d(channels, 128, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(128, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(192, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 192, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(192, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    ]
    return Network(blocks, channels, num_classes, image_size)


def vgg11(channels: int, num_classes: int, image_size: ImageSize) -> Network:
    """VGG-11 with instance normalisation, pooled to 1x1 at the end."""
    check_counts(channels=channels, num_classes=num_classes)
    widths = (64, 128, 256, 256, 512, 512, 512, 512)
    pooled = (True, True, False, True, False, True, False, False)
    blocks = []
    side = min(size_of(image_size))
    for k, (wide, pool) in enumerate(zip(widths, pooled, strict=True)):
        convolution = nn.Conv2d(widths[k - 1] if k else channels, wide, 3, padding=1)
        layers = [convolution, InstanceNorm(wide), nn.ReLU()]
        if pool and side >= 4:  # a 1x1 map would leave instance normalisation nothing to normalise
            layers.append(nn.MaxPool2d(2))
            side //= 2
        blocks.append(nn.Sequential(*layers))
    blocks[-1].append(nn.AdaptiveMaxPool2d(1))
    return Network(blocks, channels, num_classes, image_size)


def resnet18(channels: int, num_classes: int, image_size: ImageSize) -> Network:
    """ResNet-18 for small images (3x3 stem, no first pooling) with instance normalisation."""
    check_counts(channels=channels, num_classes=num_classes)
    blocks: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1, bias=False), InstanceNorm(64), nn.ReLU())
    ]
    side, before = min(size_of(image_size)), 64
    for wide, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        if side < 4:
            stride = 1  # as in vgg11: no 1x1 maps
        blocks.append(nn.Sequential(Residual(before, wide, stride), Residual(wide, wide, 1)))
        side, before = -(-side // stride), wide
    blocks.append(nn.AdaptiveAvgPool2d(1))
    return Network(blocks, channels, num_classes, image_size)
