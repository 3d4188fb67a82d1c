"""`python -m mim4dd.tune`: choose the settings of the mutual-information term on a validation split."""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import extras  # noqa: F401 - before all that needs them
from .commands.config_check import check
from .commands.config_json import to_json
from .commands.console import about, complain, console
from .commands.exits import guarded
from .commands.options import read, recast
from .commands.presets import with_presets
from .config import Config, MimConfig
from .data import name_of
from .devices import pick_device
from .distill import DivergenceError
from .errors import InputError
from .files import make_folder
from .seeding import generator
from .studies.cells import Cell, differences, fingerprint, refuse_foreign, refuse_other_images, rehearse
from .studies.tune_report import Trial, describe, show, write
from .studies.tune_settings import CHOICES, RANGES, SEARCHED, Tuning, check_tuning

if TYPE_CHECKING:
    import optuna

UNPRUNED = 5  # trials before any is given up


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 (the base diverged), 2 (bad input) or 130."""
    return guarded(lambda: Search(read(Tuning, "python -m mim4dd.tune", arguments)).run())


class Search:
    """The search for one method and IPC, kept in a folder: Optuna's journal of trials, and the runs as cells.

    Raises:
        InputError: invalid settings, or a folder with others.
    """

    def __init__(self, tuning: Tuning) -> None:
        check_tuning(tuning)
        self.tuning = tuning
        self.device = str(pick_device(tuning.device))
        self.base = dataclasses.replace(recast(MimConfig, tuning.mim), mim_weight=0.0)
        base = self._config(self.base, tuning.seeds[0])
        for layers in tuning.layers:
            rehearse(
                dataclasses.replace(
                    base, mim=dataclasses.replace(base.mim, mim_weight=1.0, mim_layers=layers)
                )
            )
        name = f"tune-{name_of(tuning.data.dataset)}-{tuning.distill.method}-ipc{tuning.distill.ipc}"
        folder = tuning.out or Path("runs") / name
        refuse_foreign(folder, ("trials.log", "cells"))
        self.folder = make_folder(folder, tuning.data.dataset)
        settings = {"base": to_json(base), "seeds": [*tuning.seeds], "seed": tuning.seed, **tuning.space()}
        self.study = _study(self.folder, settings, base)
        self.seconds: list[float] = []  # of every run so far

    def run(self) -> None:
        """Search until there are as many trials as asked for, keeping the table up to date.

        Raises:
            DivergenceError: the base method alone diverged.
        """
        while len(trials := self._written()) <= self.tuning.trials:
            done = len(trials)
            # A sampler for each trial, so that an interrupted search continues as if it had not been.
            self.study.sampler = _sampler(self.tuning.seed, done)
            if done == 1:
                self.study.enqueue_trial(self._default())
            trial = self.study.ask()
            mim = self._suggest(trial) if done else self.base
            try:
                self._try(trial, mim, trials)
            except KeyboardInterrupt:
                complain(
                    f"{done} of {self.tuning.trials + 1} trials are finished; "
                    "run the same command again to continue"
                )
                raise
        show(trials)
        console.print(f"Wrote tune.json and tune.md into {self.folder}/", soft_wrap=True)

    def _written(self) -> list[Trial]:
        trials = self.trials()
        if trials and trials[0].failed:
            raise DivergenceError(f"the base method alone failed: {trials[0].failed}")
        if trials:
            write(self.folder, self.tuning.run_settings, trials, self._facts())
        return trials

    def trials(self) -> list[Trial]:
        """Return the trials that are over, the base method first."""
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
                f"Trial {len(before)} of {self.tuning.trials}: {describe(mim)}; seed {seed}"
                + self._left(len(before), k),
                style="bold",
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
                console.print("given up: the median of the earlier trials is better")
                self.study.tell(trial, state=TrialState.PRUNED)
                return
        self.study.tell(trial, statistics.fmean(differences))

    def _default(self) -> dict[str, Any]:
        """Return the default settings of the term, as far as they are among those to search."""
        tuning = self.tuning
        term = with_presets(tuning.run_settings(recast(MimConfig, tuning.mim), tuning.seeds[0])).mim
        default = {setting: getattr(term, setting) for setting in SEARCHED.values()}
        for option, setting in RANGES.items():
            low, high = getattr(tuning, option)
            if not low <= default[setting] <= high:
                del default[setting]
        for option, setting in CHOICES.items():
            if default[setting] not in getattr(tuning, option):
                del default[setting]
        return default

    def _suggest(self, trial: optuna.Trial) -> MimConfig:
        """Return the settings to try, numbers rounded to three digits."""
        values: dict[str, Any] = {}
        for option, setting in RANGES.items():
            low, high = getattr(self.tuning, option)
            values[setting] = float(f"{trial.suggest_float(setting, low, high, log=True):.3g}")
        for option, setting in CHOICES.items():
            values[setting] = trial.suggest_categorical(setting, getattr(self.tuning, option))
        return dataclasses.replace(recast(MimConfig, self.tuning.mim), **values)

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
            "run": to_json(self._config(self.base, self.tuning.seeds[0])),
        }


def _study(folder: Path, settings: dict[str, Any], base: Config) -> optuna.Study:
    """Return the study kept in `folder`, a new one if there is none.

    Raises:
        InputError: it is damaged, or of other settings or images.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = {**settings, "data": fingerprint(base)}
    log = folder / "trials.log"
    if log.exists() and not (lines := log.read_bytes()).endswith(b"\n"):
        os.truncate(log, lines.rfind(b"\n") + 1)  # a full disk cut the last line; that trial is run again
    try:
        study = optuna.create_study(
            study_name="mim4dd",
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(log))),
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED),
            load_if_exists=True,
        )
        there = study.user_attrs.get("settings", settings)
        refuse_other_images(folder, there, base)
        if others := differences({**there, "data": settings["data"]}, settings):
            raise InputError(f"{folder} holds a search with other settings: {others}; give another --out")
        study.set_user_attr("settings", settings)  # finds damage in the last line, too
    except InputError:
        raise
    except (ValueError, KeyError) as error:
        raise InputError(f"{log} is damaged ({error}); remove it: finished runs are not repeated") from error
    return study


def _sampler(seed: int, number: int) -> optuna.samplers.TPESampler:
    import optuna

    random = generator(seed, f"tune/{number}")
    return optuna.samplers.TPESampler(seed=int(torch.randint(2**31, (), generator=random)))


def _name(mim: MimConfig) -> str:
    return "-".join(str(getattr(mim, setting)) for setting in SEARCHED.values()) if mim.mim_weight else "base"


if __name__ == "__main__":
    sys.exit(main())
