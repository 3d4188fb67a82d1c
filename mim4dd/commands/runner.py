"""A run from start to files: distil, save now and then, evaluate beside baselines, write, report."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from torch import Tensor

from .. import __version__
from ..config import Config, settled
from ..data import load
from ..devices import device_name
from ..distill import DivergenceError, Progress
from ..errors import InputError
from ..evaluation import Score
from ..experiment import Experiment, Load
from ..files import atomic, exclusive
from ..synthetic import IMAGES, SyntheticSet
from . import report, scoring
from .checkpoint import Checkpoint, remove_checkpoint
from .config_json import to_json
from .console import (
    complain,
    console,
    on_architectures,
    prepared,
    print_table,
    steps,
    with_accuracy,
)

SAVE_EVERY = 60  # seconds between saves of a set in the making


def prepared_experiment(config: Config, load: Load = load) -> Experiment:
    """Return `Experiment.prepare` of these, under a spinner: large sets take minutes."""
    with console.status("reading the images, and choosing those to start from"):
        return Experiment.prepare(config, load)


def run(experiment: Experiment, folder: Path, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """Distil, evaluate and write; return what result.json holds.

    Args:
        experiment: what to run.
        folder: where its files go.
        checkpoint: of the same run, which continues from it.

    Raises:
        DivergenceError, KeyboardInterrupt, and what torch raises, of too little memory say: the last good set
            has been saved, if it was still being distilled.
        InputError: a checkpoint of other data or of another device, or another process runs in the folder.
    """
    dataset = experiment.config.data.dataset
    if checkpoint and checkpoint.data != experiment.data:
        raise InputError(f"the images of {dataset} differ from those of the run in {folder}; start a new run")
    with exclusive(folder):
        introduce(experiment, checkpoint)
        recorder = distilled(experiment, folder, checkpoint)
        result = evaluated(experiment, recorder)
        report.write(folder, recorder.saved, result)
        remove_checkpoint(folder)  # there is nothing left to go on with
    show(result, len(experiment.test))
    console.print(
        f"Wrote synthetic.safetensors, result.json, images.png and report.html into {folder}/", soft_wrap=True
    )
    return result


def introduce(experiment: Experiment, checkpoint: Checkpoint | None) -> None:
    """Print what is going to be run."""
    config, train = experiment.config, experiment.train
    console.print(
        f"{experiment.name}: {len(train)} training images of {train.num_classes} classes, "
        f"{'x'.join(map(str, train.images.shape[1:]))}; {config.distill.ipc} per class to distil on "
        f"{device_name(experiment.device)}",
        soft_wrap=True,
    )
    weight = settled(config.mim.mim_weight)
    workspace = " and cuDNN's workspace" if experiment.device.type == "cuda" else ""
    term = f"the term has weight {weight:g}" if weight else "without the term (weight 0)"
    console.print(
        f"{config.precision}; an update takes about {decimal(experiment.footprint)}{workspace}; {term}",
        soft_wrap=True,
    )
    if checkpoint:
        console.print(f"{checkpoint.iteration} of {config.distill.iterations} updates are done already")
    if config.distill.soft_labels:
        console.print("For the soft labels a network is trained on the real images as well.")


def distilled(experiment: Experiment, folder: Path, checkpoint: Checkpoint | None) -> Recorder:
    """Distil, saving now and then and at the end, even an early one. Raises as `run` does."""
    prepared(f"prepare {experiment.config.distill.method}", experiment.prepare_method())
    recorder = Recorder(experiment, folder, checkpoint)
    prepared("train networks for the term", experiment.prepare_term())
    distil = functools.partial(experiment.distill, state=recorder.state)
    try:
        recorder.synthetic = with_progress("distil", experiment, distil, recorder)
        recorder.save()
    except (KeyboardInterrupt, MemoryError, RuntimeError, BrokenPipeError) as error:
        if recorder.iteration or not recorder.path.exists():
            if recorder.unsaved:
                recorder.save()
            if isinstance(error, DivergenceError):
                remove_checkpoint(folder)  # it would only diverge again
            complain(f"the last good set, of iteration {recorder.iteration}, is in {recorder.path}")
        else:
            complain(f"{folder} still holds the earlier results")
        raise
    return recorder


class Recorder:
    """Keeps the last good set of a run, now and then on disk, what it needs to go on, and its history."""

    def __init__(self, experiment: Experiment, folder: Path, checkpoint: Checkpoint | None = None) -> None:
        self.experiment = experiment
        self.folder = folder
        self.path = folder / IMAGES
        self.synthetic = experiment.start
        self.state: Mapping[str, Tensor] | None = None
        self.history: list[dict[str, float]] = []
        self.iteration, self.unsaved = 0, checkpoint is None
        self._overwrites = checkpoint is None
        self.began = self._saved_at = time.monotonic()
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
        if time.monotonic() - self._saved_at > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the set and what it needs to go on."""
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
        self.saved = replace(self.synthetic.to("cpu"), metadata=facts)
        with atomic(self.path) as new:
            self.saved.save(new)
            if self._overwrites:  # not before what is new has been written
                report.remove(self.folder)
                remove_checkpoint(self.folder)
                self._overwrites = False
        if self.state is not None:
            Checkpoint(
                config=config,
                data=self.experiment.data,
                iteration=self.iteration,
                seconds=time.monotonic() - self.began,
                history=self.history,
                state={**self.state},
            ).save(self.folder)
        self._saved_at, self.unsaved = time.monotonic(), False


def with_progress(
    title: str,
    experiment: Experiment,
    distill: Callable[[Callable[[Progress], None]], SyntheticSet],
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> SyntheticSet:
    """Distil under a progress bar that shows the loss and its terms."""
    with steps(title, settled(experiment.config.distill.iterations)) as advance_to:

        def look(progress: Progress) -> None:
            terms = "  ".join(f"{name} {value:.4g}" for name, value in progress.terms.items())
            advance_to(progress.iteration, f"loss {sum(progress.terms.values()):.4g}  {terms}")
            on_progress(progress)

        return distill(look)


def evaluated(experiment: Experiment, recorder: Recorder) -> dict[str, Any]:
    """Score the distilled set and the baselines; return what result.json holds."""
    distilled_at = time.monotonic()
    synthetic = recorder.synthetic
    score, baselines = evaluations(experiment, synthetic)
    others = cross_architecture(experiment, synthetic, score)
    with console.status("estimating the mutual information"):
        information = experiment.information(synthetic)
    return {
        **recorder.saved.metadata,
        "network_lr": synthetic.network_lr,
        **score_facts(score),
        "baselines": {name: score_facts(other) for name, other in baselines.items()},
        "cross_architecture": {name: score_facts(other) for name, other in others.items()},
        "evaluated_on": experiment.evaluated_on,
        "mutual_information": information,
        "seconds": {
            "distill": round(distilled_at - recorder.began, 1),
            "evaluate": round(time.monotonic() - distilled_at, 1),
        },
        "history": recorder.history,
    }


def evaluations(experiment: Experiment, synthetic: SyntheticSet) -> tuple[Score | None, dict[str, Score]]:
    """Score the distilled set and the baselines, each on networks of the same seeds.

    The base method alone may diverge where the run has not; it is left out then, and the user is told.
    """
    num_networks = settled(experiment.config.eval.num_eval)
    if not num_networks:
        return None, {}
    baselines: dict[str, Score] = {}
    for name in dict.fromkeys(experiment.config.eval.baselines):
        score: Callable[..., Score] = functools.partial(scoring.baseline, experiment, name)
        if name == "base":
            try:
                base = with_progress(
                    "distil (base)", experiment, functools.partial(experiment.distill, with_mim=False)
                )
            except DivergenceError as error:
                complain(f"the base method alone is not evaluated: {error}")
                continue
            score = functools.partial(scoring.score, experiment, base)
        count = 1 if name == "full" else num_networks  # on all images one network is trained
        baselines[name] = with_accuracy(f"evaluate ({name})", count, score)
    score = functools.partial(scoring.score, experiment, synthetic)
    return with_accuracy("evaluate", num_networks, score), baselines


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
        functools.partial(scoring.score, experiment, synthetic),
    )
    return {name: score if name == own else others[name] for name in names}


def show(result: Mapping[str, Any], num_test: int) -> None:
    """Print the outcome of a run."""
    if result["num_networks"]:
        print_table(
            f"Accuracy on the {result['evaluated_on']} set of {num_test} images",
            ("trained on", "accuracy", "networks"),
            report.rows(result),
            strong_last=True,
        )
    if result["cross_architecture"]:
        print_table(
            "The same images, other networks trained on them",
            ("network", "accuracy", "networks"),
            report.architectures(result),
        )
    if information := report.information(result):
        console.print(f"Mutual information with held-out real images: {information}", soft_wrap=True)


def score_facts(score: Score | None) -> dict[str, Any]:
    """Return a score for result.json, with nulls if there is none."""
    return {
        "accuracy_mean": score.mean if score else None,
        "accuracy_std": score.std if score else None,
        "num_networks": len(score.accuracies) if score else 0,
        "accuracies": score.accuracies if score else [],
    }
