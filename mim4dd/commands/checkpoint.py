"""The state of an unfinished run, saved so that it can be resumed."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..config import Config
from ..data import NAMES
from ..errors import InputError
from ..files import atomic, expanded
from .config_json import from_json, to_json

FORMAT = "mim4dd-state-1"
STATE = "state.safetensors"  # in the folder of a run


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is.

    Attributes:
        config: its settings, defaults filled in.
        data: fingerprint of the training images as they were loaded.
        iteration: updates done.
        seconds: how long they took.
        history: a look at the loss every few updates.
        state: what `mim4dd.distill.distill` continues from.
    """

    config: Config
    data: str
    iteration: int
    seconds: float
    history: list[dict[str, float]]
    state: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write it into a run's folder, whole or not at all."""
        facts = {
            "version": __version__,
            "config": to_json(_anywhere(self.config)),
            "data": self.data,
            "iteration": self.iteration,
            "seconds": self.seconds,
            "history": self.history,
        }
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.state.items()}
        with atomic(folder / STATE) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "facts": json.dumps(facts)})

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Read what `save` wrote.

        Raises:
            InputError: there is none, or a damaged one, or one of another version.
        """
        path = folder / STATE
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            facts = json.loads(header["facts"])
            version = header["format"], facts.pop("version")
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} holds no {STATE}: no run was interrupted there, or none that can be resumed"
            ) from error
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}); start a new run") from error
        if version != (FORMAT, __version__):
            raise InputError(
                f"{path} is of another version of mim4dd: {version[1]} ({version[0]}), this is {__version__} "
                f"({FORMAT}); start a new run"
            )
        config = from_json(facts.pop("config"), str(path))
        return cls(config, state=state, **facts)


def remove_checkpoint(folder: Path) -> None:
    """Remove the checkpoint of a run that will not continue from it."""
    (folder / STATE).unlink(missing_ok=True)


def _anywhere(config: Config) -> Config:
    """Return the settings with paths that mean the same in every working directory."""
    data, trajectory = config.data, config.trajectory
    if data.dataset not in NAMES:
        data = dataclasses.replace(data, dataset=str(expanded(data.dataset).absolute()))
    if data.data_dir:
        data = dataclasses.replace(data, data_dir=data.data_dir.absolute())
    if trajectory.experts:
        trajectory = dataclasses.replace(trajectory, experts=trajectory.experts.absolute())
    return dataclasses.replace(config, data=data, trajectory=trajectory)
