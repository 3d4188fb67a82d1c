"""The augmentation in plain PyTorch: the maths that the compiled op is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dtypes import at_least_float32
from .checks import check_values
from .params import AugmentParams


def augment(
    images: Tensor,
    params: AugmentParams,
    rows: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    align_corners: bool,
) -> Tensor:
    """`augment.apply` on checked arguments."""
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        check_values(params, rows, std)
    if rows is not None:
        params = params[rows]
    x = at_least_float32(images)
    if images.dtype == torch.uint8:
        x = x / 255
    if mean is not None and std is not None:
        x = (x - mean[:, None, None]) / std[:, None, None]
    x = _cutout(resample(_colour(x, params), params, align_corners), params)
    return x.to(images.dtype if images.is_floating_point() else torch.float32)


def _colour(images: Tensor, params: AugmentParams) -> Tensor:
    brightness, saturation, contrast = (
        field.to(images.dtype)[:, None, None, None]
        for field in (params.brightness, params.saturation, params.contrast)
    )
    images = images + brightness
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * saturation + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * contrast + mean


def resample(images: Tensor, params: AugmentParams, align_corners: bool) -> Tensor:
    """Sample at shift(flip(scale(rotate(p)))), p counted in pixels from the centre so that no step rounds."""
    height, width = images.shape[2:]
    dtype = images.dtype

    def per_image(field: Tensor) -> Tensor:
        return field.to(dtype)[:, None, None]

    y = torch.arange(height, device=images.device, dtype=dtype)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=images.device, dtype=dtype)[None, :] - (width - 1) / 2
    # A rotation acts on normalised coordinates: pixels over half the side, whose ends align_corners defines.
    aspect = max(width - 1, 1) / max(height - 1, 1) if align_corners else width / height
    angle = per_image(params.degrees) * (math.pi / 180)
    sample_x = (angle.cos() * x - angle.sin() * aspect * y) * per_image(params.scale_x)
    sample_y = (angle.sin() / aspect * x + angle.cos() * y) * per_image(params.scale_y)
    sample_x = torch.where(params.flip[:, None, None], -sample_x, sample_x)
    sample_x = sample_x + per_image(params.shift_x) + (width - 1) / 2
    sample_y = sample_y + per_image(params.shift_y) + (height - 1) / 2
    return _bilinear(images, sample_y.clamp(-1, height), sample_x.clamp(-1, width))


def _bilinear(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Interpolate images [B, C, H, W] at pixel coordinates y, x [B, H, W]; zeros outside."""
    channels, height, width = images.shape[1:]
    pixels = images.flatten(2)
    top, left = y.floor(), x.floor()
    total: Tensor | float = 0.0
    for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = torch.where(inside, row * width + column, 0).long().flatten(1)
            corner = pixels.gather(2, index[:, None].expand(-1, channels, -1)).view_as(images)
            total = total + corner * (weight_y * weight_x * inside)[:, None]
    assert isinstance(total, Tensor)
    return total


def _cutout(images: Tensor, params: AugmentParams) -> Tensor:
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)[None, :]
    y0, y1, x0, x1 = params.cutout.T[:, :, None, None]
    box = (y >= y0) & (y <= y1) & (x >= x0) & (x <= x1)
    return images.masked_fill(box[:, None], 0)
