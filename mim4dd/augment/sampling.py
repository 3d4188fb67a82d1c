"""Drawing the parameters of an augmentation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .params import AugmentParams

DSA = "color_crop_cutout_flip_scale_rotate"

BRIGHTNESS = 1.0
SATURATION = 2.0
CONTRAST = 0.5
CROP = 0.125  # of the side
CUTOUT = 0.5  # of the side
SCALE = 1.2
ROTATE = 15.0  # degrees

Size = tuple[int, int]


class _Range(NamedTuple):
    """What is drawn uniformly: a number from low to high, or an integer from low to before high."""

    name: str
    low: float
    high: float
    whole: bool = False


def _ranges(part: str, size: Size) -> list[_Range]:
    """What a part of a strategy draws, in this order, for images (height, width)."""
    match part:
        case "color":
            return [
                _Range("brightness", -BRIGHTNESS / 2, BRIGHTNESS / 2),
                _Range("saturation", 0, SATURATION),
                _Range("contrast", CONTRAST, CONTRAST + 1),
            ]
        case "crop":
            return _shifts(_of(size, CROP))
        case "cutout":  # where the box starts; it may stick out
            return [
                _Range(name, -(box // 2), side + 1 - box % 2 - box // 2, whole=True)
                for name, side, box in zip(("cut_y", "cut_x"), size, _of(size, CUTOUT), strict=True)
            ]
        case "flip":
            return [_Range("flip", 0, 2, whole=True)]
        case "scale":
            return [_Range(name, 1 / SCALE, SCALE) for name in ("scale_x", "scale_y")]
        case "rotate":
            return [_Range("degrees", -ROTATE, ROTATE)]
    raise AssertionError(part)


def _of(size: Size, share: float) -> Size:
    """A share of each side, rounded."""
    return int(size[0] * share + 0.5), int(size[1] * share + 0.5)


def _shifts(reach: Size) -> list[_Range]:
    return [
        _Range(name, -far, far + 1, whole=True)
        for name, far in zip(("shift_y", "shift_x"), reach, strict=True)
    ]


def parts_of(strategy: str) -> list[str]:
    """Return the parts of a strategy string.

    Raises:
        ValueError: an unknown part, or one twice.
    """
    parts = [] if strategy in ("", "none") else strategy.split("_")
    for part in parts:
        if part not in DSA.split("_"):
            raise ValueError(
                f"mim4dd.augment: unknown part {part!r} of strategy {strategy!r}, expected some of {DSA}"
            )
    if len(set(parts)) < len(parts):
        raise ValueError(
            f"mim4dd.augment: strategy {strategy!r} has a part twice, expected each at most once"
        )
    return parts


def sample(
    strategy: str,
    batch: int,
    image_size: int | Size,
    *,
    generator: torch.Generator,
    siamese: bool = False,
    mode: str = "single",
) -> AugmentParams:
    """Draw augmentation parameters on the generator's device, without a host synchronisation.

    Args:
        strategy: parts joined by "_", of color, crop, cutout, flip, scale, rotate; "" or "none" for none.
        batch: number of rows.
        image_size: height and width, or one side.
        generator: the only source of randomness.
        siamese: draw one row and repeat it.
        mode: "single" draws one part of the strategy per call, "each" one per row (what the published siamese
            augmentation does, a call per class), "all" applies every part.

    Raises:
        ValueError: an unknown part or mode.
    """
    params = sample_each(strategy, 1 if siamese else batch, image_size, generators=[generator], mode=mode)
    if siamese:
        params = params.map(lambda field: field.expand(batch, *field.shape[1:]))
    return params


def sample_each(
    strategy: str,
    batch: int,
    image_size: int | Size,
    *,
    generators: Sequence[torch.Generator],
    mode: str = "single",
) -> AugmentParams:
    """Draw `batch` rows from each generator, as `sample` does, one after the other.

    Args:
        strategy: see `sample`.
        batch: number of rows from each.
        image_size: see `sample`.
        generators: all on one device; in mode "single" each draws its part.
        mode: see `sample`.

    Raises:
        ValueError: an unknown part or mode.
    """
    parts = parts_of(strategy)
    if mode not in ("single", "each", "all"):
        raise ValueError(f"mim4dd.augment.sample: mode is {mode!r}, expected 'single', 'each' or 'all'")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    device = generators[0].device
    if not parts:
        return AugmentParams.identity(batch * len(generators), device=device)
    if device.type != "cpu":
        return _at_once(tuple(parts), batch, size, generators, mode)
    drawn = [_one_by_one(parts, batch, size, generator, mode) for generator in generators]
    if len(drawn) == 1:
        return drawn[0]
    columns = zip(*(params.fields().values() for params in drawn), strict=True)
    return AugmentParams(*(torch.cat(fields) for fields in columns))


def pad_and_crop(batch: int, padding: int, *, generator: torch.Generator) -> AugmentParams:
    """Draw the usual random crop: pad with `padding` zeros on every side, cut the old size out anywhere.

    Raises:
        ValueError: negative padding.
    """
    if padding < 0:
        raise ValueError(f"mim4dd.augment.pad_and_crop: padding is {padding}, expected 0 or more pixels")
    identity = AugmentParams.identity(batch, device=generator.device)
    return dataclasses.replace(
        identity, **{shift.name: _uniform(shift, batch, generator) for shift in _shifts((padding, padding))}
    )


# -------------------------------------------------------------------------- on a CPU: only what is wanted


def _one_by_one(
    parts: Sequence[str], rows: int, size: Size, generator: torch.Generator, mode: str
) -> AugmentParams:
    fields = AugmentParams.identity(rows).fields()
    if mode == "all":
        for part in parts:
            fields |= _fields(part, rows, size, generator)
    elif mode == "single":
        fields |= _fields(
            parts[int(torch.randint(len(parts), (), generator=generator))], rows, size, generator
        )
    else:
        chosen = torch.randint(len(parts), (rows, 1), generator=generator)
        for k, part in enumerate(parts):
            for name, value in _fields(part, rows, size, generator).items():
                mask = chosen == k
                fields[name] = torch.where(mask if value.ndim > 1 else mask[:, 0], value, fields[name])
    return AugmentParams(**fields)


def _fields(part: str, rows: int, size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    """The fields of AugmentParams that a part sets."""
    drawn = {of.name: _uniform(of, rows, generator) for of in _ranges(part, size)}
    if part == "cutout":
        boxes = zip(drawn.values(), _of(size, CUTOUT), strict=True)
        return {
            "cutout": torch.stack([edge for first, box in boxes for edge in (first, first + (box - 1))], 1)
        }
    return {"flip": drawn["flip"].bool()} if part == "flip" else drawn


def _uniform(of: _Range, rows: int, generator: torch.Generator) -> Tensor:
    device = generator.device
    if of.whole:
        return torch.randint(int(of.low), int(of.high), (rows,), generator=generator, device=device)
    return torch.empty(rows, device=device).uniform_(of.low, of.high, generator=generator)


# ----------------------------------------------- on a GPU: all at once, for there every operator is a launch


class _Table(NamedTuple):
    """Of each column that is drawn at once, [columns, 1]: its range, and its part and value without it."""

    low: Tensor
    span: Tensor
    part: Tensor
    identity: Tensor
    source: Tensor  # [columns], which of the uniform numbers: both ends of a box have one


NUMBERS = ("brightness", "saturation", "contrast", "scale_x", "scale_y", "degrees")
COLUMNS = (*NUMBERS, "flip", "shift_y", "shift_x", "cut_y", "cut_y end", "cut_x", "cut_x end")
FIRST_WHOLE = len(NUMBERS)
IDENTITY = {"saturation": 1.0, "contrast": 1.0, "scale_x": 1.0, "scale_y": 1.0}
IDENTITY |= dict.fromkeys(COLUMNS[-4:], -1.0)


@functools.cache  # never given up: recorded steps read it
def _table(parts: tuple[str, ...], size: Size, device: torch.device) -> _Table:
    """Made once, for nothing that is recorded may copy from the host."""
    of_column = {of.name: (k, of) for k, part in enumerate(parts) for of in _ranges(part, size)}
    for name, box in zip(("cut_y", "cut_x"), _of(size, CUTOUT), strict=True):
        if name in of_column:
            k, of = of_column[name]
            of_column[f"{name} end"] = k, of._replace(low=of.low + box - 1, high=of.high + box - 1)
    rows = []
    for column in COLUMNS:
        identity = IDENTITY.get(column, 0.0)
        k, of = of_column.get(column, (-1, _Range(column, identity, identity)))
        rows.append((of.low, of.high - of.low, k, identity))
    source = torch.tensor([COLUMNS.index(column.removesuffix(" end")) for column in COLUMNS], device=device)
    low, span, of_part, without = torch.tensor(rows, device=device)[:, :, None].unbind(1)
    return _Table(low, span, of_part, without, source)


def _at_once(
    parts: tuple[str, ...], batch: int, size: Size, generators: Sequence[torch.Generator], mode: str
) -> AugmentParams:
    device = generators[0].device
    table = _table(parts, size, device)
    drawn = torch.cat([torch.rand(len(COLUMNS), batch, generator=r, device=device) for r in generators], 1)
    values = drawn[table.source] * table.span
    values[FIRST_WHOLE:].floor_()  # of the product: it stays below the span, whatever is added to it
    values += table.low
    if mode != "all":
        count = 1 if mode == "single" else batch
        choices = [torch.randint(len(parts), (count,), generator=r, device=device) for r in generators]
        chosen = torch.stack(choices)[:, :, None].expand(-1, -1, 1 if mode == "each" else batch).flatten()
        values = torch.where(table.part == chosen, values, table.identity)
    whole = values[FIRST_WHOLE:].long()
    brightness, saturation, contrast, scale_x, scale_y, degrees = values[:FIRST_WHOLE]
    flip, shift_y, shift_x, *_ = whole
    return AugmentParams(
        brightness=brightness,
        saturation=saturation,
        contrast=contrast,
        shift_y=shift_y,
        shift_x=shift_x,
        cutout=whole[3:].t().contiguous(),
        flip=flip.bool(),
        scale_x=scale_x,
        scale_y=scale_y,
        degrees=degrees,
    )
