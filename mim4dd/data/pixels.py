"""The pixels of a whole set: brought to [0, 1], to another size, and measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import InputError

CHUNK = 4096  # images converted to floats at a time, at most
CHUNK_PIXELS = 1 << 26
UNIT_ENDS = 2  # floats that never exceed this cannot be of 0..255, or all images would be black
OVERSHOOT = 1e-3  # rounding takes pixels beyond a bound by less than this share of it, even in float16


def full_scale(images: Tensor) -> int:
    """Return what a stored pixel of full brightness is: 255 in uint8, 1 in floats."""
    return 255 if images.dtype == torch.uint8 else 1


def chunks(images: Tensor) -> Sequence[Tensor]:
    """Return images [N, C, H, W] in parts that are small as floats."""
    return images.split(max(1, min(CHUNK, CHUNK_PIXELS // math.prod(images.shape[1:]))))


def unit(images: Tensor) -> Tensor:
    """Return stored pixels as float32 in [0, 1]."""
    return images.float() / full_scale(images)


def to_unit(train: Tensor, test: Tensor, source: str) -> tuple[Tensor, Tensor]:
    """Return both sets [N, C, H, W] as float32 in [0, 1], or unchanged where both are uint8 and not masks.

    Floats within [0, 1] stay; those within [0, 255], some of them above 2, are divided by 255. Up to a
    thousandth beyond these ranges is clamped. Any other range is mapped to [0, 1] by the smallest and largest
    training pixel, with test images clamped.

    Raises:
        InputError: training and test images are scaled differently.
    """
    brightest = float(train.max()), float(test.max())
    if max(brightest) <= 1 + OVERSHOOT:  # uint8 of 0 and 1 are masks, where 1 is white
        train, test = train.float(), test.float()
    if train.dtype == test.dtype == torch.uint8:
        return train, test
    if torch.uint8 in (train.dtype, test.dtype) and min(brightest) <= UNIT_ENDS < max(brightest):
        raise InputError(
            f"{source}: training images of {_kind(train)}, test images of {_kind(test)}; scale them alike"
        )
    train, test = train.float(), test.float()
    low, high = float(train.min()), float(train.max())
    top = 255 if high > UNIT_ENDS else 1
    slack = top * OVERSHOOT
    if low < -slack or high > top + slack:
        span = max(high - low, torch.finfo(torch.float32).tiny)
        return (train - low) / span, ((test - low) / span).clamp(0, 1)
    if float(test.min()) < -slack or float(test.max()) > top + slack:
        raise InputError(
            f"{source}: training images within [0, {top}], test images within "
            f"[{float(test.min()):g}, {float(test.max()):g}]; scale them alike"
        )
    return (train / top).clamp(0, 1), (test / top).clamp(0, 1)


def _kind(images: Tensor) -> str:
    name = "bytes" if images.dtype == torch.uint8 else "floats"
    return f"{name} within [{float(images.min()):g}, {float(images.max()):g}]"


def resized(images: Tensor, size: int) -> Tensor:
    """Return images [N, C, H, W] with `size` pixels a side, of the dtype they had."""
    if images.shape[-1] == size:
        return images
    parts = []
    for chunk in chunks(images):
        part = interpolate(chunk.float(), size=(size, size), mode="bilinear", antialias=True)
        parts.append(part.round_().to(torch.uint8) if images.dtype == torch.uint8 else part)
    return torch.cat(parts)


def measure(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float32 [C], of pixels in [0, 1]."""
    total = torch.zeros(2, images.shape[1], dtype=torch.float64, device=images.device)
    for chunk in chunks(images):
        pixels = chunk.double()
        total += torch.stack([pixels.sum((0, 2, 3)), pixels.square_().sum((0, 2, 3))])
    full = full_scale(images)
    mean, square = (total / (images.numel() // images.shape[1])).unbind()
    mean, square = mean / full, square / full**2
    variance = (square - mean.square()).clamp(min=1e-12)  # a constant channel must not divide by 0
    return mean.float(), variance.sqrt().float()
