"""`python -m mim4dd.run`: distil a data set, score it beside baselines, leave files and a picture."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from . import __version__, report
from .config import Config, check, read_config, settled, to_json, with_presets
from .console import complain, console, guarded, print_table, steps, with_accuracy
from .distill import DivergenceError, Progress
from .errors import InputError
from .evaluate import Score
from .experiment import Experiment
from .memory import GIB
from .synthetic import SyntheticSet

SAVE_EVERY = 60  # seconds between saves of a set in the making


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 (diverged), 2 (bad input) or 130 (interrupted)."""

    def command() -> int:
        experiment = Experiment.prepare(parse(sys.argv[1:] if arguments is None else arguments))
        return run(experiment, open_folder(experiment))

    return guarded(command)


def parse(arguments: Sequence[str]) -> Config:
    """Read the command line and, under it, the file that --config names."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    path = first.parse_known_args(arguments)[0].config
    config = tyro.cli(
        Config,
        prog="python -m mim4dd.run",
        args=arguments,
        default=read_config(path) if path else Config(),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    check(config)
    return with_presets(config)


def open_folder(experiment: Experiment) -> Path:
    """Create and return the folder of the results, never one that holds something already.

    Raises:
        InputError: it cannot be written, or holds something and --overwrite is not given.
    """
    config = experiment.config
    folder = config.out
    if folder is None:
        name = f"{experiment.name}-{config.distill.method}-ipc{config.distill.ipc}-{config.seed}"
        folder, k = Path("runs") / name, 1
        while _taken(folder) and not config.overwrite:
            k += 1
            folder = Path("runs") / f"{name}-{k}"
    elif _taken(folder) and not config.overwrite:
        raise InputError(f"--out {folder} holds something already; give another folder, or --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written ({error.strerror}); give another") from error
    return folder


def _taken(folder: Path) -> bool:
    return folder.is_file() or (folder.is_dir() and any(folder.iterdir()))


def run(experiment: Experiment, folder: Path) -> int:
    """Distil, evaluate and write; return the exit code."""
    config, train = experiment.config, experiment.train
    console.print(
        f"[bold]{experiment.name}[/]: {len(train)} training images of {train.num_classes} classes, "
        f"{'x'.join(map(str, train.images.shape[1:]))}; {config.distill.ipc} a class to distil on "
        f"{device_name(experiment.device)}",
        soft_wrap=True,
    )
    at_once, needed = experiment.footprint
    console.print(
        f"{config.precision}; {at_once} real images at a time; the networks' maps take about "
        f"{needed / GIB:.2f} GiB",
        soft_wrap=True,
    )
    keeper = Keeper(experiment, folder / "synthetic.safetensors")
    began = time.monotonic()
    try:
        keeper.images = with_progress("distil", experiment, experiment.distill, keeper)
    except (DivergenceError, KeyboardInterrupt) as error:
        keeper.save()
        complain(str(error) or "interrupted")
        complain(f"the last good set, of iteration {keeper.iteration}, is in {keeper.path}")
        return 1 if isinstance(error, DivergenceError) else 130
    synthetic = keeper.save()
    distilled = time.monotonic()
    score, baselines = evaluations(experiment, keeper.images)
    result = {
        **synthetic.metadata,
        **score_facts(score),
        "baselines": {name: score_facts(other) for name, other in baselines.items()},
        "evaluated_on": "validation" if config.data.validation else "test",
        "seconds": {
            "distill": round(distilled - began, 1),
            "evaluate": round(time.monotonic() - distilled, 1),
        },
        "history": keeper.history,
    }
    report.write(folder, synthetic, result)
    if score:
        print_table(
            f"Accuracy on the {result['evaluated_on']} set of {len(experiment.test)} images",
            ("trained on", "accuracy", "networks"),
            report.rows(result),
        )
    console.print(
        f"Wrote synthetic.safetensors, result.json, images.png and report.html into {folder}/", soft_wrap=True
    )
    return 0


class Keeper:
    """Keeps the last good images of a run, now and then on disk, and the history of its loss."""

    def __init__(self, experiment: Experiment, path: Path) -> None:
        self.experiment = experiment
        self.path = path
        self.images = experiment.start.images
        self.iteration = 0
        self.history: list[dict[str, float]] = []
        self._saved = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """Take a look of the distillation loop."""
        self.images, self.iteration = progress.images, progress.iteration
        self.history.append({"iteration": progress.iteration, **progress.terms})
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> SyntheticSet:
        """Write the set and return it, on the CPU."""
        config, start = self.experiment.config, self.experiment.start
        facts = {
            "dataset": self.experiment.name,
            "method": config.distill.method,
            "mim_weight": config.mim.mim_weight,
            "ipc": config.distill.ipc,
            "seed": config.seed,
            "iterations": self.iteration,
            "device": device_name(self.experiment.device),
            "version": __version__,
            "config": to_json(config),
        }
        tensors = (
            self.images.cpu(),
            start.labels.cpu(),
            start.class_names,
            start.mean.cpu(),
            start.std.cpu(),
        )
        synthetic = SyntheticSet(*tensors, facts)
        synthetic.save(self.path)
        self._saved = time.monotonic()
        return synthetic


def with_progress(
    title: str,
    experiment: Experiment,
    distill: Callable[[Callable[[Progress], None]], Tensor],
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Tensor:
    """Distil under a progress bar that shows the loss and its terms."""
    with steps(title, settled(experiment.config.distill.iterations)) as bar:

        def look(progress: Progress) -> None:
            terms = "  ".join(f"{name} {value:.4g}" for name, value in progress.terms.items())
            bar.advance_to(progress.iteration, f"loss {sum(progress.terms.values()):.4g}  {terms}")
            on_progress(progress)

        return distill(look)


def evaluations(experiment: Experiment, images: Tensor) -> tuple[Score | None, dict[str, Score]]:
    """Score the distilled images and the baselines, each on networks of the same seeds."""
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
    return with_accuracy("evaluate", num_networks, functools.partial(experiment.score, images)), baselines


def score_facts(score: Score | None) -> dict[str, Any]:
    """Return a score for result.json, with nulls if there is none."""
    return {
        "accuracy_mean": score.mean if score else None,
        "accuracy_std": score.std if score else None,
        "num_networks": len(score.accuracies) if score else 0,
        "accuracies": score.accuracies if score else [],
    }


def device_name(device: torch.device) -> str:
    """Return what people call the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


if __name__ == "__main__":
    sys.exit(main())
