"""Checks of the settings, before any work starts."""

from __future__ import annotations

from collections.abc import Iterable

from ..augment import parts_of
from ..config import Config
from ..errors import InputError, unknown
from ..networks import ARCHITECTURES
from ..objectives import METHODS

FLOAT32_MIN, FLOAT32_MAX = 1.18e-38, 3.4e38
CALIBRATED_MIN = 1 / 80  # temperature; exp(1 / it), times the negatives, is a noise ratio of float32
COUNT_MAX = 2**31  # of anything; a size in memory that is too large is told by torch


def check(config: Config) -> None:
    """Refuse invalid settings, before any work starts.

    Raises:
        InputError: naming the option, its value and what was expected.
    """
    if not config.data.dataset:
        raise InputError("--dataset is empty, expected a name or a path")
    if config.distill.method not in METHODS:
        raise unknown("method", config.distill.method, METHODS)
    if config.distill.network not in ARCHITECTURES:
        raise unknown("network", config.distill.network, ARCHITECTURES)
    check_architectures(config.eval.eval_archs)
    at_least = {
        "--image-size": (config.data.image_size, 1),
        "--ipc": (config.distill.ipc, 1),
        "--factor": (config.distill.factor, 1),
        "--iterations": (config.distill.iterations, 0),
        "--real-batch": (config.distill.real_batch, 1),
        "--width": (config.distill.width, 1),
        "--num-eval": (config.eval.num_eval, 0),
        "--eval-epochs": (config.eval.eval_epochs, 1),
        "--mim-weight": (config.mim.mim_weight, 0),
        "--num-experts": (config.trajectory.num_experts, 1),
        "--expert-snapshots": (config.trajectory.expert_snapshots, 1),
        "--expert-batches": (config.trajectory.expert_batches, 0),
        "--max-start": (config.trajectory.max_start, 1),
        "--span": (config.trajectory.span, 1),
        "--student-steps": (config.trajectory.student_steps, 1),
        "--student-batch": (config.trajectory.student_batch, 1),
        "--mim-projection-size": (config.mim.mim_projection_size, 1),
    }
    for option, (value, least) in at_least.items():
        most = FLOAT32_MAX if option == "--mim-weight" else COUNT_MAX
        if value is not None and not least <= value < most:
            raise InputError(f"{option} is {value}, expected a number of at least {least} and below {most}")
    above_zero = {
        "--image-lr": config.distill.image_lr,
        "--student-lr": config.trajectory.student_lr,
        "--student-lr-rate": config.trajectory.student_lr_rate,
        "--memory-budget": config.memory_budget,
        "--mim-temperature": config.mim.mim_temperature,
        "--mim-noise-ratio": config.mim.mim_noise_ratio,
        "--mim-layer-decay": config.mim.mim_layer_decay,
    }
    for option, number in above_zero.items():
        if isinstance(number, int | float) and not FLOAT32_MIN <= number < FLOAT32_MAX:
            raise InputError(f"{option} is {number}, expected a positive number within the range of float32")
    if config.eval.num_eval == 0 and config.eval.eval_archs:
        raise InputError("--eval-archs needs --num-eval of at least 1, got 0")
    if not 0 <= config.distill.image_momentum < 1:
        raise InputError(
            f"--image-momentum is {config.distill.image_momentum}, expected at least 0 and below 1"
        )
    if config.mim.mim_loss != "nce" and config.mim.mim_noise_ratio != "calibrated":
        raise InputError(
            f"--mim-noise-ratio is {config.mim.mim_noise_ratio}, but only --mim-loss nce has one, not "
            f"{config.mim.mim_loss}"
        )
    calibrated = config.mim.mim_loss == "nce" and config.mim.mim_noise_ratio == "calibrated"
    if calibrated and (config.mim.mim_temperature or 1) < CALIBRATED_MIN:
        raise InputError(
            f"--mim-temperature {config.mim.mim_temperature} is too low for a calibrated noise ratio: "
            f"expected at least {CALIBRATED_MIN}, or a number for --mim-noise-ratio"
        )
    if config.data.zca and config.distill.factor > 1:
        raise InputError("--zca mixes all pixels of an image, --factor takes it apart: use one of them")
    if not 0 <= config.data.validation < 1:
        raise InputError(
            f"--validation is {config.data.validation}, expected a fraction of at least 0 and below 1"
        )
    if config.distill.augmentation is not None:
        try:
            parts_of(config.distill.augmentation)
        except ValueError as error:
            raise InputError(f"--augmentation: {str(error).removeprefix('mim4dd.augment: ')}") from error
    config.mim.layers()


def check_architectures(names: Iterable[str]) -> None:
    """Refuse names that --eval-archs does not know.

    Raises:
        InputError: naming the first of them.
    """
    for name in names:
        if name not in ARCHITECTURES:
            raise unknown("architecture in --eval-archs:", name, ARCHITECTURES)
