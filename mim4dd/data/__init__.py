"""Real data: a named set, a folder or a file -> one in-memory, device-resident `ImageSet`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import augment
from ..augment import AugmentParams
from ..errors import InputError, unknown
from . import named, pictures, readers
from .pixels import measure, resized, to_unit
from .readers import Raw
from .whitening import Whitening

NAMES = tuple(named.SETS)
HELD_OUT = 0.2  # the share held out as test set where the data have none ...
HELD_OUT_SEED = 20  # ... always the same images
SMALLEST = 8  # pixels a side


@dataclass(frozen=True)
class ImageSet:
    """A labelled image set in memory; kept as uint8 (or float32 in [0, 1]), normalised batch by batch.

    Whitened images are kept as they are, with mean 0 and std 1.
    """

    images: Tensor  # uint8 or float32 [N, C, H, W]
    labels: Tensor  # int64 [N]
    class_names: tuple[str, ...]
    mean: Tensor  # float32 [C], of pixels scaled to [0, 1]
    std: Tensor  # float32 [C]
    whitening: Whitening | None = None  # that the images went through
    unwhitened: str | None = None  # the fingerprint that they had before

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """How many classes the set has."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """How many channels an image has."""
        return self.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images.shape[2], self.images.shape[3]

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("images", "labels", "mean", "std")}
        return replace(self, **moved)

    def batch(self, index: Tensor) -> Tensor:
        """Normalised images float32 [..., C, H, W] for an index [...]; gathered first, then converted."""
        scale, shift = self._affine
        pixels = self.images.index_select(0, index.reshape(-1).to(self.images.device)).float()
        return torch.addcmul(shift, pixels, scale).reshape(index.shape + pixels.shape[1:])

    def augmented(self, index: Tensor, params: AugmentParams, rows: Tensor | None = None) -> Tensor:
        """`batch`, then `augment.apply` with rows [...] of the parameters, in one pass over stored bytes."""
        pixels = self.images.index_select(0, index.reshape(-1).to(self.images.device))
        rows = None if rows is None else rows.reshape(-1)
        images = augment.apply(pixels, params, rows=rows, mean=self.mean, std=self.std)
        return images.reshape(index.shape + pixels.shape[1:])

    def labelled(self, index: Tensor, params: AugmentParams) -> tuple[Tensor, Tensor]:
        """`augmented` images and their labels, as a step of training takes them."""
        return self.augmented(index, params), self.labels[index]

    def sample(self, per_class: int, generator: torch.Generator) -> Tensor:
        """Indices int64 [num_classes, per_class] of random images of each class, without replacement.

        A class with fewer images is cycled, so that its images occur equally often, give or take one.
        """
        table, counts = self.class_index
        shuffled = self._shuffled(min(per_class, table.shape[1]), generator)
        slot = torch.arange(per_class, device=table.device) % counts[:, None]
        return shuffled.gather(1, slot)

    def check_enough(self, per_class: int) -> None:
        """Raise `InputError` if a class has fewer images than `per_class`."""
        counts = self.class_index[1]
        smallest = int(counts.argmin())
        if counts[smallest] < per_class:
            raise InputError(
                f"class {self.class_names[smallest]!r} has {int(counts[smallest])} training images, fewer "
                f"than the {per_class} asked for (--ipc, times --factor squared); use fewer"
            )

    def split(self, fraction: float, generator: torch.Generator) -> tuple[ImageSet, ImageSet]:
        """(rest, held out): `fraction` of every class is held out, but never the last image of a class.

        Raises `InputError` if that leaves nothing to hold out.
        """
        if not 0 < fraction < 1:
            raise InputError(f"fraction {fraction}: expected a number between 0 and 1, the share to hold out")
        table, counts = self.class_index
        held = torch.minimum((counts * fraction).round().long(), counts - 1)
        if not held.any():
            raise InputError(
                f"{len(self)} images in {self.num_classes} classes: too few to hold out {fraction:.0%}"
            )
        shuffled = self._shuffled(table.shape[1], generator)
        slot = torch.arange(table.shape[1], device=table.device)
        chosen = slot < held[:, None]
        others = (slot < counts[:, None]) & ~chosen
        rest, held_out = (shuffled[mask].sort().values for mask in (others, chosen))
        return self._subset(rest), self._subset(held_out)

    @cached_property
    def class_index(self) -> tuple[Tensor, Tensor]:
        """Images of each class, int64 [num_classes, largest count] padded with 0, and counts [num_classes].

        Raises `InputError` if a class is empty.
        """
        counts = torch.bincount(self.labels, minlength=self.num_classes)
        if not counts.all():
            empty = self.class_names[int(counts.argmin())]
            raise InputError(f"class {empty!r} has no image in this set: nothing to draw from")
        order = self.labels.argsort(stable=True)
        slot = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[self.labels[order]]
        table = order.new_zeros(self.num_classes, int(counts.max()))
        table[self.labels[order], slot] = order
        return table, counts

    def whitened(self, whitening: Whitening) -> ImageSet:
        """The same set with every image whitened."""
        zeros = torch.zeros_like(self.mean)
        return replace(
            self,
            images=whitening.apply(self.images),
            mean=zeros,
            std=zeros + 1,
            whitening=whitening,
            unwhitened=self.fingerprint,
        )

    @cached_property
    def fingerprint(self) -> str:
        """What tells these images and labels from others.

        Of whitened images it is made of those before, since the last bits of whitening differ from machine to
        machine.
        """
        digest = hashlib.sha256()
        if self.unwhitened is not None:
            digest.update(f"whitened {self.unwhitened}".encode())
        else:
            for tensor in (self.images, self.labels, self.mean, self.std):
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def _shuffled(self, k: int, generator: torch.Generator) -> Tensor:
        """`k` images of each class in random order, [num_classes, k]; a smaller class ends in zeros."""
        table, counts = self.class_index
        keys = torch.rand(table.shape, generator=generator, device=generator.device).to(table.device)
        padding = torch.arange(table.shape[1], device=table.device) >= counts[:, None]
        return table.gather(1, keys.masked_fill_(padding, -1).topk(k, dim=1).indices)

    def _subset(self, index: Tensor) -> ImageSet:
        return replace(self, images=self.images[index], labels=self.labels[index], unwhitened=None)

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift [C, 1, 1] that take stored pixels to normalised ones in a single pass."""
        unit = 255 if self.images.dtype == torch.uint8 else 1
        return (1 / (unit * self.std))[:, None, None], (-self.mean / self.std)[:, None, None]


def load(
    dataset: str, data_dir: Path | None = None, image_size: int | None = None
) -> tuple[ImageSet, ImageSet]:
    """Train and test set of a named set (`NAMES`) or a path: a folder of pictures, `.npz` or parquet file(s).

    `data_dir` holds the files of a named set; without it they are looked for in the usual folders, else
    fetched. `image_size` resizes every image to that many pixels a side. Without a test set, a fixed fifth of
    every class is held out. Raises `InputError` for whatever is wrong with the data.
    """
    if image_size is not None and image_size < SMALLEST:
        raise InputError(f"image size {image_size}: expected at least {SMALLEST} pixels a side")
    known = named.SETS.get(dataset)
    raw, raw_test = known.load(dataset, data_dir) if known else _read_path(dataset, data_dir, image_size)
    _check(raw)
    class_names = _class_names(raw, (known.class_names if known else None) or raw.class_names)
    train = _unscaled(raw, class_names)
    if raw_test is None:
        train, test = train.split(HELD_OUT, torch.Generator().manual_seed(HELD_OUT_SEED))
    else:
        _check(raw_test)
        _check_alike(raw, raw_test, len(class_names))
        test = _unscaled(raw_test, class_names)
    images, test_images = to_unit(train.images, test.images, raw.source)
    if image_size is not None:
        images, test_images = resized(images, image_size), resized(test_images, image_size)
    if known and known.mean:
        mean, std = torch.tensor(known.mean), torch.tensor(known.std)
    else:
        mean, std = measure(images)
    train = replace(train, images=images, mean=mean, std=std)
    return train, replace(test, images=test_images, mean=mean, std=std)


def _read_path(dataset: str, data_dir: Path | None, image_size: int | None) -> readers.Pair:
    path = Path(dataset).expanduser()
    if not path.exists():
        if "/" in dataset or "\\" in dataset or path.suffix in (".npz", ".parquet"):
            raise InputError(f"{dataset}: no such file or folder")
        raise unknown("data set", dataset, NAMES, ", or the path of a folder, .npz or .parquet file")
    if data_dir is not None:
        raise InputError(f"--data-dir {data_dir} is for named sets, and {dataset} is a path; leave it out")
    if path.is_dir():
        read = pictures.read_parquet if pictures.has_parquet(path) else pictures.read_folder
        return read(path, image_size)
    if path.suffix == ".npz":
        return readers.read_npz(path)
    if path.suffix == ".parquet":
        return pictures.read_parquet(path, image_size)
    raise InputError(f"{path}: expected a folder of pictures, or a file ending in .npz or .parquet")


def _check(raw: Raw) -> None:
    """Refuse images and labels that cannot be a labelled image set."""
    images, labels, source = raw.images, raw.labels, raw.source
    if images.ndim != 4 or len(images) == 0 or images.shape[1] == 0:
        raise InputError(f"{source}: shape {images.shape} holds no images")
    if images.dtype.kind not in "uifb":
        raise InputError(f"{source}: images of type {images.dtype}; expected uint8 or float")
    height, width = images.shape[2:]
    if height != width:
        raise InputError(
            f"{source}: images of {width}x{height}; expected square ones (--image-size crops pictures)"
        )
    if height < SMALLEST:
        raise InputError(f"{source}: images of {width}x{height}; expected at least {SMALLEST}x{SMALLEST}")
    largest = np.finfo(np.float32).max
    if not -largest <= float(images.min()) <= float(images.max()) <= largest:  # nor is NaN
        raise InputError(f"{source}: the images hold NaN, infinite or huge values; remove them")
    if labels.dtype.kind not in "ui":
        raise InputError(f"{source}: labels not integers but {labels.dtype}; expected class numbers from 0")
    if labels.shape != (len(images),):
        raise InputError(
            f"{source}: {len(images)} images but labels of shape {labels.shape}; expected one each"
        )
    if int(labels.min()) < 0:
        raise InputError(f"{source}: label {int(labels.min())}; expected class numbers from 0")


def _check_alike(raw: Raw, test: Raw, num_classes: int) -> None:
    shape, test_shape = raw.images.shape[1:], test.images.shape[1:]
    if test_shape != shape:
        raise InputError(f"{test.source}: images {test_shape} but {shape} in {raw.source}; expected the same")
    if (top := int(test.labels.max())) >= num_classes:
        raise InputError(f"{test.source}: label {top}, but the training labels end at {num_classes - 1}")


def _class_names(raw: Raw, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names for all classes, after making sure that every class has a training image."""
    present = np.unique(raw.labels)
    count = len(names) if names else int(present[-1]) + 1
    if int(present[-1]) >= count:
        raise InputError(f"{raw.source}: label {int(present[-1])} but only {count} class names")
    if len(present) < count:
        empty = int(np.setdiff1d(np.arange(len(present) + 1), present)[0])
        name = names[empty] if names else str(empty)
        raise InputError(
            f"{raw.source}: class {name!r} has no training image; each from 0 to the highest label needs one"
        )
    if count == 1:
        name = f" {names[0]!r}" if names else ""
        raise InputError(
            f"{raw.source}: all images are of one class{name}, expected two or more; of a folder, those in "
            "it are the classes"
        )
    return names or tuple(map(str, range(count)))


def name_of(dataset: str) -> str:
    """Return a data set's name for people and files: of a path, the last part."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        return path.resolve().name  # whole, for what follows a dot is no suffix
    return path.resolve().stem if path.exists() else dataset


def _unscaled(raw: Raw, class_names: tuple[str, ...]) -> ImageSet:
    """Tensors from checked arrays; whole numbers up to 255 become uint8, all else float32, scaled later."""
    images = raw.images
    whole = images.dtype.kind in "ui" and int(images.min()) >= 0 and int(images.max()) <= 255
    images = np.ascontiguousarray(images, np.uint8 if whole else np.float32)
    if not images.flags.writeable:
        images = images.copy()  # torch warns about arrays it cannot write to
    labels = torch.from_numpy(raw.labels.astype(np.int64))
    zeros = torch.zeros(images.shape[1])
    return ImageSet(torch.from_numpy(images), labels, class_names, mean=zeros, std=zeros + 1)
