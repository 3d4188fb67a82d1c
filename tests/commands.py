"""The command lines in tests: the smallest run, and what goes in and comes out."""

import subprocess
import sys

import numpy as np

from mim4dd.commands.options import plain, read
from mim4dd.data import load
from mim4dd.experiment import Experiment
from mim4dd.run import RunConfig, filled

QUICK = ["--quick", "--iterations", "3", "--eval-epochs", "2"]
BARE = [*QUICK, "--num-eval", "0", "--mim-weight", "0"]  # no student of the term is trained for it


def command(*arguments, module="run", **options):
    """Run `python -m mim4dd.<module>` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", f"mim4dd.{module}", *arguments], capture_output=True, text=True, **options
    )


def parse(arguments):
    """The settings of a run by its command line, none left open."""
    return filled(plain(read(RunConfig, "run", arguments)))


def prepare(options="", load=load):
    """A small experiment of seed 3 with these options of the command line."""
    small = "--quick --width 8 --seed 3 --device cpu "
    return Experiment.prepare(parse((small + options).split()), load)


def files(folder):
    """Names of what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def npz(path, **changes):
    """Write small colour images of four classes with other arrays in the place of some; return the path."""
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 255, (40, 12, 12, 3), dtype=np.uint8),
        "y_train": np.arange(40) % 4,
        "x_test": rng.integers(0, 255, (8, 12, 12, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
    }
    np.savez(path, **{**arrays, **changes})
    return str(path)
