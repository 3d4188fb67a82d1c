"""Experts: networks trained on the real images, with snapshots of their weights along the way.

They are what trajectory matching follows. One memory-mapped file holds all experts of a kind; a match reads
its two snapshots from it and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import TrajectoryConfig, settled
from ..data import ImageSet
from ..errors import InputError
from ..files import atomic, cache_folder, write
from ..networks import Network
from ..seeding import generator
from ..stacked import Stack, stack_size

FORMAT = "mim4dd-experts-2"
LR = 0.01  # of plain SGD, as published
BATCH = 256


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the experts of one file."""

    network: Network
    real: ImageSet
    architecture: str
    width: int
    augmentation: str
    config: TrajectoryConfig

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shapes of the weights by name, in the order they are stored."""
        return {name: list(weight.shape) for name, weight in self.network.named_parameters()}

    @property
    def interval(self) -> int:
        """Batches between two snapshots."""
        return self.config.expert_batches or math.ceil(len(self.real) / BATCH)

    def facts(self) -> dict[str, Any]:
        """What must be equal for experts to be the same; JSON-able."""
        return {
            "format": FORMAT,
            "data": self.real.fingerprint,
            "architecture": self.architecture,
            "width": self.width,
            "precision": self.network.precision,
            "weights": self.shapes,
            "augmentation": self.augmentation,
            "num_experts": self.config.num_experts,
            "expert_snapshots": self.config.expert_snapshots,
            "expert_batches": self.interval,
            "expert_seed": self.config.expert_seed,
        }

    def path(self) -> Path:
        """Where these experts are, or will be stored."""
        where = self.config.experts or cache_folder() / "experts"
        if where.is_file() or where.suffix == ".safetensors":
            return where
        digest = hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()[:16]
        return where / f"{self.architecture}-{digest}.safetensors"


class Experts:
    """The experts of one file, read on demand.

    Attributes:
        num_experts: how many there are.
        num_snapshots: of each expert, not counting the one at its start.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        """Open a file.

        Raises:
            InputError: none, or one of another network, data set or version.
        """
        try:
            self._file = safe_open(path, framework="pt")  # memory-mapped: a slice reads only its own pages
            self._weights = self._file.get_slice("weights")
            found = json.loads((self._file.metadata() or {}).get("facts", "{}"))
        except FileNotFoundError as error:
            raise InputError(f"--experts {path}: no such file; name a folder to train them there") from error
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(
                f"--experts {path} cannot be read ({error}); remove it to train new ones"
            ) from error
        wanted = recipe.facts()
        for name in ("format", "data", "architecture", "width", "weights"):
            if found.get(name) != wanted[name]:
                what = "data set, split or whitening" if name == "data" else name
                raise InputError(
                    f"--experts {path} has another {what}: {_short(found.get(name))}, but this run has "
                    f"{_short(wanted[name])}; name another file or a folder"
                )
        self.num_experts, snapshots, _ = self._weights.get_shape()
        self.num_snapshots = snapshots - 1

    def weights(self, expert: int, snapshot: int, device: torch.device) -> Tensor:
        """Return the weights of an expert after `snapshot` intervals, see `mim4dd.networks.flat`."""
        with torch.device("cpu"):  # where the slices of a file are made is otherwise the program's default
            weights = self._weights[expert, snapshot]
        if device.type == "cuda":
            weights = weights.pin_memory()  # or the copy would wait for what the device has still to do
        return weights.to(device, non_blocking=True)


def train(recipe: Recipe) -> Iterator[tuple[int, int]]:
    """Train the experts of a recipe unless they are there; yield (snapshots done, in all) meanwhile.

    What is finished survives an interruption: the next call goes on after the last finished experts.

    Raises:
        InputError: the folder cannot be written, or an explicitly named file is not there.
    """
    path = recipe.path()
    if path.exists():
        return iter(())
    if path == recipe.config.experts:
        raise InputError(f"--experts {path}: no such file; name a folder to train them there")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".lock").touch()
    except OSError as error:
        raise InputError(f"--experts {path.parent} cannot be written ({error.strerror})") from error
    return _train(recipe, path)


def _train(recipe: Recipe, path: Path) -> Iterator[tuple[int, int]]:
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():  # another run may have trained them while this one waited
            yield from _train_alone(recipe, path)


def _train_alone(recipe: Recipe, path: Path) -> Iterator[tuple[int, int]]:
    count, snapshots = recipe.config.num_experts, recipe.config.expert_snapshots
    if not count or not snapshots:
        raise ValueError(
            "mim4dd.objectives: TrajectoryConfig(num_experts=..., expert_snapshots=...) is needed to train"
        )
    partial = path.with_suffix(".partial")
    finished = path.with_suffix(".finished")  # how many experts of the partial file are all there
    if not partial.exists():
        finished.unlink(missing_ok=True)  # of another, if a run was killed at its very end
    done = int(finished.read_text()) if finished.exists() else 0
    table = _table(partial, recipe, (count, snapshots + 1, sum(map(math.prod, recipe.shapes.values()))))
    real = recipe.real
    together = stack_size(recipe.network, (real.channels, *real.image_size), BATCH, real.images.device)
    while done < count:
        group = range(done, min(done + together, count))
        for snapshot, weights in enumerate(_paths(recipe, group)):
            for k, expert in enumerate(group):
                table[expert, snapshot] = weights[k].cpu().numpy()
            table.flush()
            yield group.start * snapshots + len(group) * snapshot, count * snapshots
        done = group.stop
        write(finished, str(done))
    partial.replace(path)
    finished.unlink()


def _paths(recipe: Recipe, group: Sequence[int]) -> Iterator[Tensor]:
    """Yield the weights [len(group), all of one] of a group, at the start and after every interval."""
    network, real = recipe.network, recipe.real
    random = [generator(recipe.config.expert_seed, f"expert/{k}", real.images.device) for k in group]
    stack = Stack.initialised(network, random)
    step = stack.step(stack.sgd(LR), real.labelled, recipe.augmentation, real.image_size)
    batches = chain.from_iterable(stack.epoch(len(real), BATCH) for _ in repeat(None))
    for snapshot in range(settled(recipe.config.expert_snapshots) + 1):
        for index in islice(batches, recipe.interval if snapshot else 0):
            step(index)
        yield stack.rows()


def _table(path: Path, recipe: Recipe, shape: tuple[int, int, int]) -> np.memmap:
    """Map the file's numbers for writing; a new file is a .safetensors of zeros.

    Raises:
        InputError: there is no room for it.
    """
    size = 4 * math.prod(shape)
    header = json.dumps(
        {
            "__metadata__": {"facts": json.dumps(recipe.facts())},
            "weights": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    start = 8 + len(header)
    if not path.exists():
        try:
            with atomic(path) as temporary, temporary.open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                _reserve(file.fileno(), start, size)
        except OSError as error:
            raise InputError(
                f"--experts {path.parent} has no room for {size / 2**30:.1f} GiB of experts "
                f"({error.strerror}); name another folder, or fewer --num-experts or --expert-snapshots"
            ) from error
    return np.memmap(path, "<f4", "r+", start, shape)


def _reserve(file: int, start: int, size: int) -> None:
    """Fill with zeros: a sparse file kills the process that writes into its memory once the disk is full."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, start, size)
    else:
        os.truncate(file, start + size)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
