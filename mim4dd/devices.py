"""Where a run computes."""

from __future__ import annotations

import torch

from .errors import InputError
from .networks import CHUNK


def pick_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is a GPU where there is one.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type not in CHUNK:
            raise RuntimeError("neither a CPU nor a CUDA device")
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} is not available here; use cpu or auto") from error
    return device


def device_name(device: torch.device) -> str:
    """Return a readable name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
