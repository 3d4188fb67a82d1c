"""What the networks compute in: float32, TF32 or bfloat16. Weights, losses and distances stay float32."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import extension
from ..errors import InputError, unknown

Precision = Literal["auto", "fp32", "tf32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
COMPUTED = PRECISIONS[1:]  # what "auto" may stand for


def resolve(precision: Precision, device: torch.device) -> Precision:
    """Return "fp32", "tf32" or "bf16"; "auto" is the fastest for a ConvNet, as measured.

    On CPUs with AVX512-BF16 torch's convolutions are twice as fast in bfloat16 as in float32; on those
    without, where bfloat16 is emulated, twenty times slower. The ConvNet's compiled convolutions, in float32
    only, are faster still (`mim4dd.networks.convolution`), but not with AMX.

    Raises:
        InputError: the device cannot compute in it.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision == "auto":
        beaten = device.type == "cpu" and extension.available() and not _has_amx()
        return "bf16" if _has_bf16(device) and not beaten else "fp32"
    if precision == "tf32" and (device.type != "cuda" or not _is_ampere(device)):
        raise InputError(
            f"--precision tf32 needs an Ampere GPU or newer, not {device.type}; use auto or fp32"
        )
    if precision == "bf16" and not _has_bf16(device):
        raise InputError(
            f"--precision bf16 would be emulated on this {device.type}, many times slower; use auto or fp32"
        )
    return precision


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return _is_ampere(device)
    return _has_amx() or _cpu_has("avx512_bf16")


def _has_amx() -> bool:
    return _cpu_has("amx_bf16")


def _cpu_has(feature: str) -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # as in torch 2.10
        return False
    return bool(torch.cpu.get_capabilities().get(feature))


def _is_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a network runs; for "fp32" the caller's own autocast stays in force."""
    if precision == "bf16":
        # Every weight is used once in a pass: a cache of the casts would only take memory.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


def computed_in(x: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution of x computes: its own, or autocast's."""
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    cast = casts and x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else x.dtype


def configure(precision: str) -> None:
    """Set how the convolutions of the whole process compute.

    They round to TF32, torch's default, for "tf32" only. They are always deterministic, which costs no time.
    """
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.deterministic = True
