"""The synthetic set: a few images per class, how they start, and the file that stores them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import TensorDataset

from .data import ImageSet
from .data.clusters import image_for_each, kmeans_centres, members
from .data.pixels import unit
from .data.whitening import Whitening
from .errors import InputError
from .files import atomic

FORMAT = "mim4dd-synthetic-1"
IMAGES = "synthetic.safetensors"  # in the folder of a run
TENSORS = ("images", "labels", "mean", "std")
OPTIONAL = ("soft_labels",)
DTYPES = {"images": torch.float32, "labels": torch.int64, "soft_labels": torch.float32}
WHITENING = ("mean", "matrix")
FACTS = ("class_names", "factor", "network_lr")


@dataclass(frozen=True, eq=False)  # comparing tensors gives no single answer
class SyntheticSet:
    """Labelled images in the networks' normalised space, class by class, and what is needed to use them.

    Attributes:
        images: float32 [n, C, H, W], normalised: (pixel - mean) / std with pixels in [0, 1].
        labels: int64 [n].
        class_names: one per class.
        mean: float32 [C].
        std: float32 [C].
        metadata: JSON-able facts: dataset, method, config, seed, version, ...
        factor: every image holds factor x factor smaller ones, see `decode`.
        soft_labels: probabilities float32 [n * factor², num_classes] of the decoded images, or None.
        network_lr: learning rate for training networks on these images, if the method learned one.
        whitening: how these images were whitened, as real ones must be; mean is 0 and std 1 then.

    Raises:
        ValueError: a tensor of another type or shape, a label that is no class (on the CPU), a factor below 1
            or one that does not divide the images.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    mean: Tensor
    std: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)
    factor: int = 1
    soft_labels: Tensor | None = None
    network_lr: float | None = None
    whitening: Whitening | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4:
            raise _wrong(f"images are {list(self.images.shape)}, expected [n, C, H, W]")
        for name, dtype in DTYPES.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.dtype != dtype:
                raise _wrong(f"{name} are {tensor.dtype}, expected {dtype}")
        channels = self.images.shape[1]
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values.shape != (channels,) or not values.is_floating_point():
                found = f"{values.dtype} {list(values.shape)}"
                raise _wrong(f"{name} is {found}, expected floats [{channels}]: one per channel")
        if self.labels.shape != self.images.shape[:1]:
            raise _wrong(f"labels are {list(self.labels.shape)}, expected [{len(self)}]: one per image")
        classes = len(self.class_names)
        if self.labels.device.type == "cpu":  # reading labels elsewhere would wait for their device
            wrong = self.labels[(self.labels < 0) | (self.labels >= classes)]
            if len(wrong):
                raise _wrong(
                    f"there is a label {wrong[0].item()}, expected 0 to {classes - 1}: "
                    f"class_names names {classes} classes"
                )
        if self.factor < 1:
            raise _wrong(f"factor is {self.factor}, expected at least 1")
        if any(side % self.factor for side in self.images.shape[2:]):
            raise _wrong(
                f"images {list(self.images.shape)} cannot hold {self.factor} x {self.factor} others; "
                "expected sides that are multiples of the factor"
            )
        wanted = [len(self.decoded_labels), classes]
        if self.soft_labels is not None and list(self.soft_labels.shape) != wanted:
            raise _wrong(
                f"soft labels {list(self.soft_labels.shape)}, expected {wanted}: one row per decoded image, "
                "one column per class"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def decoded(self) -> Tensor:
        """What networks are trained on: float32 [n * factor², C, H, W], normalised."""
        return decode(self.images, self.factor)

    @property
    def decoded_labels(self) -> Tensor:
        """The classes of the decoded images: int64 [n * factor²]."""
        return self.labels.repeat_interleave(self.factor**2)

    @property
    def targets(self) -> Tensor:
        """What networks should predict: the soft labels if there are any, else the decoded labels."""
        return self.decoded_labels if self.soft_labels is None else self.soft_labels

    def to(self, device: torch.device | str) -> SyntheticSet:
        """The same set on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        whitening = self.whitening and self.whitening.to(device)
        return replace(self, **moved, whitening=whitening)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in (*TENSORS, *OPTIONAL)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def pixels(self) -> Tensor:
        """The images in true colours: float32 [n, C, H, W] in [0, 1]."""
        pixels = self.images * self.std[:, None, None] + self.mean[:, None, None]
        return (self.whitening.invert(pixels) if self.whitening else pixels).clamp(0, 1)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return real images as networks trained on this set expect them, whitened if the set is.

        Args:
            pixels: [n, C, H, W], uint8 or float32 in [0, 1], on the device of the set.

        Returns:
            Tensor float32 [n, C, H, W].
        """
        pixels = self.whitening.apply(pixels) if self.whitening else unit(pixels)
        return (pixels - self.mean[:, None, None]) / self.std[:, None, None]

    def dataset(self) -> TensorDataset:
        """Return a torch Dataset of pairs: decoded image float32 [C, H, W], normalised, and its target.

        A target is a label int64 [], or probabilities float32 [num_classes]; `cross_entropy` takes either.
        """
        return TensorDataset(self.decoded, self.targets)

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file, whole or not at all."""
        facts = {name: getattr(self, name) for name in FACTS} | {"metadata": self.metadata}
        # Copies: safetensors refuses tensors that share memory, as mean and std may.
        whole = torch.contiguous_format
        tensors = self._tensors()
        if self.whitening:
            tensors |= {f"whitening.{name}": getattr(self.whitening, name) for name in WHITENING}
        tensors = {name: tensor.clone(memory_format=whole).cpu() for name, tensor in tensors.items()}
        with atomic(Path(path)) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "facts": json.dumps(facts, default=_plain)})

    @classmethod
    def load(cls, path: str | Path) -> SyntheticSet:
        """Read what `save` wrote; given the folder of a run, its synthetic.safetensors.

        Raises:
            InputError: no such file, a corrupted one, or one that mim4dd did not write.
        """
        if Path(path).is_dir():
            path = Path(path) / IMAGES
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise InputError(
                        f"{path}: expected a synthetic set written by mim4dd ({FORMAT}), got format "
                        f"{header.get('format')!r}"
                    )
                stored = set(file.keys())
                optional = stored & set(OPTIONAL)
                tensors = {name: file.get_tensor(name) for name in (*TENSORS, *optional)}
                whitening = None
                if "whitening.matrix" in stored:
                    whitening = Whitening(*(file.get_tensor(f"whitening.{name}") for name in WHITENING))
            facts = json.loads(header["facts"])
            own = {name: facts.pop(name) for name in FACTS}
            own["class_names"] = tuple(own["class_names"])
            metadata = facts.get("metadata", facts)  # older files have it among their own facts
            loaded = cls(**tensors, **own, metadata=metadata, whitening=whitening)
            whitened = {f"whitening.{name}": getattr(whitening, name) for name in WHITENING if whitening}
            for name, tensor in (tensors | whitened).items():
                if not tensor.isfinite().all() or (name == "std" and not tensor.gt(0).all()):
                    raise InputError(
                        f"{path}: {name} holds NaN, infinite or impossible values; distil it again"
                    )
            return loaded
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file; expected a synthetic.safetensors of mim4dd") from error
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a readable synthetic set ({error}); was it cut short?") from error


def _wrong(what: str) -> ValueError:
    return ValueError(f"mim4dd.SyntheticSet: {what}")


def _plain(value: object) -> object:
    """The number or text that a scalar of numpy or torch, which JSON does not know, stands for."""
    if isinstance(value, np.generic | Tensor):
        return value.item()
    raise TypeError(
        f"mim4dd.SyntheticSet: {value!r} cannot be written as JSON; expected numbers, text, lists and dicts"
    )


def decode(images: Tensor, factor: int) -> Tensor:
    """Take images [n, C, H, W] apart into factor x factor tiles, each enlarged: [n * factor², C, H, W].

    Bilinear, as IDC (ICML 2022) decodes its multi-formation; differentiable.
    """
    if factor == 1:
        return images
    height, width = images.shape[2:]
    tiles = images.unflatten(3, (factor, -1)).unflatten(2, (factor, -1))  # [n, C, f, h, f, w]
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    return F.interpolate(tiles, size=(height, width), mode="bilinear")


def encode(images: Tensor, factor: int) -> Tensor:
    """Put every factor² images [n * factor², C, H, W], made smaller, side by side into one: [n, C, H, W]."""
    if factor == 1:
        return images
    tiles = F.avg_pool2d(images, factor).unflatten(0, (-1, factor, factor))  # [n, f, f, C, h, w]
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def initialise(
    real: ImageSet,
    ipc: int,
    how: str,
    generator: torch.Generator,
    *,
    factor: int = 1,
    centres: Tensor | None = None,
) -> SyntheticSet:
    """Return `ipc` images per class to start from: "real" (random), "kmeans" or "noise" (standard normal).

    With a `factor` above 1 every image is made of factor² real ones. Given `centres` of that many clusters
    (ipc * factor²) of every class, image j of a class starts from one of cluster j; noise belongs to
    none.

    Args:
        real: the training images.
        ipc: images per class.
        how: "real", "kmeans" or "noise".
        generator: of every draw, on the device of the images.
        factor: tiles a side of every image, see `encode`.
        centres: of clusters, float32 [num_classes, ipc * factor², C * H * W]; None: "kmeans" finds its own.

    Raises:
        InputError: too few real images in a class, or images that `factor` does not divide.
    """
    height, width = real.image_size
    if height % factor or width % factor:
        raise InputError(f"--factor {factor} does not divide images of {height}x{width}; use one that does")
    real.check_enough(ipc * factor**2)
    labels = torch.arange(real.num_classes, device=real.labels.device).repeat_interleave(ipc)
    if how == "noise":
        shape = (len(labels), real.channels, height, width)
        images = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    else:
        k = ipc * factor**2
        if how == "kmeans":
            centres = kmeans_centres(real, k, generator) if centres is None else centres
            index = image_for_each(centres, real, members(real))
        else:
            index = real.sample(k, generator)
            index = index if centres is None else image_for_each(centres, real, index)
        images = encode(real.batch(index.flatten()), factor)
    facts = real.class_names, real.mean, real.std
    return SyntheticSet(images, labels, *facts, factor=factor, whitening=real.whitening)
