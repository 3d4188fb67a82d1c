"""The problem that the benches share: random images, for no time depends on what is on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim4dd import augment
from mim4dd.data import ImageSet
from mim4dd.objectives import Problem, TrajectoryConfig
from mim4dd.seeding import generator
from mim4dd.synthetic import SyntheticSet

STRATEGY = augment.DSA.replace("_flip", "")  # as a run has it on MNIST, of whose shape the images are


def real_images(
    per_class: int, device: torch.device | str, classes: int = 10, shape: tuple[int, int, int] = (1, 28, 28)
) -> ImageSet:
    size = (classes * per_class, *shape)
    pixels = torch.randint(256, size, dtype=torch.uint8, generator=generator(0, "bench/real"))
    labels = torch.arange(classes).repeat_interleave(per_class)
    names = tuple(map(str, range(classes)))
    mean, std = torch.full(shape[:1], 0.5), torch.full(shape[:1], 0.25)
    return ImageSet(pixels, labels, names, mean, std).to(device)


def problem(real: ImageSet, ipc: int, **settings: Any) -> Problem:
    labels = torch.arange(real.num_classes, device=real.images.device).repeat_interleave(ipc)
    return Problem(real=real, labels=labels, layers=(), seed=0, **{"architecture": "convnet", **settings})


def synthetic_images(of: Problem) -> Tensor:
    shape = (len(of.labels), of.real.channels, *of.real.image_size)
    return torch.randn(shape, generator=generator(0, "bench/synthetic")).to(of.labels.device)


def synthetic_set(of: Problem, images: Tensor) -> SyntheticSet:
    return SyntheticSet(images, of.labels, of.real.class_names, of.real.mean, of.real.std)


def trajectory(experts: Path, **student: int) -> TrajectoryConfig:
    """Settings of trajectory matching, whose experts need not know anything and are made in a moment."""
    return TrajectoryConfig(
        experts=experts, num_experts=1, expert_snapshots=2, expert_batches=1, max_start=1, **student
    )
