"""Drawing the parameters of an augmentation: on a CPU one part after the other, else all at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..sizes import ImageSize, Size, size_of
from . import at_once
from .params import AugmentParams, unchanged
from .strategy import Range, box_of, parts_of, ranges, shifts


def sample(
    strategy: str,
    batch: int,
    image_size: ImageSize,
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
        ValueError: an unknown part or mode, or something that is no strategy, number of rows, image size or
            generator.
    """
    params = sample_each(strategy, 1 if siamese else batch, image_size, generators=[generator], mode=mode)
    if siamese:
        params = params.map_rows(lambda field: field.expand(batch, *field.shape[1:]))
    return params


def sample_each(
    strategy: str,
    batch: int,
    image_size: ImageSize,
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
        ValueError: an unknown part or mode, or something that is no strategy, number of rows, image size or
            generator.
    """
    parts = parts_of(strategy)
    if mode not in ("single", "each", "all"):
        raise ValueError(f"mim4dd.augment.sample: mode is {mode!r}, expected 'single', 'each' or 'all'")
    size = size_of(image_size)
    if batch < 0:
        raise ValueError(f"mim4dd.augment.sample: batch is {batch}, expected 0 or more rows")
    device = _device_of(*generators)
    if not parts:
        return AugmentParams.identity(batch * len(generators), device=device)
    if device.type != "cpu":
        return at_once.draw(tuple(parts), batch, size, generators, mode)
    drawn = [_one_by_one(parts, batch, size, generator, mode) for generator in generators]
    if len(drawn) == 1:
        return drawn[0]
    columns = zip(*(params.fields().values() for params in drawn), strict=True)
    return AugmentParams(*(torch.cat(fields) for fields in columns))


def pad_and_crop(batch: int, padding: int, *, generator: torch.Generator) -> AugmentParams:
    """Draw the usual random crop: pad with `padding` zeros on every side, cut out the old size anywhere.

    Raises:
        ValueError: negative padding, or something that is no generator.
    """
    if padding < 0:
        raise ValueError(f"mim4dd.augment.pad_and_crop: padding is {padding}, expected 0 or more pixels")
    identity = AugmentParams.identity(batch, device=_device_of(generator))
    return dataclasses.replace(
        identity, **{shift.name: _uniform(shift, batch, generator) for shift in shifts((padding, padding))}
    )


def _device_of(*generators: torch.Generator) -> torch.device:
    for generator in generators:
        if not isinstance(generator, torch.Generator):
            raise ValueError(f"mim4dd.augment: generator is {generator!r}, expected a torch.Generator")
    return generators[0].device


def _one_by_one(
    parts: Sequence[str], rows: int, size: Size, generator: torch.Generator, mode: str
) -> AugmentParams:
    device = generator.device
    fields = unchanged(rows, device)
    if mode == "all":
        for part in parts:
            fields |= _fields(part, rows, size, generator)
    elif mode == "single":
        part = parts[int(torch.randint(len(parts), (), generator=generator, device=device))]
        fields |= _fields(part, rows, size, generator)
    else:
        chosen = torch.randint(len(parts), (rows,), generator=generator, device=device)
        for k, part in enumerate(parts):
            mask = chosen == k
            for name, value in _fields(part, rows, size, generator).items():
                fields[name] = torch.where(mask if value.ndim == 1 else mask[:, None], value, fields[name])
    return AugmentParams(**fields)


def _fields(part: str, rows: int, size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    """The fields of AugmentParams that a part sets."""
    drawn = {of.name: _uniform(of, rows, generator) for of in ranges(part, size)}
    if part == "cutout":
        boxes = zip(drawn.values(), box_of(size), size, strict=True)
        edges = [edge.clamp(0, side - 1) for first, box, side in boxes for edge in (first, first + (box - 1))]
        return {"cutout": torch.stack(edges, 1)}
    return {"flip": drawn["flip"].bool()} if part == "flip" else drawn


def _uniform(of: Range, rows: int, generator: torch.Generator) -> Tensor:
    device = generator.device
    if of.whole:
        return torch.randint(int(of.low), int(of.high), (rows,), generator=generator, device=device)
    return torch.empty(rows, dtype=torch.float32, device=device).uniform_(
        of.low, of.high, generator=generator
    )
