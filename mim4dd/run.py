"""`python -m mim4dd.run`: distil a data set, score it beside baselines, write files and a picture."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import extras  # noqa: F401 - before all that needs them
from .commands.checkpoint import STATE, Checkpoint
from .commands.config_check import check
from .commands.console import complain
from .commands.exits import guarded
from .commands.options import plain, read
from .commands.presets import with_presets
from .commands.report import RESULT
from .commands.runner import prepared_experiment, run
from .config import Config
from .errors import InputError
from .experiment import Experiment
from .files import LOCK, make_folder


@dataclass(frozen=True)
class RunConfig(Config):
    """Distil a labelled image set into a few synthetic images per class.

    Attributes:
        resume: Folder of an interrupted run to resume; the result is that of an uninterrupted one. Takes no
            other option but --memory-budget.
    """

    resume: Path | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 (diverged), 2 (bad input) or 130 (interrupted)."""

    def command() -> None:
        given = sys.argv[1:] if arguments is None else arguments
        settings = read(RunConfig, "python -m mim4dd.run", given)
        if settings.resume:
            check_alone(given)
            folder, checkpoint = unfinished(settings.resume)
            config = checkpoint.config
            if settings.memory_budget is not None:
                config = dataclasses.replace(config, memory_budget=settings.memory_budget)
                check(config)
            experiment = prepared_experiment(config)
        else:
            experiment = prepared_experiment(filled(plain(settings)))
            folder, checkpoint = open_folder(experiment), None
        overwritten = None if checkpoint else saved_at(folder)
        try:
            run(experiment, folder, checkpoint)
        except (KeyboardInterrupt, MemoryError, RuntimeError, BrokenPipeError):
            if saved_at(folder) not in (None, overwritten):
                complain(f"to resume: python -m mim4dd.run --resume {shlex.quote(str(folder))}")
            raise
        finally:
            if experiment.config.out is None:
                with contextlib.suppress(OSError):  # if nothing was saved, the next run may have the name
                    folder.rmdir()

    return guarded(command)


def filled(config: Config) -> Config:
    """Check the settings of a run and fill in those that were not given.

    Raises:
        InputError: invalid settings.
    """
    check(config)
    config = with_presets(config)
    if "base" in config.eval.baselines and not config.mim.mim_weight:
        raise InputError("--baselines base is the run itself, since --mim-weight is 0: leave it out")
    return config


def check_alone(arguments: Sequence[str]) -> None:
    """Check that no other options go with --resume, not even one with its default value.

    Raises:
        InputError: one does.
    """
    for argument in arguments:
        option = argument.split("=")[0].replace("_", "-")
        if option.startswith("--") and option not in ("--resume", "--memory-budget"):
            raise InputError(f"--resume uses the settings of that run; leave out {option}")


def unfinished(folder: Path) -> tuple[Path, Checkpoint]:
    """Return the folder of the run that --resume names, and where that run is.

    Raises:
        InputError: there is none.
    """
    folder = folder.parent if folder.name == STATE else folder
    if not folder.is_dir():
        raise InputError(f"--resume {folder}: there is no such folder")
    if (folder / RESULT).exists():
        raise InputError(f"--resume {folder}: that run is finished, see its {RESULT}")
    return folder, Checkpoint.load(folder)


def saved_at(folder: Path) -> int | None:
    """Return when the state of an unfinished run was saved, in ns; None if there is none."""
    path = folder / STATE
    return path.stat().st_mtime_ns if path.exists() else None


def open_folder(experiment: Experiment) -> Path:
    """Create and return the folder of the results, never one that is not empty.

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
    if folder.is_file():
        raise InputError(f"--out {folder} is a file; give a folder")
    held = folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
    if held and not config.overwrite:
        resume = f"--resume {shlex.quote(str(folder))}, " if (folder / STATE).exists() else ""
        raise InputError(f"--out {folder} is not empty; give another folder, {resume}or --overwrite")
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
