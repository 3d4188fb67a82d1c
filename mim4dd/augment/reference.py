"""The augmentation in plain PyTorch, and what it refuses: the maths that the compiled op is compared with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dtypes import at_least_float32

if TYPE_CHECKING:
    from . import AugmentParams


def augment(
    images: Tensor,
    params: AugmentParams,
    rows: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    align_corners: bool,
) -> Tensor:
    """What `augment.apply` promises, on checked arguments."""
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(params, rows)
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


# -------------------------------------------------------------------------------------------------- checking

_FLOATS = (torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
_FIELD_DTYPES = {"shift_y": _INTEGERS, "shift_x": _INTEGERS, "cutout": _INTEGERS, "flip": (torch.bool,)}
_IMAGE_DTYPES = (torch.float16, torch.bfloat16, *_FLOATS, torch.uint8)
_MAX_SIDE = 16384  # kMaxSide of csrc/augment/augment.h


def _error(message: str) -> ValueError:
    return ValueError(f"mim4dd.augment.apply: {message}")


def check(
    images: Tensor, params: AugmentParams, rows: Tensor | None, mean: Tensor | None, std: Tensor | None
) -> None:
    """Check what is known without looking at values."""
    if images.ndim != 4 or images.dtype not in _IMAGE_DTYPES:
        raise _error(
            f"images is {list(images.shape)} of {images.dtype}, expected [batch, channels, height, width] of "
            f"{_either(_IMAGE_DTYPES)}"
        )
    if not all(1 <= size <= _MAX_SIDE for size in images.shape[1:]):
        raise _error(
            f"images is {list(images.shape)}, expected sizes from 1 to {_MAX_SIDE} but for the batch"
        )
    count = len(images) if rows is None else len(params)
    for name, field in params.fields().items():
        expected = (count, 4) if name == "cutout" else (count,)
        if field.shape != expected:
            per = "one row per image, or rows=" if rows is None else "as many rows as params.brightness"
            raise _error(f"params.{name} is {list(field.shape)}, expected {list(expected)}, {per}")
        dtypes = _FIELD_DTYPES.get(name, _FLOATS)
        if field.dtype not in dtypes:
            raise _error(f"params.{name} is of {field.dtype}, expected {_either(dtypes)}")
        _check_device(f"params.{name}", field, images)
    if rows is not None:
        if rows.shape != images.shape[:1] or rows.dtype != torch.int64:
            raise _error(f"rows is {list(rows.shape)} of {rows.dtype}, expected torch.int64 [{len(images)}]")
        _check_device("rows", rows, images)
    if (mean is None) != (std is None):
        raise _error("mean and std are given together or not at all")
    for name, value in (("mean", mean), ("std", std)):
        if value is not None:
            if value.shape != images.shape[1:2] or value.dtype != torch.float32 or not value.is_contiguous():
                raise _error(
                    f"{name} is {list(value.shape)} of {value.dtype}, expected contiguous torch.float32 "
                    f"[{images.shape[1]}], one per channel"
                )
            _check_device(name, value, images)


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)


def _check_device(name: str, value: Tensor, images: Tensor) -> None:
    if value.device != images.device:
        raise _error(f"{name} is on {value.device} and images on {images.device}")


def _check_values(params: AugmentParams, rows: Tensor | None) -> None:
    for name, field in params.fields().items():
        if not field.isfinite().all():
            raise _error(f"params.{name} is not finite")
    if rows is not None and len(rows):
        low, high = (int(bound) for bound in rows.aminmax())
        if low < 0 or high >= len(params):
            raise _error(f"rows holds {low} to {high}, expected 0 to {len(params) - 1}")
