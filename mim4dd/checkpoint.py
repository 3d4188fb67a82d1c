"""The file that a run in the making leaves, so that it can go on where it was cut off."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import __version__
from .config import Config, from_json, to_json
from .errors import InputError
from .files import atomic

FORMAT = "mim4dd-state-1"
NAME = "state.safetensors"  # in the folder of a run


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is.

    Attributes:
        config: its settings, none left open.
        iteration: updates done.
        seconds: that they took.
        history: a look at the loss every few updates.
        state: what `mim4dd.distill.distill` goes on from.
    """

    config: Config
    iteration: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    state: dict[str, Tensor] | None = None

    def save(self, folder: Path) -> None:
        """Write it into a run's folder, whole or not at all; without a state, remove the one there."""
        path = folder / NAME
        if self.state is None:
            path.unlink(missing_ok=True)
            return
        facts = {
            "version": __version__,
            "config": to_json(self.config),
            "iteration": self.iteration,
            "seconds": self.seconds,
            "history": self.history,
        }
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.state.items()}
        with atomic(path) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "facts": json.dumps(facts)})

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Read what `save` wrote.

        Raises:
            InputError: there is none, or a damaged one, or one of another version.
        """
        path = folder / NAME
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            facts = json.loads(header["facts"])
            version = header["format"], facts["version"]
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} holds no {NAME}: no run was cut off there that could go on"
            ) from error
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}); remove it and start the run anew") from error
        if version != (FORMAT, __version__):
            raise InputError(
                f"{path} is of another version of mim4dd: {version[1]} ({version[0]}), this is {__version__} "
                f"({FORMAT}); remove it and start the run anew"
            )
        config = from_json(facts["config"], str(path))
        return cls(config, facts["iteration"], facts["seconds"], facts["history"], state)
