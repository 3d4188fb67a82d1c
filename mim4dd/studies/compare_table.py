"""From the outcomes of many runs to a table: means over seeds, and differences paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation import Score
from .paired import Difference, paired_difference

REAL = {"random": "random real", "kmeans": "k-means real"}  # baselines, for people


@dataclass(frozen=True)
class Arm:
    """What is compared at one IPC.

    Attributes:
        name: a base method, or a baseline of real images.
        weight: of the mutual-information term; None for a baseline.
        ipc: images per class.
    """

    name: str
    weight: float | None
    ipc: int

    @property
    def folder(self) -> str:
        """A name for files."""
        weight = "" if self.weight is None else f"-w{number(self.weight)}"
        return f"{self.name}{weight}-ipc{self.ipc}"

    def __str__(self) -> str:
        return REAL[self.name] if self.weight is None else f"{self.name}, weight {number(self.weight)}"

    @classmethod
    def of(cls, outcome: Mapping[str, Any]) -> Arm:
        """Return the arm that the outcome of a cell belongs to."""
        config = outcome["config"]
        ipc = config["distill"]["ipc"]
        if "baseline" in outcome:
            return cls(outcome["baseline"], None, ipc)
        return cls(config["distill"]["method"], config["mim"]["mim_weight"], ipc)


def in_order(arms: Iterable[Arm]) -> list[Arm]:
    """Return each arm once: by IPC, baselines first, methods by name, weights ascending."""
    return sorted(set(arms), key=lambda arm: (arm.ipc, arm.weight is not None, arm.name, arm.weight or 0))


Outcomes = Mapping[tuple[Arm, int], dict[str, Any]]  # by arm and seed: a result, or {"failed": why}


@dataclass(frozen=True)
class Row:
    """An arm over the seeds.

    Attributes:
        arm: which one.
        accuracies: by seed, each the mean over the networks of a run.
        seconds: of distilling, mean over the seeds; None for a baseline.
        difference: to weight 0 of the same method and IPC; None for that one itself, and where there is none.
        failed: by seed: why a run gave nothing.
    """

    arm: Arm
    accuracies: Mapping[int, float]
    seconds: float | None
    difference: Difference | None
    failed: Mapping[int, str]

    @property
    def score(self) -> Score | None:
        """The accuracies, if there are any."""
        return Score(tuple(self.accuracies.values())) if self.accuracies else None

    def cells(self) -> tuple[str, ...]:
        """Return its texts for a table with `COLUMNS`."""
        weight = "" if self.arm.weight is None else number(self.arm.weight)
        name = str(self.arm) if self.arm.weight is None else self.arm.name
        accuracy = self.score.percent(2) if self.score else ""
        seeds = f"{len(self.accuracies)}" + (f", {len(self.failed)} failed" if self.failed else "")
        seconds = "" if self.seconds is None else f"{self.seconds:.0f}"
        difference = str(self.difference or "")
        if self.difference and self.difference.count < len(self.accuracies):
            difference += f" ({self.difference.count} of the seeds)"
        return str(self.arm.ipc), name, weight, accuracy, seeds, seconds, difference

    def facts(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return {
            "name": self.arm.name,
            "mim_weight": self.arm.weight,
            "ipc": self.arm.ipc,
            "accuracy_mean": self.score.mean if self.score else None,
            "accuracy_std": self.score.std if self.score else None,
            "accuracies": self.accuracies,
            "seconds": self.seconds,
            "difference": self.difference.facts() if self.difference else None,
            "failed": self.failed,
        }


COLUMNS = ("IPC", "method", "weight", "accuracy, %", "seeds", "distil, s", "difference, points")


def rows(arms: Sequence[Arm], outcomes: Outcomes, architecture: str | None = None) -> list[Row]:
    """Return a row for each arm with any outcome, in the order of `arms`.

    Args:
        arms: all there are.
        outcomes: so far.
        architecture: the one evaluated on; default: that of the runs. Baselines are not evaluated on others.
    """

    def accuracies(arm: Arm) -> dict[int, float]:
        scores = {seed: _score(outcome, architecture) for (a, seed), outcome in outcomes.items() if a == arm}
        return {seed: score["accuracy_mean"] for seed, score in scores.items() if score}

    table = []
    for arm in arms:
        ours = accuracies(arm)
        done = {seed: outcome for (a, seed), outcome in outcomes.items() if a == arm}
        failed = {seed: o["failed"] for seed, o in done.items() if "failed" in o}
        seconds = [o["seconds"]["distill"] for o in done.values() if "distill" in o.get("seconds", {})]
        difference = paired_difference(ours, accuracies(Arm(arm.name, 0.0, arm.ipc))) if arm.weight else None
        if ours or failed:
            table.append(Row(arm, ours, statistics.fmean(seconds) if seconds else None, difference, failed))
    return table


def _score(outcome: dict[str, Any], architecture: str | None) -> dict[str, Any] | None:
    if "failed" in outcome:
        return None
    return outcome.get("cross_architecture", {}).get(architecture) if architecture else outcome


def number(value: float) -> str:
    """Return a number in full, without a trailing ".0"."""
    return str(value).removesuffix(".0")
