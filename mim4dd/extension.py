"""The compiled extension: load it, say why if it cannot be had, decide who uses it."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch


def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"mim4dd.{name}")
    except (ImportError, OSError, RuntimeError) as error:
        # An older glibc, or a torch without the symbols it was built against, ends in an ImportError; a torch
        # that refuses to register the operators may end in one of the others.
        warnings.warn(
            f"mim4dd: the compiled extension {name} cannot be loaded ({error}); the slower PyTorch reference "
            "runs instead. Build it with: pip install --no-build-isolation -e .",
            stacklevel=3,
        )
        return None


_C = _load("_C")
_C_cuda = _load("_C_cuda") if _C is not None and torch.version.cuda else None


def available(device: str = "cpu") -> bool:
    """Tell whether the extension is built and loaded for "cpu" or "cuda"."""
    return {"cpu": _C, "cuda": _C_cuda}.get(device) is not None


def resolve(function: str, backend: str | None, device: torch.device) -> str:
    """Return "reference" or "fused" for a call on `device`; None asks for the best that runs there.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: "fused" where it cannot run.
    """
    if backend not in (None, "reference", "fused"):
        raise ValueError(f"mim4dd.{function}: backend is {backend!r}, expected 'reference', 'fused' or None")
    runs = available(device.type)
    if backend == "fused" and not runs:
        why = f"not compiled for {device.type}" if available() else "not built; see the warning at import"
        raise RuntimeError(f"mim4dd.{function}: backend='fused' cannot run, the extension is {why}")
    return backend or ("fused" if runs else "reference")
