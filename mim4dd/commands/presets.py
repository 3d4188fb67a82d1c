"""Default sizes of a run: a smoke run, minutes on a laptop, the published protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..augment import DSA, parts_of
from ..config import Config
from ..objectives import METHODS


@dataclass(frozen=True)
class Preset:
    """Sizes of a run, and where it starts."""

    init: str
    iterations: int
    real_batch: int
    width: int
    num_eval: int
    eval_epochs: int
    num_experts: int
    expert_snapshots: int
    expert_batches: int
    max_start: int
    student_steps: int


QUICK = Preset(
    init="kmeans",
    iterations=10,
    real_batch=16,
    width=16,
    num_eval=1,
    eval_epochs=20,
    num_experts=1,
    expert_snapshots=6,
    expert_batches=6,
    max_start=3,
    student_steps=5,
)
SHORT = Preset(
    init="kmeans",
    iterations=200,
    real_batch=128,
    width=64,
    num_eval=5,
    eval_epochs=300,
    num_experts=3,
    expert_snapshots=8,
    expert_batches=100,
    max_start=5,
    student_steps=20,
)
PAPER = Preset(
    init="real",
    iterations=20_000,
    real_batch=256,
    width=128,
    num_eval=20,
    eval_epochs=1000,
    num_experts=100,
    expert_snapshots=50,
    expert_batches=0,
    max_start=20,
    student_steps=30,
)

TEMPERATURES = {"info-nce": 0.03, "nce": 0.1}
NO_FLIP = ("digits", "mnist", "kmnist", "svhn")  # a mirrored character is another one, or none


def with_presets(config: Config) -> Config:
    """Return the configuration with a default for every setting that was not given."""
    ipc = config.distill.ipc
    preset = QUICK if config.quick else PAPER if config.preset == "paper" else SHORT
    method = METHODS[config.distill.method]
    augmentation = config.distill.augmentation
    if augmentation is None and method.augmented:
        augmentation = DSA.replace("_flip", "") if config.data.dataset in NO_FLIP else DSA
    image_lr = at_ipc(method.image_lr, 1 if preset is PAPER else ipc)
    if preset is PAPER:
        iterations = method.iterations(ipc * config.distill.factor**2)
        epochs = PAPER.eval_epochs if parts_of(augmentation or "none") else 300  # as dc has it
        preset = dataclasses.replace(PAPER, iterations=iterations, eval_epochs=epochs)
    weight = at_ipc(method.mim_weights[config.mim.mim_loss], ipc)
    if config.mim.mim_loss == "nce" and config.data.dataset == "digits":
        weight /= 10  # of 8x8 pixels: smaller feature maps, and as much smaller a distance to balance
    return dataclasses.replace(
        config,
        distill=_filled(
            config.distill,
            preset,
            image_lr=image_lr,
            augmentation=augmentation or "none",
        ),
        mim=_filled(config.mim, preset, mim_weight=weight, mim_temperature=TEMPERATURES[config.mim.mim_loss]),
        trajectory=_filled(config.trajectory, preset),
        eval=_filled(config.eval, preset),
    )


def at_ipc(values: Mapping[int, float], ipc: int) -> float:
    """Return the value at an IPC from a table of values, each of which holds from an IPC on."""
    return values[max(least for least in values if least <= ipc)]


def _filled(part: Any, preset: Preset, **others: Any) -> Any:
    values = {**vars(preset), **others}
    return dataclasses.replace(
        part, **{name: values[name] for name, value in vars(part).items() if value is None and name in values}
    )
