"""What lasts from one update to the next, so that a run that was cut off can go on as if it had not been.

It is named where it lives: tensors that are changed in place, random generators, and counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import InputError


class Count:
    """A number of times, from 0 on, with a state as a generator has one."""

    def __init__(self) -> None:
        self.times = 0

    def get_state(self) -> Tensor:
        """Return it as int64 [1]."""
        return torch.tensor([self.times])

    def set_state(self, state: Tensor) -> None:
        """Take what `get_state` returned."""
        (self.times,) = state.tolist()


Lasting = dict[str, Tensor | torch.Generator | Count]


def within(name: str, lasting: Mapping[str, Tensor | torch.Generator | Count]) -> Lasting:
    """Return it under names of the form "name.own name"."""
    return {f"{name}.{own}": value for own, value in lasting.items()}


def remember(lasting: Lasting) -> dict[str, Tensor]:
    """Return a copy of it, as tensors."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value.get_state()
        for name, value in lasting.items()
    }


@torch.no_grad()
def recall(lasting: Lasting, memory: Mapping[str, Tensor]) -> None:
    """Make it what it was when `remember` returned `memory`.

    Raises:
        InputError: `memory` is not of this.
    """
    now = remember(lasting)
    wrong = [name for name in now if name not in memory or now[name].shape != memory[name].shape]
    if wrong := [*wrong, *(memory.keys() - now.keys())]:
        raise InputError(f"the state is of a run of other settings, code or device: see {wrong[0]!r} in it")
    for name, value in lasting.items():
        if isinstance(value, Tensor):
            value.copy_(memory[name])
        else:
            value.set_state(memory[name])
