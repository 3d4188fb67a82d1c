"""A run from start to files: distil, save now and then, evaluate beside baselines, write, and say so."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from torch import Tensor

from . import __version__, report
from .checkpoint import Checkpoint, remove
from .config import Config, settled, to_json
from .console import (
    complain,
    console,
    on_architectures,
    prepared,
    print_architectures,
    print_table,
    steps,
    with_accuracy,
)
from .devices import device_name
from .distill import DivergenceError, Progress
from .errors import InputError
from .evaluation import Score
from .experiment import Experiment
from .synthetic import IMAGES, SyntheticSet

SAVE_EVERY = 60  # seconds between saves of a set in the making


def run(experiment: Experiment, folder: Path, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """Distil, evaluate and write; return what result.json holds.

    Args:
        experiment: what to run.
        folder: where its files go.
        checkpoint: of the same run, which goes on from there.

    Raises:
        DivergenceError, KeyboardInterrupt, and what torch raises, of too little memory say: the last good set
            has been saved, if it was still being distilled.
        InputError: a checkpoint of other data or of another device.
    """
    config, train = experiment.config, experiment.train
    if checkpoint is None:
        remove(folder)  # of a run that is overwritten
    elif checkpoint.data != experiment.data:
        raise InputError(f"{config.data.dataset} has other images than the run in {folder}; start it anew")
    console.print(
        f"{experiment.name}: {len(train)} training images of {train.num_classes} classes, "
        f"{'x'.join(map(str, train.images.shape[1:]))}; {config.distill.ipc} a class to distil on "
        f"{device_name(experiment.device)}",
        soft_wrap=True,
    )
    at_once, needed = experiment.footprint
    console.print(
        f"{config.precision}; {at_once} real images at a time; the networks' maps take about "
        f"{decimal(needed)}; {the_term(config)}",
        soft_wrap=True,
    )
    if checkpoint:
        console.print(f"{checkpoint.iteration} of {config.distill.iterations} updates are done already")
    if config.distill.soft_labels:
        console.print("For the soft labels a network is trained on the real images as well.")
    prepared(f"prepare {config.distill.method}", experiment.prepare_method())
    keeper = Keeper(experiment, folder, checkpoint)
    prepared("train networks for the term", experiment.prepare_term())
    distil = functools.partial(experiment.distill, state=keeper.state)
    try:
        keeper.synthetic = with_progress("distil", experiment, distil, keeper)
        synthetic = keeper.save()
    except (KeyboardInterrupt, MemoryError, RuntimeError) as error:
        if keeper.iteration or not keeper.path.exists():
            if keeper.unsaved:
                keeper.save()
            if isinstance(error, DivergenceError):
                remove(folder)  # it would only diverge again
            complain(f"the last good set, of iteration {keeper.iteration}, is in {keeper.path}")
        else:
            complain(f"{folder} still holds what was to be overwritten")
        raise
    distilled = time.monotonic()
    score, baselines = evaluations(experiment, keeper.synthetic)
    others = cross_architecture(experiment, keeper.synthetic, score)
    result = {
        **synthetic.metadata,
        "network_lr": synthetic.network_lr,
        **score_facts(score),
        "baselines": {name: score_facts(other) for name, other in baselines.items()},
        "cross_architecture": {name: score_facts(other) for name, other in others.items()},
        "evaluated_on": experiment.evaluated_on,
        "mutual_information": experiment.information(keeper.synthetic),
        "seconds": {
            "distill": round(distilled - keeper.began, 1),
            "evaluate": round(time.monotonic() - distilled, 1),
        },
        "history": keeper.history,
    }
    report.write(folder, synthetic, result)
    remove(folder)  # there is nothing left to go on with
    if score:
        print_table(
            f"Accuracy on the {result['evaluated_on']} set of {len(experiment.test)} images",
            ("trained on", "accuracy", "networks"),
            report.rows(result),
        )
    if others:
        print_architectures("The same images, other networks trained on them", others)
    if information := report.information(result):
        console.print(f"Mutual information with held-out real images: {information}", soft_wrap=True)
    console.print(
        f"Wrote synthetic.safetensors, result.json, images.png and report.html into {folder}/", soft_wrap=True
    )
    return result


def the_term(config: Config) -> str:
    """Return what becomes of the mutual-information term, in words."""
    weight = settled(config.mim.mim_weight)
    return f"the term has weight {weight:g}" if weight else "without the term (weight 0)"


class Keeper:
    """Keeps the last good set of a run, now and then on disk, what it needs to go on, and its history."""

    def __init__(self, experiment: Experiment, folder: Path, checkpoint: Checkpoint | None = None) -> None:
        self.experiment = experiment
        self.folder = folder
        self.path = folder / IMAGES
        self.synthetic = experiment.start
        self.state: Mapping[str, Tensor] | None = None
        self.history: list[dict[str, float]] = []
        self.iteration, self.unsaved = 0, checkpoint is None
        self.began = self._saved = time.monotonic()
        if checkpoint:
            self.state, self.iteration, self.history = (
                checkpoint.state,
                checkpoint.iteration,
                checkpoint.history,
            )
            self.began -= checkpoint.seconds

    def __call__(self, progress: Progress) -> None:
        """Take a look of the distillation loop."""
        self.synthetic, self.iteration, self.state = progress.synthetic, progress.iteration, progress.state
        self.history.append({"iteration": progress.iteration, **progress.terms})
        self.unsaved = True
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> SyntheticSet:
        """Write the set and what it needs to go on; return the set, on the CPU."""
        config = self.experiment.config
        facts = {
            "dataset": self.experiment.name,
            "data": self.experiment.data,
            "method": config.distill.method,
            "mim_weight": config.mim.mim_weight,
            "ipc": config.distill.ipc,
            "seed": config.seed,
            "iterations": self.iteration,
            "device": device_name(self.experiment.device),
            "version": __version__,
            "config": to_json(config),
        }
        synthetic = replace(self.synthetic.to("cpu"), metadata=facts)
        report.remove(self.folder)  # of what is overwritten
        synthetic.save(self.path)
        if self.state is not None:
            Checkpoint(
                config=config,
                data=self.experiment.data,
                iteration=self.iteration,
                seconds=time.monotonic() - self.began,
                history=self.history,
                state={**self.state},
            ).save(self.folder)
        self._saved, self.unsaved = time.monotonic(), False
        return synthetic


def with_progress(
    title: str,
    experiment: Experiment,
    distill: Callable[[Callable[[Progress], None]], SyntheticSet],
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> SyntheticSet:
    """Distil under a progress bar that shows the loss and its terms."""
    with steps(title, settled(experiment.config.distill.iterations)) as bar:

        def look(progress: Progress) -> None:
            terms = "  ".join(f"{name} {value:.4g}" for name, value in progress.terms.items())
            bar.advance_to(progress.iteration, f"loss {sum(progress.terms.values()):.4g}  {terms}")
            on_progress(progress)

        return distill(look)


def evaluations(experiment: Experiment, synthetic: SyntheticSet) -> tuple[Score | None, dict[str, Score]]:
    """Score the distilled set and the baselines, each on networks of the same seeds."""
    num_networks = settled(experiment.config.eval.num_eval)
    if not num_networks:
        return None, {}

    def baseline(name: str) -> Callable[..., Score]:
        if name != "base":
            return functools.partial(experiment.baseline, name)
        base = with_progress("distil (base)", experiment, lambda p: experiment.distill(p, with_mim=False))
        return functools.partial(experiment.score, base)

    names: list[str] = [*dict.fromkeys(experiment.config.eval.baselines)]
    baselines = {name: with_accuracy(f"evaluate ({name})", num_networks, baseline(name)) for name in names}
    return with_accuracy("evaluate", num_networks, functools.partial(experiment.score, synthetic)), baselines


def cross_architecture(
    experiment: Experiment, synthetic: SyntheticSet, score: Score | None
) -> dict[str, Score]:
    """Score the distilled set on the networks of --eval-archs; `score` is that of the run's own one."""
    if score is None:
        return {}
    config = experiment.config
    names, own = config.eval.eval_archs, config.distill.network
    others = on_architectures(
        (name for name in names if name != own),
        len(score.accuracies),
        functools.partial(experiment.score, synthetic),
    )
    return {name: score if name == own else others[name] for name in names}


def score_facts(score: Score | None) -> dict[str, Any]:
    """Return a score for result.json, with nulls if there is none."""
    return {
        "accuracy_mean": score.mean if score else None,
        "accuracy_std": score.std if score else None,
        "num_networks": len(score.accuracies) if score else 0,
        "accuracies": score.accuracies if score else [],
    }
