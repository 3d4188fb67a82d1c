"""From the name of a set, or the path of one of your own, to its training and test `ImageSet`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError, unknown
from ..files import expanded
from . import named, pictures, readers
from .checks import SMALLEST, check, check_alike, checked_class_names
from .image_set import ImageSet
from .pixels import measure, resized, to_unit
from .readers import Raw

NAMES = tuple(named.SETS)
HELD_OUT = 0.2  # the share held out as test set where the data have none ...
HELD_OUT_SEED = 20  # ... always the same images


def load(
    dataset: str, data_dir: Path | None = None, image_size: int | None = None
) -> tuple[ImageSet, ImageSet]:
    """Return the training and the test set, of N images [N, C, H, W] each, uint8 or float32 in [0, 1].

    Where the data have no test set, a fixed fifth of every class is held out.

    Args:
        dataset: a named set (`NAMES`) or a path: a folder of pictures, an `.npz` file, or parquet file(s).
        data_dir: the folder of a named set's files; None: the usual ones, and what is missing is downloaded.
        image_size: pixels a side to resize every image to; None: as they are.

    Raises:
        InputError: the data are not found or not fetched, damaged, or no labelled image set.
    """
    if image_size is not None and image_size < SMALLEST:
        raise InputError(f"image size {image_size}: expected at least {SMALLEST} pixels a side")
    known = named.SETS.get(dataset)
    raw, raw_test = known.load(dataset, data_dir) if known else _read_path(dataset, data_dir, image_size)
    check(raw)
    class_names = checked_class_names(raw, (known.class_names if known else None) or raw.class_names)
    train = _unscaled(raw, class_names)
    if raw_test is None:
        try:
            train, test = train.split(HELD_OUT, torch.Generator().manual_seed(HELD_OUT_SEED))
        except InputError as error:
            raise InputError(f"{raw.source} has no test set, and only {error}, or a test set") from error
    else:
        check(raw_test)
        check_alike(raw, raw_test, len(class_names))
        test = _unscaled(raw_test, class_names)
    images, test_images = to_unit(train.images, test.images, raw.source)
    if image_size is not None:
        images, test_images = resized(images, image_size), resized(test_images, image_size)
    if known and known.mean:
        mean, std = (torch.from_numpy(np.array(values, np.float32)) for values in (known.mean, known.std))
    else:
        mean, std = measure(images)
    train = replace(train, images=images, mean=mean, std=std)
    return train, replace(test, images=test_images, mean=mean, std=std)


def _read_path(dataset: str, data_dir: Path | None, image_size: int | None) -> readers.Pair:
    path = expanded(dataset)
    if not path.exists():
        if "/" in dataset or "\\" in dataset or path.suffix in (".npz", ".parquet"):
            raise InputError(f"{dataset}: no such file or folder; check the path")
        raise unknown("data set", dataset, NAMES, ", or the path of a folder, .npz or .parquet file")
    if data_dir is not None:
        raise InputError(f"--data-dir {data_dir} is for named sets, and {dataset} is a path; leave it out")
    if path.is_dir():
        read = pictures.read_parquet if pictures.is_parquet(path) else pictures.read_folder
        return read(path, image_size)
    if path.suffix == ".npz":
        return readers.read_npz(path)
    if path.suffix == ".parquet":
        return pictures.read_parquet(path, image_size)
    raise InputError(f"{path}: expected a folder of pictures, or a file ending in .npz or .parquet")


def _unscaled(raw: Raw, class_names: tuple[str, ...]) -> ImageSet:
    """Tensors from checked arrays; whole numbers of 0 to 255 become uint8, all else float32, scaled later."""
    images = raw.images
    whole = images.dtype.kind in "ui" and int(images.min()) >= 0 and int(images.max()) <= 255
    images = np.ascontiguousarray(images, np.uint8 if whole else np.float32)
    if not images.flags.writeable:
        images = images.copy()  # torch warns about arrays it cannot write to
    labels = torch.from_numpy(raw.labels.astype(np.int64))
    zeros = torch.from_numpy(np.zeros(images.shape[1], np.float32))
    return ImageSet(torch.from_numpy(images), labels, class_names, mean=zeros, std=zeros + 1)


def name_of(dataset: str) -> str:
    """Return a data set's name, as shown to people and in file names: of a path, the last part."""
    path = expanded(dataset)
    if path.is_dir():
        name = path.resolve().name  # whole: a dot in a folder's name starts no suffix
    elif path.exists():
        name = path.resolve().stem
    else:
        name = dataset
    return os.fsencode(name).decode(errors="replace")  # UTF-8, whatever it is on the disk
