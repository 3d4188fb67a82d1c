"""The pixels of a whole set: brought to [0, 1], to another size, and measured."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import InputError

CHUNK = 4096  # images converted to floats at a time


def to_unit(train: Tensor, test: Tensor, source: str) -> tuple[Tensor, Tensor]:
    """Bring floats to [0, 1]: as they are, from [0, 255], or from the training images' range; bytes stay."""
    if max(float(train.max()), float(test.max())) <= 1:  # as of masks: whole numbers, but not of 0 to 255
        train, test = train.float(), test.float()
    if train.dtype == test.dtype == torch.uint8:
        return train, test
    if torch.uint8 in (train.dtype, test.dtype) and min(float(train.max()), float(test.max())) <= 1:
        raise InputError(
            f"{source}: training images of {_kind(train)}, test images of {_kind(test)}; scale them alike"
        )
    train, test = train.float(), test.float()
    low, high = float(train.min()), float(train.max())
    for top in (1, 255):
        if low >= 0 and high <= top:
            if float(test.min()) < 0 or float(test.max()) > top:
                raise InputError(
                    f"{source}: training images within [0, {top}], test images within "
                    f"[{float(test.min()):g}, {float(test.max()):g}]; scale them alike"
                )
            return (train, test) if top == 1 else (train / top, test / top)
    span = max(high - low, torch.finfo(torch.float32).tiny)
    return (train - low) / span, ((test - low) / span).clamp(0, 1)


def _kind(images: Tensor) -> str:
    name = "bytes" if images.dtype == torch.uint8 else "floats"
    return f"{name} within [{float(images.min()):g}, {float(images.max()):g}]"


def resized(images: Tensor, size: int) -> Tensor:
    """Return images [N, C, H, W] with `size` pixels a side, of the dtype they had."""
    if images.shape[-1] == size:
        return images
    parts = []
    for chunk in images.split(CHUNK):
        part = interpolate(chunk.float(), size=(size, size), mode="bilinear", antialias=True)
        parts.append(part.round_().to(torch.uint8) if images.dtype == torch.uint8 else part)
    return torch.cat(parts)


def measure(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float32 [C], of pixels in [0, 1]."""
    total = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for chunk in images.split(CHUNK):
        pixels = chunk.double()
        total += torch.stack([pixels.sum((0, 2, 3)), pixels.square_().sum((0, 2, 3))])
    unit = 255 if images.dtype == torch.uint8 else 1
    mean, square = total / (images.numel() // images.shape[1]) / torch.tensor([[unit], [unit**2]])
    variance = (square - mean.square()).clamp(min=1e-12)  # a constant channel must not divide by 0
    return mean.float(), variance.sqrt().float()
