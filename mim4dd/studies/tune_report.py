"""The output of tuning: the best settings in tune.json, and the table of the best trials beside the base."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__, files
from ..commands.config_json import to_json
from ..commands.console import console, print_table
from ..config import Config, MimConfig
from ..evaluation import Score
from .compare_report import markdown_table
from .compare_table import number
from .paired import Difference, paired_difference

BEST = 5  # trials in the table
# Setting of the term -> its column.
SETTINGS = {
    "mim_weight": "weight",
    "mim_temperature": "τ",
    "mim_layers": "layers",
    "mim_networks": "networks",
    "mim_noise_ratio": "noise ratio",
    "mim_projection": "projection",
}
NOTES = """\
Mean ± standard deviation over the seeds {seeds}, each with its own validation split ({share:g} of the
training images); difference to the base, paired by seed, with its 95 % t-interval. The test set was not
used.
Searched by Optuna's TPE sampler with seed {search_seed}; mim4dd {version}.
"""


@dataclass(frozen=True)
class Trial:
    """Settings that were tried.

    Attributes:
        mim: what was tried; weight 0 is the base.
        accuracies: on the validation split, by seed.
        complete: whether it ran on all seeds.
        failed: why a run gave nothing, if so.
    """

    mim: MimConfig
    accuracies: dict[int, float]
    complete: bool
    failed: str | None = None

    @property
    def score(self) -> Score:
        """The accuracies, of which there is at least one."""
        return Score(tuple(self.accuracies.values()))


def ranked(trials: Sequence[Trial]) -> list[int]:
    """Return the numbers of the complete trials, the base (0) included, best first; of equals the first."""
    complete = [k for k, trial in enumerate(trials) if trial.complete]
    return sorted(complete, key=lambda k: -trials[k].score.mean)


def verdict(trials: Sequence[Trial]) -> str:
    """Say in a sentence or two what the search has shown."""
    best = ranked(trials)[0]
    if best == 0:
        return "No trial beat the base method: leave the term out."
    difference = _difference(trials, best)
    chosen = f"It was chosen among {len(trials) - 1} on these very seeds, so expect less on others."
    if difference.margin is None:
        return (
            f"Trial {best} is {difference} points over the base on one seed, which cannot be told from noise."
        )
    if difference.clear:
        return f"Trial {best} is {difference} points over the base. {chosen}"
    return f"The best trial, {best}, is within noise of the base: {difference} points. {chosen}"


def write(
    folder: Path,
    settings: Callable[[MimConfig, int], Config],
    trials: Sequence[Trial],
    facts: dict[str, Any],
) -> None:
    """Write tune.json and tune.md, each whole or not at all.

    Args:
        folder: where.
        settings: the settings of a run with this term and seed.
        trials: those that are over, the base first.
        facts: how they were found.
    """
    best = ranked(trials)[0]
    config = to_json(settings(trials[best].mim, 0))
    method, dataset, ipc = config["distill"]["method"], config["data"]["dataset"], config["distill"]["ipc"]
    # What was chosen on a validation split is to be measured on the test set, beside the usual baselines.
    del config["data"]["validation"], config["eval"]["baselines"]
    found = {
        "verdict": verdict(trials),
        "best": best,
        "within_noise": best == 0 or not _difference(trials, best).clear,
        "trials": [_facts(trials, k) for k in range(len(trials))],
        "version": __version__,
        **facts,
    }
    lines = [
        f"# Tuning of {method} on {dataset}, {ipc} per class\n",
        markdown_table(columns(trials), table(trials)),
        f"{_counts(trials)} {verdict(trials)}\n",
        *([_confirm(folder, config, facts["seeds"])] if best else []),
        NOTES.format(
            seeds=", ".join(map(str, facts["seeds"])),
            share=facts["run"]["data"]["validation"],
            search_seed=facts["search_seed"],
            version=__version__,
        ),
        f"Searched:\n\n```json\n{json.dumps(facts['space'], indent=2, ensure_ascii=False)}\n```\n",
        f"Settings of the runs:\n\n```json\n{json.dumps(facts['run'], indent=2, ensure_ascii=False)}\n```\n",
    ]
    files.write(folder / "tune.md", "\n".join(lines))
    files.write(folder / "tune.json", json.dumps({"config": config, "found": found}, indent=2))


def show(trials: Sequence[Trial]) -> None:
    """Print the table and the verdict."""
    print_table("The base method and the best trials", columns(trials), table(trials))
    console.print(f"{_counts(trials)} {verdict(trials)}", soft_wrap=True)


def columns(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Return the headings of `table`."""
    names = (SETTINGS[setting] for setting in _varied(trials))
    return ("trial", *names, "accuracy, %", "difference, points")


def table(trials: Sequence[Trial]) -> list[tuple[str, ...]]:
    """Return the base and the best trials, with `columns`."""
    lines: list[tuple[str, ...]] = []
    for k in [0, *[k for k in ranked(trials) if k][:BEST]]:
        trial = trials[k]
        settings = (_text(trial.mim, setting) for setting in _varied(trials))
        lines.append((str(k), *settings, trial.score.percent(2), str(_difference(trials, k)) if k else ""))
    return lines


def describe(mim: MimConfig) -> str:
    """Return the settings of the term that are searched, for people."""
    if not mim.mim_weight:
        return "base (weight 0)"
    return ", ".join(f"{name} {_text(mim, setting)}" for setting, name in SETTINGS.items())


def _varied(trials: Sequence[Trial]) -> list[str]:
    """Return the settings to show: weight and temperature, and what is not the same in all trials."""
    found = {name: {getattr(trial.mim, name) for trial in trials[1:]} for name in SETTINGS}
    return [name for name in SETTINGS if name in ("mim_weight", "mim_temperature") or len(found[name]) > 1]


def _text(mim: MimConfig, setting: str) -> str:
    value = getattr(mim, setting)
    if not mim.mim_weight:
        return "0" if setting == "mim_weight" else ""
    return number(value) if isinstance(value, float | int) else str(value)


def _difference(trials: Sequence[Trial], k: int) -> Difference:
    difference = paired_difference(trials[k].accuracies, trials[0].accuracies)
    assert difference is not None  # a complete trial has all seeds of the base
    return difference


def _facts(trials: Sequence[Trial], k: int) -> dict[str, Any]:
    trial = trials[k]
    return {
        "mim": vars(trial.mim),
        "accuracies": trial.accuracies,
        "complete": trial.complete,
        "failed": trial.failed,
        "difference": _difference(trials, k).facts() if k and trial.complete else None,
    }


def _counts(trials: Sequence[Trial]) -> str:
    tried = trials[1:]
    failed = sum(trial.failed is not None for trial in tried)
    early = sum(not trial.complete for trial in tried) - failed
    return f"{len(tried)} trials: {early} given up early, {failed} failed."


def _confirm(folder: Path, config: dict[str, Any], seeds: Sequence[int]) -> str:
    fresh = " ".join(str(max(seeds) + 1 + k) for k in range(5))
    settings, out = (shlex.quote(str(folder / name)) for name in ("tune.json", "confirm"))
    command = (
        f"python -m mim4dd.compare --config {settings} --out {out}"
        f" --methods {config['distill']['method']} --ipcs {config['distill']['ipc']}"
        f" --mim-weights 0 {number(config['mim']['mim_weight'])} --seeds {fresh}"
    )
    return f"To confirm it on the test set, with new seeds:\n\n```console\n{command}\n```\n"
