"""What the parts of an augmentation strategy draw (DSA, ICML 2021)."""

from __future__ import annotations

import functools
from typing import NamedTuple

from ..sizes import Size

DSA = "color_crop_cutout_flip_scale_rotate"

BRIGHTNESS = 1.0
SATURATION = 2.0
CONTRAST = 0.5
CROP = 0.125  # of the side
CUTOUT = 0.5  # of the side
SCALE = 1.2
ROTATE = 15.0  # degrees


class Range(NamedTuple):
    """What is drawn uniformly: a number from low to high, or an integer from low to before high."""

    name: str
    low: float
    high: float
    whole: bool = False


def parts_of(strategy: str) -> list[str]:
    """Return the parts of a strategy string.

    Raises:
        ValueError: no string, an unknown part, or one twice.
    """
    if not isinstance(strategy, str):
        raise ValueError(f"mim4dd.augment: strategy is {strategy!r}, expected some of {DSA}")
    return list(_parts(strategy))


@functools.cache  # asked for at every draw
def _parts(strategy: str) -> tuple[str, ...]:
    parts = () if strategy in ("", "none") else tuple(strategy.split("_"))
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


@functools.cache  # asked for at every draw
def ranges(part: str, size: Size) -> tuple[Range, ...]:
    """Return what a part of a strategy draws, in this order, for images (height, width)."""
    match part:
        case "color":
            return (
                Range("brightness", -BRIGHTNESS / 2, BRIGHTNESS / 2),
                Range("saturation", 0, SATURATION),
                Range("contrast", CONTRAST, CONTRAST + 1),
            )
        case "crop":
            return shifts(_of(size, CROP))
        case "cutout":  # where the box starts, before it is clamped to the image
            return tuple(
                Range(name, -(box // 2), side + 1 - box % 2 - box // 2, whole=True)
                for name, side, box in zip(("cut_y", "cut_x"), size, box_of(size), strict=True)
            )
        case "flip":
            return (Range("flip", 0, 2, whole=True),)
        case "scale":
            return tuple(Range(name, 1 / SCALE, SCALE) for name in ("scale_x", "scale_y"))
        case "rotate":
            return (Range("degrees", -ROTATE, ROTATE),)
    raise AssertionError(part)


def shifts(reach: Size) -> tuple[Range, ...]:
    """Return what a crop draws that moves images by at most so many pixels."""
    return tuple(
        Range(name, -far, far + 1, whole=True)
        for name, far in zip(("shift_y", "shift_x"), reach, strict=True)
    )


def box_of(size: Size) -> Size:
    """Return the height and width of a cutout's box."""
    return _of(size, CUTOUT)


def _of(size: Size, share: float) -> Size:
    """A share of each side, rounded."""
    return int(size[0] * share + 0.5), int(size[1] * share + 0.5)
