"""Which of two implementations a call takes: the fused one or the PyTorch reference."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None
HAS_KERNELS = find_spec(f"{__package__}.kernels") is not None  # not where Python runs in the sources


def resolve(function: str, backend: str | None, obstacle: str | None) -> str:
    """Return "reference" or "fused"; None asks for the fused one, unless there is an obstacle to it.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: "fused" where it cannot run.
    """
    if backend not in (None, "reference", "fused"):
        raise ValueError(f"mim4dd.{function}: backend is {backend!r}, expected 'reference', 'fused' or None")
    if backend == "fused" and obstacle:
        raise RuntimeError(f"mim4dd.{function}: backend='fused' cannot run, {obstacle}; use None")
    return backend or ("reference" if obstacle else "fused")


def kernel_obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why the Triton kernels cannot run on tensors of this dtype and device, or None if they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if not HAS_KERNELS:
        return "mim4dd was imported from its source folder, not as installed; run outside that folder"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels do not support {dtype}"
    if device.type == "cuda":
        return _gpu_obstacle(dtype, device)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the kernels need a CUDA device, or TRITON_INTERPRET=1 on a CPU, but the tensors are on {device}"


def _gpu_obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs"
    if torch.compiler.is_compiling():
        return None  # the question would become part of the graph
    needed = (8, 0) if dtype == torch.bfloat16 else (7, 0)
    found = torch.cuda.get_device_capability(device)
    if found < needed:
        wanted, has = (".".join(map(str, capability)) for capability in (needed, found))
        return f"for {dtype} they need compute capability {wanted}, but {device} has {has}"
    return None
