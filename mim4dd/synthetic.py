"""The synthetic set: a few images per class, how they start, and the one file they are kept in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import TensorDataset

from .data import ImageSet
from .errors import InputError
from .files import atomic

FORMAT = "mim4dd-synthetic-1"
TENSORS = ("images", "labels", "mean", "std")


@dataclass(frozen=True)
class SyntheticSet:
    """Labelled images in the networks' normalised space, class by class, and what is needed to use them.

    Attributes:
        images: float32 [n, C, H, W], normalised: (pixel - mean) / std with pixels in [0, 1].
        labels: int64 [n].
        class_names: one per class.
        mean: float32 [C].
        std: float32 [C].
        metadata: JSON-able facts: dataset, method, config, seed, version, ...
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    mean: Tensor
    std: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def pixels(self) -> Tensor:
        """The images in true colours: float32 [n, C, H, W] in [0, 1]."""
        return (self.images * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)

    def dataset(self) -> TensorDataset:
        """Return a torch Dataset of (normalised image float32 [C, H, W], label int64 []) pairs."""
        return TensorDataset(self.images, self.labels)

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file, whole or not at all."""
        facts = {"class_names": self.class_names, **self.metadata}
        tensors = {name: getattr(self, name).contiguous().cpu() for name in TENSORS}
        with atomic(Path(path)) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> SyntheticSet:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, a corrupted one, or one that mim4dd did not write.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise InputError(
                        f"{path}: expected a synthetic set written by mim4dd ({FORMAT}), got format "
                        f"{header.get('format')!r}"
                    )
                tensors = {name: file.get_tensor(name) for name in TENSORS}
            facts = json.loads(header["facts"])
            class_names = tuple(facts.pop("class_names"))
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file; expected a synthetic.safetensors of mim4dd") from error
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a readable synthetic set ({error}); was it cut short?") from error
        return cls(**tensors, class_names=class_names, metadata=facts)


def initialise(real: ImageSet, ipc: int, how: str, generator: torch.Generator) -> SyntheticSet:
    """Return `ipc` images per class to start from: "real" (random), "kmeans" or "noise" (standard normal).

    Raises:
        InputError: fewer real images in a class than `ipc`.
    """
    _check_enough(real, ipc)
    labels = torch.arange(real.num_classes, device=real.labels.device).repeat_interleave(ipc)
    if how == "noise":
        shape = (len(labels), real.channels, *real.image_size)
        images = torch.randn(shape, generator=generator, device=generator.device)
    else:
        select = {"real": select_random, "kmeans": select_kmeans}[how]
        images = real.batch(select(real, ipc, generator).flatten())
    return SyntheticSet(images, labels, real.class_names, real.mean, real.std)


def select_random(real: ImageSet, ipc: int, generator: torch.Generator) -> Tensor:
    """Return indices [num_classes, ipc] of random real images, none twice.

    Raises:
        InputError: fewer images in a class than `ipc`.
    """
    _check_enough(real, ipc)
    return real.sample(ipc, generator)


def select_kmeans(real: ImageSet, ipc: int, generator: torch.Generator) -> Tensor:
    """Return indices [num_classes, ipc] of the real images nearest to k-means centres in pixel space.

    Raises:
        InputError: fewer images in a class than `ipc`.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans

    _check_enough(real, ipc)
    seeds = torch.randint(2**31, (real.num_classes,), generator=generator, device=generator.device).tolist()
    table, counts = real.class_index
    chosen = []
    for members, count, seed in zip(table, counts.tolist(), seeds, strict=True):
        pixels = real.batch(members[:count]).flatten(1).cpu().numpy()
        centres = KMeans(ipc, n_init=1, random_state=seed).fit(pixels)
        # Each centre takes an image of its own, even where two centres coincide.
        _, nearest = linear_sum_assignment(centres.transform(pixels).T)
        chosen.append(members[torch.from_numpy(np.asarray(nearest)).to(members.device)])
    return torch.stack(chosen)


def _check_enough(real: ImageSet, ipc: int) -> None:
    counts = real.class_index[1]
    smallest = int(counts.argmin())
    if counts[smallest] < ipc:
        raise InputError(
            f"class {real.class_names[smallest]!r} has {int(counts[smallest])} training images, fewer than "
            f"the {ipc} asked for; use a smaller --ipc"
        )
