"""`python -m mim4dd.tune`: choose the settings of the mutual-information term on a validation split."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .cells import Cell, rehearse
from .config import Config, DataConfig, EvalConfig, MimConfig, check, to_json
from .console import about, complain, console, guarded
from .devices import pick_device
from .distill import DivergenceError
from .errors import InputError
from .files import make_folder
from .options import Hidden, plain, read, recast
from .presets import with_presets
from .seeding import generator
from .tune_report import Trial, describe, show, write

if TYPE_CHECKING:
    import optuna

BASE = MimConfig(mim_weight=0.0)
UNPRUNED = 5  # trials before any is given up


@dataclass(frozen=True)
class TunedDataConfig(DataConfig):
    """The real images."""

    validation: float = 0.1
    """Share of the training images that is held out to tune on, drawn anew for every seed; the test set is
    never looked at."""


@dataclass(frozen=True)
class TunedMimConfig(MimConfig):
    """The mutual-information term: what is not searched."""

    mim_weight: Hidden[float | None] = None
    mim_layers: Hidden[str] = "all"
    mim_temperature: Hidden[float | None] = None
    mim_noise_ratio: Hidden[float | Literal["calibrated"]] = "calibrated"
    mim_projection: Hidden[Literal["none", "random", "trained"]] = "none"


@dataclass(frozen=True)
class TunedEvalConfig(EvalConfig):
    """The evaluation: networks trained from nothing on the synthetic images."""

    baselines: Hidden[tuple[Literal["random", "kmeans", "base", "full"], ...]] = ()
    eval_archs: Hidden[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Tuning(Config):
    """Choose weight, layers, temperature and noise ratio of the term for one method and IPC.

    The base method alone comes first, then trials chosen by Optuna's TPE sampler, each on all seeds unless
    the median of the trials before was better on the first ones. The same command goes on where it was cut
    off; more --trials add to what is there. OUT/tune.json has the best settings, for run --config, and
    OUT/tune.md the table. Needs Optuna: pip install 'mim4dd[tune]'.
    """

    trials: int = 30
    """Trials, the base method not counted."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the runs of a trial; a single one gives no interval."""
    weights: tuple[float, float] = (0.1, 1000.0)
    """Range of the weight, searched on a logarithmic scale."""
    layers: tuple[str, ...] = ("all", "last")
    """Feature maps: all, last, or indices such as 0,2."""
    temperatures: tuple[float, float] = (0.01, 1.0)
    """Range of the temperature, searched on a logarithmic scale."""
    noise_ratios: tuple[float | Literal["calibrated"], ...] = ("calibrated",)
    """Noise ratios; only nce has one."""
    projections: tuple[Literal["none", "random", "trained"], ...] = ("none",)
    """Linear maps into a common space."""
    out: Path | None = None
    """Folder of the results; default: runs/tune-<dataset>-<method>-ipc<n>."""
    seed: int = 0
    """Of the search."""
    data: TunedDataConfig = field(default_factory=TunedDataConfig)
    mim: TunedMimConfig = field(default_factory=TunedMimConfig)
    eval: TunedEvalConfig = field(default_factory=TunedEvalConfig)
    overwrite: Hidden[bool] = False

    def space(self) -> dict[str, Any]:
        """Return what is searched, as JSON-able values."""
        return {
            name: list(getattr(self, name))
            for name in ("weights", "layers", "temperatures", "noise_ratios", "projections")
        }

    def run_settings(self, mim: MimConfig, seed: int) -> Config:
        """Return the settings of one run, as they were given."""
        config = plain(self)
        evaluation = dataclasses.replace(config.eval, baselines=(), eval_archs=())
        return dataclasses.replace(config, mim=mim, eval=evaluation, seed=seed, out=None, overwrite=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 (the base diverged), 2 (bad input) or 130."""

    def command() -> None:
        given = sys.argv[1:] if arguments is None else arguments
        Search(read(Tuning, "python -m mim4dd.tune", given)).run()

    return guarded(command)


class Search:
    """The search for one method and IPC, kept in a folder: Optuna's journal of trials, and the runs as cells.

    Raises:
        InputError: settings that cannot be meant, or a folder with others.
    """

    def __init__(self, tuning: Tuning) -> None:
        _check(tuning)
        self.tuning = tuning
        self.device = str(pick_device(tuning.device))
        base = self._config(BASE, tuning.seeds[0])
        for layers in tuning.layers:
            rehearse(dataclasses.replace(base, mim=MimConfig(mim_weight=1.0, mim_layers=layers)))
        name = f"tune-{Path(tuning.data.dataset).stem}-{tuning.distill.method}-ipc{tuning.distill.ipc}"
        self.folder = make_folder(tuning.out or Path("runs") / name)
        self.study = _study(
            self.folder,
            {"base": to_json(base), "seeds": [*tuning.seeds], "seed": tuning.seed, **tuning.space()},
        )
        self.seconds: list[float] = []  # of every run so far

    def run(self) -> None:
        """Search until there are as many trials as asked for, keeping the table up to date.

        Raises:
            DivergenceError: the base method alone diverged.
        """
        while len(trials := self.trials()) <= self.tuning.trials:
            done = len(trials)
            # A sampler of its own for every trial: a search that was cut off goes on as if it had not been.
            self.study.sampler = _sampler(self.tuning.seed, done)
            trial = self.study.ask()
            mim = self._suggest(trial) if done else BASE
            try:
                self._try(trial, mim, trials)
            except KeyboardInterrupt:
                complain(f"{done} of {self.tuning.trials + 1} trials are finished; the same command goes on")
                raise
            trials = self.trials()
            if trials[0].failed:
                raise DivergenceError(f"the base method alone failed: {trials[0].failed}")
            write(self.folder, self.tuning.run_settings, trials, self._facts())
        show(trials)
        console.print(f"Wrote tune.json and tune.md into {self.folder}/", soft_wrap=True)

    def trials(self) -> list[Trial]:
        """Return the trials that are through, the base method first."""
        return [
            Trial(
                mim=MimConfig(**trial.user_attrs["mim"]),
                accuracies={int(seed): a for seed, a in trial.user_attrs["accuracies"].items()},
                complete=trial.state.name == "COMPLETE",
                failed=trial.user_attrs.get("failed"),
            )
            for trial in self.study.trials
            if trial.state.name in ("COMPLETE", "PRUNED")
        ]

    def _try(self, trial: optuna.Trial, mim: MimConfig, before: Sequence[Trial]) -> None:
        """Run a trial seed by seed; its value is the mean of the differences to the base."""
        from optuna.trial import TrialState

        seeds = self.tuning.seeds
        accuracies: dict[int, float] = {}
        trial.set_user_attr("mim", dataclasses.asdict(mim))
        trial.set_user_attr("accuracies", accuracies)
        differences: list[float] = []
        for k, seed in enumerate(seeds):
            cell = Cell(self.folder / "cells" / _name(mim) / f"seed{seed}", self._config(mim, seed))
            console.print(
                f"[bold]Trial {len(before)} of {self.tuning.trials}: {describe(mim)}; seed {seed}[/]"
                + self._left(len(before), k),
                soft_wrap=True,
            )
            outcome = cell.found() or cell.run()
            if "failed" in outcome:
                trial.set_user_attr("failed", outcome["failed"])
                self.study.tell(trial, state=TrialState.PRUNED)
                return
            self.seconds.append(sum(outcome["seconds"].values()))
            accuracies[seed] = outcome["accuracy_mean"]
            trial.set_user_attr("accuracies", accuracies)
            differences.append(accuracies[seed] - before[0].accuracies[seed] if before else 0.0)
            trial.report(statistics.fmean(differences), k)
            if before and k + 1 < len(seeds) and trial.should_prune():
                console.print("given up: the median of the trials before is better")
                self.study.tell(trial, state=TrialState.PRUNED)
                return
        self.study.tell(trial, statistics.fmean(differences))

    def _suggest(self, trial: optuna.Trial) -> MimConfig:
        """Return the settings to try, numbers rounded to three digits."""
        tuning = self.tuning
        values: dict[str, Any] = {
            "mim_weight": _rounded(trial.suggest_float("weight", *tuning.weights, log=True)),
            "mim_layers": trial.suggest_categorical("layers", tuning.layers),
            "mim_temperature": _rounded(trial.suggest_float("temperature", *tuning.temperatures, log=True)),
            "mim_noise_ratio": trial.suggest_categorical("noise_ratio", tuning.noise_ratios),
            "mim_projection": trial.suggest_categorical("projection", tuning.projections),
        }
        return dataclasses.replace(recast(MimConfig, tuning.mim), **values)

    def _config(self, mim: MimConfig, seed: int) -> Config:
        config = dataclasses.replace(self.tuning.run_settings(mim, seed), device=self.device)
        check(config)
        return with_presets(config)

    def _left(self, done: int, k: int) -> str:
        runs = (self.tuning.trials + 1 - done) * len(self.tuning.seeds) - k
        return f"; {about(statistics.fmean(self.seconds) * runs)} left at most" if self.seconds else ""

    def _facts(self) -> dict[str, Any]:
        return {
            "seeds": self.tuning.seeds,
            "search_seed": self.tuning.seed,
            "space": self.tuning.space(),
            "run": to_json(self._config(BASE, self.tuning.seeds[0])),
        }


def _study(folder: Path, settings: dict[str, Any]) -> optuna.Study:
    """Return the study kept in `folder`, a new one if there is none."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise InputError("python -m mim4dd.tune needs Optuna; pip install 'mim4dd[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="mim4dd",
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(folder / "trials.log"))),
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED),
        load_if_exists=True,
    )
    if study.user_attrs.get("settings", settings) != settings:
        raise InputError(f"{folder} holds a search with other settings; give another --out")
    study.set_user_attr("settings", settings)
    return study


def _sampler(seed: int, number: int) -> optuna.samplers.TPESampler:
    import optuna

    random = generator(seed, f"tune/{number}")
    return optuna.samplers.TPESampler(seed=int(torch.randint(2**31, (), generator=random)))


def _check(tuning: Tuning) -> None:
    if not tuning.data.validation:
        raise InputError("--validation is 0: settings are never chosen on the test set; hold out 0.1, say")
    if tuning.eval.num_eval == 0:
        raise InputError("--num-eval is 0: nothing to choose by, expected at least 1")
    if tuning.trials < 1:
        raise InputError(f"--trials is {tuning.trials}, expected at least 1")
    for option in ("seeds", "layers", "noise_ratios", "projections"):
        if not getattr(tuning, option):
            raise InputError(f"--{option.replace('_', '-')} names nothing, expected one or more")
    for option in ("weights", "temperatures"):
        low, high = getattr(tuning, option)
        if not 0 < low <= high < float("inf"):
            raise InputError(f"--{option} is {low} {high}, expected a range of positive numbers")
    for layers, ratio in itertools.product(tuning.layers, tuning.noise_ratios):
        mim = dataclasses.replace(
            recast(MimConfig, tuning.mim), mim_weight=1.0, mim_layers=layers, mim_noise_ratio=ratio
        )
        check(tuning.run_settings(mim, tuning.seeds[0]))


def _name(mim: MimConfig) -> str:
    if not mim.mim_weight:
        return "base"
    return (
        f"w{mim.mim_weight:g}-{mim.mim_layers}-t{mim.mim_temperature:g}-"
        f"{mim.mim_noise_ratio}-{mim.mim_projection}"
    )


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    sys.exit(main())
