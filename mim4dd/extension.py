"""The compiled extension: load it, say why if it cannot be had, decide who uses it."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor


def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"mim4dd.{name}")
    except ImportError as error:
        # Also what an older glibc, or a torch without the symbols it was built against, ends in.
        warnings.warn(
            f"mim4dd: the compiled augmentation {name} cannot be had ({error}); the slower PyTorch reference "
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


def _register() -> None:
    """Give the compiled op its shape function and its gradient: the same op with `adjoint` inverted."""

    @torch.library.register_fake("mim4dd::augment")
    def _(images, params, rows, mean, std, align_corners, adjoint):  # type: ignore[no-untyped-def]
        return torch.empty_like(images, dtype=None if images.is_floating_point() else torch.float32)

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, params, rows, _, std, ctx.align_corners, ctx.adjoint = inputs
        ctx.save_for_backward(rows, std, *params)

    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        rows, std, brightness, *params = ctx.saved_tensors
        if ctx.adjoint:  # the gradient of the gradient: the op without the constant that brightness adds
            brightness = brightness.mul(0)
        gradient = torch.ops.mim4dd.augment(
            gradient, [brightness, *params], rows, None, None, ctx.align_corners, not ctx.adjoint
        )
        if std is not None:
            gradient = gradient / std[:, None, None]
        return gradient, [None] * (1 + len(params)), None, None, None, None, None

    torch.library.register_autograd("mim4dd::augment", backward, setup_context=setup_context)


if available():
    _register()
