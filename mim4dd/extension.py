"""The compiled extension: load it, and say why if it cannot be loaded."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch

_untold: list[str] = []


def warn_once() -> None:
    """Warn, once, about what is not built. Users of the losses alone, which do without, are not warned."""
    while _untold and not torch.compiler.is_compiling():
        warnings.warn(_untold.pop(), stacklevel=3)


def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"mim4dd.{name}")
    except (ImportError, OSError, RuntimeError) as error:
        # An older glibc, or a torch without the symbols it was built against, ends in an ImportError; a torch
        # that refuses to register the operators may end in one of the others.
        what = "augmentation and networks" if name == "_C" else "augmentation on a GPU"
        _untold.append(
            f"mim4dd: the compiled extension {name} cannot be loaded ({error}); for {what}, the slower "
            "PyTorch reference runs instead. Build it with: pip install --no-build-isolation -e ."
        )
        if not isinstance(error, ModuleNotFoundError):  # it is built, to no use
            warn_once()
        return None


_C = _load("_C")
# By the count, which does not start CUDA in this process: a fork could not use it any more.
_C_cuda = _load("_C_cuda") if _C is not None and torch.version.cuda and torch.cuda.device_count() else None


def available(device: str = "cpu") -> bool:
    """Tell whether the extension is built and loaded for "cpu" or "cuda"."""
    return {"cpu": _C, "cuda": _C_cuda}.get(device) is not None


def obstacle(device: torch.device) -> str | None:
    """Return why the extension's operators cannot run on this device, or None if they can."""
    if available(device.type):
        return None
    why = f"not compiled for {device.type}" if available() else "not built; see the warning"
    return f"the extension is {why}"
