"""Noise ratios that are measured once and kept with the module they belong to."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn


def register_calibration(module: nn.Module, name: str) -> None:
    """Give a module a buffer for what it will measure: empty, float32 [0], until something is assigned.

    So whether it has been measured is told by its shape, without a look at the device. Loading a state dict
    restores either state.
    """
    module.register_buffer(name, torch.empty(0))
    module.register_load_state_dict_pre_hook(partial(_take_shape, name))


def _take_shape(name: str, module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    stored = state.get(prefix + name)
    if stored is not None:
        setattr(module, name, getattr(module, name).new_empty(stored.shape))
