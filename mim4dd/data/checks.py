"""What makes arrays a labelled image set; anything else is refused here with a reason."""

from __future__ import annotations

import numpy as np

from ..errors import InputError
from .readers import Raw

SMALLEST = 8  # pixels a side


def check(raw: Raw) -> None:
    """Check that the images and labels can be a labelled image set.

    Raises:
        InputError: they cannot; it names the file and what was expected.
    """
    images, labels, source = raw.images, raw.labels, raw.source
    if images.ndim != 4 or len(images) == 0 or images.shape[1] == 0:
        raise InputError(f"{source}: shape {images.shape} holds no images")
    if images.dtype.kind not in "uifb":
        raise InputError(f"{source}: images of type {images.dtype}; expected uint8 or float")
    height, width = images.shape[2:]
    if height != width:
        raise InputError(f"{source}: images of {width}x{height}; expected square ones")
    if height < SMALLEST:
        raise InputError(f"{source}: images of {width}x{height}; expected at least {SMALLEST}x{SMALLEST}")
    largest = float(np.finfo(np.float32).max)
    if not -largest <= float(images.min()) <= float(images.max()) <= largest:  # false for NaN, too
        raise InputError(f"{source}: the images hold NaN, infinite or huge values; remove them")
    if labels.dtype.kind not in "ui":
        raise InputError(f"{source}: labels of type {labels.dtype}; expected class numbers from 0")
    if labels.shape != (len(images),):
        raise InputError(
            f"{source}: {len(images)} images but labels of shape {labels.shape}; expected one per image"
        )
    if int(labels.min()) < 0:
        raise InputError(f"{source}: label {int(labels.min())}; expected class numbers from 0")


def check_alike(raw: Raw, test: Raw, num_classes: int) -> None:
    """Check that the test images have the training images' shape and classes.

    Raises:
        InputError: they do not.
    """
    shape, test_shape = raw.images.shape[1:], test.images.shape[1:]
    if test_shape != shape:
        raise InputError(
            f"{test.source}: images {test_shape} but {shape} in {raw.source}; expected the same shape"
        )
    if (top := int(test.labels.max())) >= num_classes:
        raise InputError(f"{test.source}: label {top}, but the training labels end at {num_classes - 1}")


def checked_class_names(raw: Raw, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names of all classes, by default their numbers.

    Raises:
        InputError: a class has no training image or no name, or is the only one.
    """
    present = np.unique(raw.labels)
    count = len(names) if names else int(present[-1]) + 1
    if int(present[-1]) >= count:
        raise InputError(f"{raw.source}: label {int(present[-1])} but only {count} class names")
    if len(present) < count:
        empty = int(np.setdiff1d(np.arange(len(present) + 1), present)[0])
        name = names[empty] if names else str(empty)
        raise InputError(
            f"{raw.source}: class {name!r} has no training image; every class from 0 to the highest label "
            "needs one"
        )
    if count == 1:
        name = f" {names[0]!r}" if names else ""
        raise InputError(
            f"{raw.source}: all images are of one class{name}, expected two or more; each folder in "
            "a folder of pictures is a class"
        )
    return names or tuple(map(str, range(count)))
