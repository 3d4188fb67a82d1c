"""The state of a run: what one update passes on to the next, for an interrupted run to be resumed exactly.

It consists of tensors that are changed in place, counts among them, and of random generators, by name.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import InputError

State = dict[str, Tensor | torch.Generator]


def counter() -> Tensor:
    """Return a number, 0, to be counted up in place: int64 [1], on the host."""
    return torch.zeros(1, dtype=torch.int64, device="cpu")


def prefixed(name: str, state: Mapping[str, Tensor | torch.Generator]) -> State:
    """Return it under names of the form "name.own name"."""
    return {f"{name}.{own}": value for own, value in state.items()}


def snapshot(state: State) -> dict[str, Tensor]:
    """Return a copy of it, as tensors."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value.get_state()
        for name, value in state.items()
    }


@torch.no_grad()
def restore(state: State, saved: Mapping[str, Tensor]) -> None:
    """Restore what `snapshot` saved.

    Raises:
        InputError: `saved` is the snapshot of another state.
    """
    now = snapshot(state)
    wrong = [name for name in now if name not in saved or now[name].shape != saved[name].shape]
    if wrong := [*wrong, *(saved.keys() - now.keys())]:
        raise InputError(
            f"the saved state does not match this run's settings, code or device (entry {wrong[0]!r})"
        )
    for name, value in state.items():
        if isinstance(value, Tensor):
            value.copy_(saved[name])
        else:
            value.set_state(saved[name])
