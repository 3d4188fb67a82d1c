"""What `augment.apply` accepts; every error names the argument, what it is and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from .params import AugmentParams

_FLOATS = (torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
_FIELD_DTYPES = {"shift_y": _INTEGERS, "shift_x": _INTEGERS, "cutout": _INTEGERS, "flip": (torch.bool,)}
_IMAGE_DTYPES = (torch.float16, torch.bfloat16, *_FLOATS, torch.uint8)
_ROW_DTYPES = (torch.uint8, torch.int8, torch.int16, *_INTEGERS)
_MAX_SIDE = 16384  # kMaxSide of csrc/augment/augment.h

_OPTIONAL = ("rows", "mean", "std")

Prepared = tuple[AugmentParams, Tensor | None, Tensor | None, Tensor | None]


def _error(message: str) -> ValueError:
    return ValueError(f"mim4dd.augment.apply: {message}")


def prepare(
    images: Tensor, params: AugmentParams, rows: Tensor | None, mean: Tensor | None, std: Tensor | None
) -> Prepared:
    """Return params, rows, mean and std as they are computed with, if all are of the types they should be."""
    if not isinstance(images, Tensor):
        raise _error(f"images is {_kind(images)}, expected a tensor [batch, channels, height, width]")
    if not isinstance(params, AugmentParams):
        raise _error(f"params is {_kind(params)}, expected AugmentParams, such as augment.sample draws")
    grad = torch.is_grad_enabled()
    saved = grad and images.requires_grad and not torch.compiler.is_compiling()
    copied = False
    for name, value in (*params.stored().items(), ("rows", rows), ("mean", mean), ("std", std)):
        if value is None and name in _OPTIONAL:
            continue
        if not isinstance(value, Tensor):
            raise _error(f"{_named(name)} is {_kind(value)}, expected a tensor")
        if grad and value.requires_grad:
            raise _error(f"{_named(name)} requires a gradient, which augment.apply does not give; detach it")
        copied = copied or (saved and value.is_inference())
    if copied:  # autograd refuses to save what was made in inference mode
        params = params.map_rows(torch.clone)
        rows, mean, std = (value if value is None else value.clone() for value in (rows, mean, std))
    if rows is not None and rows.dtype in _ROW_DTYPES:
        rows = rows.long()
    if mean is not None and mean.is_floating_point():
        mean = mean.float().contiguous()
    if std is not None and std.is_floating_point():
        std = std.float().contiguous()
    return params, rows, mean, std


def check(
    images: Tensor, params: AugmentParams, rows: Tensor | None, mean: Tensor | None, std: Tensor | None
) -> None:
    """Check all that is known of what `prepare` returned without looking at values."""
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
            raise _error(f"rows is {list(rows.shape)} of {rows.dtype}, expected integers [{len(images)}]")
        _check_device("rows", rows, images)
    if (mean is None) != (std is None):
        raise _error("mean and std are given together or not at all")
    for name, value in (("mean", mean), ("std", std)):
        if value is not None:
            if value.shape != images.shape[1:2] or value.dtype != torch.float32:
                raise _error(
                    f"{name} is {list(value.shape)} of {value.dtype}, expected floats [{images.shape[1]}], "
                    "one per channel"
                )
            _check_device(name, value, images)


def check_values(params: AugmentParams, rows: Tensor | None, std: Tensor | None) -> None:
    """Check what is looked at on a CPU only, where nobody has to wait for it."""
    if std is not None and not (std > 0).all():
        raise _error(f"std is {std.tolist()}, expected a positive number for every channel")
    for name, field in params.fields().items():
        if not field.isfinite().all():
            raise _error(f"params.{name} is not finite")
    if rows is not None and len(rows):
        low, high = (int(bound) for bound in rows.aminmax())
        if low < 0 or high >= len(params):
            raise _error(f"rows holds {low} to {high}, expected 0 to {len(params) - 1}")


def _named(name: str) -> str:
    return name if name in _OPTIONAL else f"params.{name}"


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)


def _check_device(name: str, value: Tensor, images: Tensor) -> None:
    if value.device != images.device:
        raise _error(f"{name} is on {value.device} and images on {images.device}")
