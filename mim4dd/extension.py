"""The compiled extension: load it, say why if it cannot be had, decide who uses it."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor

try:
    _C: ModuleType | None = importlib.import_module("mim4dd._C")
except ImportError as error:
    _C = None
    warnings.warn(
        f"mim4dd: the compiled augmentation cannot be had ({error}); the slower PyTorch reference runs "
        "instead. Build it with: pip install --no-build-isolation -e .",
        stacklevel=2,
    )


def available() -> bool:
    """Tell whether the extension is built and loaded."""
    return _C is not None


def resolve(function: str, backend: str | None, device: torch.device) -> str:
    """Return "reference" or "fused" for a call on `device`; None asks for the best that runs there.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: "fused" where it cannot run.
    """
    if backend not in (None, "reference", "fused"):
        raise ValueError(f"mim4dd.{function}: backend is {backend!r}, expected 'reference', 'fused' or None")
    runs = available() and device.type == "cpu"
    if backend == "fused" and not runs:
        why = f"not compiled for {device.type}" if available() else "not built; see the warning at import"
        raise RuntimeError(f"mim4dd.{function}: backend='fused' cannot run, the extension is {why}")
    return backend or ("fused" if runs else "reference")


def _register() -> None:
    """Give the compiled ops their shape function and gradient."""

    @torch.library.register_fake("mim4dd::colour")
    def _(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
        return torch.empty_like(images)

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[1:])

    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        brightness, saturation, contrast = ctx.saved_tensors
        # Averaging over channels and over the image are symmetric and commute: without the constant that
        # brightness adds, the op is its own adjoint.
        return torch.ops.mim4dd.colour(gradient, brightness.mul(0), saturation, contrast), None, None, None

    torch.library.register_autograd("mim4dd::colour", backward, setup_context=setup_context)


if available():
    _register()
