"""Sizes of images and numbers of things, as users give them."""

from collections.abc import Sequence
from numbers import Integral

from .errors import InputError

Size = tuple[int, int]
ImageSize = int | Sequence[int]  # a side, or height and width


def size_of(image_size: object) -> Size:
    """Return the height and width: of a square, given one side, or of any sequence of the two.

    Raises:
        InputError: it is neither.
    """
    # `int` is an Integral too, but many times faster to recognise.
    match [image_size] * 2 if isinstance(image_size, int | Integral) else image_size:
        case [int() | Integral() as height, int() | Integral() as width] if min(int(height), int(width)) > 0:
            return int(height), int(width)
    raise InputError(f"image_size is {image_size!r}, expected (height, width) or one side, in pixels")


def check_counts(**counts: object) -> None:
    """Refuse what is not a number of things.

    Raises:
        InputError: it is no whole number, or below 1.
    """
    for name, count in counts.items():
        if not isinstance(count, Integral) or int(count) < 1:
            raise InputError(f"{name} is {count!r}, expected a whole number of at least 1")
