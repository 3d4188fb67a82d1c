"""`python -m mim4dd.run`: distil a data set, score it beside baselines, leave files and a picture."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import Config, check
from .console import guarded
from .errors import InputError
from .experiment import Experiment
from .files import make_folder
from .options import read
from .presets import with_presets
from .runner import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 (diverged), 2 (bad input) or 130 (interrupted)."""

    def command() -> None:
        experiment = Experiment.prepare(parse(sys.argv[1:] if arguments is None else arguments))
        run(experiment, open_folder(experiment))

    return guarded(command)


def parse(arguments: Sequence[str]) -> Config:
    """Read the command line and, under it, the file that --config names."""
    config = read(Config, "python -m mim4dd.run", arguments)
    check(config)
    return with_presets(config)


def open_folder(experiment: Experiment) -> Path:
    """Create and return the folder of the results, never one that holds something already.

    Raises:
        InputError: it cannot be written, or holds something and --overwrite is not given.
    """
    config, dataset = experiment.config, experiment.config.data.dataset
    folder = config.out
    if folder is None:
        name = f"{experiment.name}-{config.distill.method}-ipc{config.distill.ipc}-{config.seed}"
        if config.overwrite:
            return make_folder(Path("runs") / name, dataset)
        return _claimed(make_folder(Path("runs"), dataset), name)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not config.overwrite):
        raise InputError(f"--out {folder} holds something already; give another folder, or --overwrite")
    return make_folder(folder, dataset)


def _claimed(runs: Path, name: str) -> Path:
    """Create the first of name, name-2, ... that is not there: of two runs at once each gets its own."""
    for k in itertools.count(1):
        folder = runs / (name if k == 1 else f"{name}-{k}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("there is always a next number")


if __name__ == "__main__":
    sys.exit(main())
