"""Options of `mim4dd.tune`: the method, the space to search, the seeds."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ..commands.config_check import check
from ..commands.options import Hidden, plain, recast
from ..config import Config, DataConfig, EvalConfig, MimConfig
from ..errors import InputError
from ..extras import missing

RANGES = {"weights": "mim_weight", "temperatures": "mim_temperature"}
CHOICES = {
    "layers": "mim_layers",
    "networks": "mim_networks",
    "noise_ratios": "mim_noise_ratio",
    "projections": "mim_projection",
}
SEARCHED = RANGES | CHOICES  # option of the search -> setting of the term


@dataclass(frozen=True)
class TunedDataConfig(DataConfig):
    """The real images.

    Attributes:
        validation: Fraction of the training images to hold out and tune on, drawn for each seed; the test set
            is not used.
    """

    validation: float = 0.1


@dataclass(frozen=True)
class TunedMimConfig(MimConfig):
    """The mutual-information term: settings that are not searched."""

    mim_weight: Hidden[float | None] = None
    mim_networks: Hidden[Literal["synthetic", "real", "base"]] = "synthetic"
    mim_layers: Hidden[str] = "all"
    mim_temperature: Hidden[float | None] = None
    mim_noise_ratio: Hidden[float | Literal["calibrated"]] = "calibrated"
    mim_projection: Hidden[Literal["none", "random", "trained"]] = "none"


@dataclass(frozen=True)
class TunedEvalConfig(EvalConfig):
    """The evaluation: networks trained from scratch on the synthetic images."""

    baselines: Hidden[tuple[Literal["random", "kmeans", "base", "full"], ...]] = ()
    eval_archs: Hidden[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Tuning(Config):
    """Choose weight, temperature, layers and networks of the term for one method and IPC.

    The base method alone comes first, then its default settings, then trials chosen by Optuna's TPE sampler,
    each on all seeds unless the median of the earlier trials was better on the first ones. The same command
    continues an interrupted search; more --trials add to it. OUT/tune.json has the best settings, for
    run --config, and OUT/tune.md the table. Needs Optuna: the extra `tune`.

    Attributes:
        trials: Trials, not counting the base method.
        seeds: Seeds; each trial runs once with each. A single one gives no interval.
        weights: Range of the weight, searched on a logarithmic scale.
        temperatures: Range of the temperature, searched on a logarithmic scale.
        layers: Feature maps: all, last, or indices such as 0,2.
        networks: Networks whose features are compared: trained on the synthetic or on the real images, or
            those of the base method.
        noise_ratios: Noise ratios; only nce has one.
        projections: Linear maps into a common space.
        out: Folder of the results; default: runs/tune-<dataset>-<method>-ipc<n>.
        seed: Seed of the search.
    """

    trials: int = 30
    seeds: tuple[int, ...] = (0, 1, 2)
    weights: tuple[float, float] = (1.0, 3000.0)
    temperatures: tuple[float, float] = (0.0125, 1.0)
    layers: tuple[str, ...] = ("all", "last")
    networks: tuple[Literal["synthetic", "real", "base"], ...] = ("synthetic",)
    noise_ratios: tuple[float | Literal["calibrated"], ...] = ("calibrated",)
    projections: tuple[Literal["none", "random", "trained"], ...] = ("none",)
    out: Path | None = None
    seed: int = 0
    data: TunedDataConfig = field(default_factory=TunedDataConfig)
    mim: TunedMimConfig = field(default_factory=TunedMimConfig)
    eval: TunedEvalConfig = field(default_factory=TunedEvalConfig)
    overwrite: Hidden[bool] = False

    def space(self) -> dict[str, Any]:
        """Return what is searched, as JSON-able values."""
        return {option: list(getattr(self, option)) for option in SEARCHED}

    def run_settings(self, mim: MimConfig, seed: int) -> Config:
        """Return the settings of one run, as they were given."""
        config = plain(self)
        evaluation = dataclasses.replace(config.eval, baselines=(), eval_archs=())
        return dataclasses.replace(config, mim=mim, eval=evaluation, seed=seed, out=None, overwrite=False)


def check_tuning(tuning: Tuning) -> None:
    """Refuse an invalid search, before any work starts.

    Raises:
        InputError: naming the option, its value and what was expected.
    """
    if find_spec("optuna") is None:
        raise InputError(missing("optuna"))
    if not tuning.data.validation:
        raise InputError("--validation is 0: settings are never chosen on the test set; hold out 0.1, say")
    if tuning.eval.num_eval == 0:
        raise InputError("--num-eval is 0: nothing to choose by, expected at least 1")
    if tuning.trials < 1:
        raise InputError(f"--trials is {tuning.trials}, expected at least 1")
    for option in ("seeds", *CHOICES):
        if not getattr(tuning, option):
            raise InputError(f"--{option.replace('_', '-')} is empty, expected one or more")
    for option in RANGES:
        low, high = getattr(tuning, option)
        if not 0 < low <= high < float("inf"):
            raise InputError(f"--{option} is {low} {high}, expected two positive numbers, the smaller first")
    if len(set(tuning.seeds)) < len(tuning.seeds):
        raise InputError(f"--seeds is {' '.join(map(str, tuning.seeds))}, expected each seed once")
    for layers, ratio in itertools.product(tuning.layers, tuning.noise_ratios):
        mim = dataclasses.replace(
            recast(MimConfig, tuning.mim),
            mim_weight=1.0,
            mim_temperature=tuning.temperatures[0],
            mim_layers=layers,
            mim_noise_ratio=ratio,
        )
        check(tuning.run_settings(mim, tuning.seeds[0]))
