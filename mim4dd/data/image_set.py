"""A labelled image set in memory: drawn from, split, and normalised batch by batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .. import augment
from ..augment import AugmentParams
from ..errors import InputError
from .pixels import full_scale
from .whitening import Whitening

UNEVEN = 4  # places per image that a table [num_classes, largest class] may have


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A labelled image set in memory, stored as uint8 or float32 in [0, 1] and normalised batch by batch.

    Whitened images are stored whitened, as float32 with mean 0 and std 1.

    Attributes:
        images: uint8 or float32 [N, C, H, W].
        labels: int64 [N].
        class_names: one per class.
        mean: float32 [C], of pixels scaled to [0, 1].
        std: float32 [C], likewise.
        whitening: applied to the images, if any.
        unwhitened: the fingerprint before whitening.

    Raises:
        ValueError: a tensor of another type or shape; or, on the CPU, a label that is no class, or a mean
            that is none of pixels in [0, 1].
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    mean: Tensor
    std: Tensor
    whitening: Whitening | None = None
    unwhitened: str | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype not in (torch.uint8, torch.float32):
            raise _wrong("images", self.images, "uint8 or float32 [N, C, H, W]")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise _wrong("labels", self.labels, f"int64 [{len(self)}], one per image")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values.shape != (self.channels,) or values.dtype != torch.float32:
                raise _wrong(name, values, f"float32 [{self.channels}], one per channel")
        if self.labels.device.type != "cpu":  # reading labels elsewhere would wait for their device
            return
        strange = self.labels[(self.labels < 0) | (self.labels >= self.num_classes)]
        if len(strange):
            raise ValueError(
                f"mim4dd.ImageSet: there is a label {strange[0].item()}, expected 0 to "
                f"{self.num_classes - 1}: class_names names {self.num_classes} classes"
            )
        if not ((self.mean >= 0) & (self.mean <= 1)).all():
            raise ValueError(
                f"mim4dd.ImageSet: mean is {self.mean.tolist()}, expected that of pixels in [0, 1]; scale "
                "float images to that range and measure them"
            )

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
        return replace(self, **moved, whitening=self.whitening and self.whitening.to(device))

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
        """`augmented` images and their labels, as a training step takes them."""
        return self.augmented(index, params), self.labels[index]

    def sample(self, per_class: int, generator: torch.Generator) -> Tensor:
        """Indices int64 [num_classes, per_class] of random images of each class, without replacement.

        A class with fewer images is cycled, so that its images occur equally often, give or take one.
        """
        counts, _, _ = self.class_index
        shuffled = self._shuffled(min(per_class, self.largest_class), generator)
        slot = torch.arange(per_class, device=counts.device) % counts[:, None]
        return shuffled.gather(1, slot)

    def check_enough(self, per_class: int) -> None:
        """Check that every class has at least `per_class` images.

        Raises:
            InputError: one has fewer; it names the class.
        """
        counts, _, _ = self.class_index
        smallest = int(counts.argmin())
        if counts[smallest] < per_class:
            raise InputError(
                f"class {self.class_names[smallest]!r} has {int(counts[smallest])} training images, fewer "
                f"than the {per_class} asked for (--ipc, times --factor squared); use fewer"
            )

    def split(self, fraction: float, generator: torch.Generator) -> tuple[ImageSet, ImageSet]:
        """Return the rest and what is held out: `fraction` of every class, but never its last image.

        Raises:
            InputError: a fraction that is none, or so few images that none is held out.
        """
        if not 0 < fraction < 1:
            raise InputError(f"fraction {fraction}: expected a number between 0 and 1, the share to hold out")
        counts, _, _ = self.class_index
        held = torch.minimum((counts * fraction).round().long(), counts - 1)
        if not held.any():
            raise InputError(
                f"{len(self)} images in {self.num_classes} classes: too few to hold out {fraction:g} of "
                "each; use a larger share or more images"
            )
        shuffled = self._shuffled(int(held.max()), generator)
        slot = torch.arange(shuffled.shape[1], device=counts.device)
        held_out = shuffled[slot < held[:, None]].sort().values
        rest = torch.ones(len(self), dtype=torch.bool, device=counts.device)
        rest[held_out] = False
        return self.subset(rest.nonzero().squeeze(1)), self.subset(held_out)

    @cached_property
    def class_index(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each class's count and first place, int64 [num_classes], in the third: all indices, class by class.

        That one is int64 [N + largest class], padded with zeros so that every class has as many places.

        Raises:
            InputError: a class is empty.
        """
        counts = torch.bincount(self.labels, minlength=self.num_classes)
        if not counts.all():
            empty = self.class_names[int(counts.argmin())]
            raise InputError(f"class {empty!r} has no image in this set; add some or remove the class")
        padding = counts.new_zeros(int(counts.max()))
        return counts, counts.cumsum(0) - counts, torch.cat([self.labels.argsort(stable=True), padding])

    @property
    def largest_class(self) -> int:
        """How many images the largest class has."""
        return len(self.class_index[2]) - len(self)

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
        """16 hexadecimal digits that identify these images, labels, mean and std.

        Whitened images take theirs from the fingerprint before whitening, because the last bits of whitening
        differ from machine to machine.
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
        """`k` images of each class in random order, [num_classes, k]; the rest of smaller ones is any."""
        counts, first, members = self.class_index
        largest, device = self.largest_class, counts.device
        if self.num_classes * largest <= UNEVEN * len(self):
            shape = (self.num_classes, largest)
            keys = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32)
            keys = keys.to(device)
            padding = torch.arange(largest, device=device) >= counts[:, None]
            slot = keys.masked_fill_(padding, -1).topk(k, dim=1).indices
        else:  # one key for each image, where a table would be mostly padding
            keys = torch.rand(len(self), generator=generator, dtype=torch.float64, device=generator.device)
            shuffled = (self.labels + keys.to(device)).argsort()
            members = torch.cat([shuffled, members[len(self) :]])
            slot = torch.arange(k, device=device).expand(self.num_classes, k)
        return members[first[:, None] + slot]

    def subset(self, index: Tensor) -> ImageSet:
        """The images of `index`, int64 [n], without the fingerprint before whitening."""
        return replace(self, images=self.images[index], labels=self.labels[index], unwhitened=None)

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift [C, 1, 1] that take stored pixels to normalised ones in a single pass."""
        scale = 1 / (full_scale(self.images) * self.std)
        return scale[:, None, None], (-self.mean / self.std)[:, None, None]


def _wrong(name: str, tensor: Tensor, expected: str) -> ValueError:
    found = f"{tensor.dtype} {list(tensor.shape)}"
    return ValueError(f"mim4dd.ImageSet: {name} is {found}, expected {expected}")
