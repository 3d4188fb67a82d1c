"""Whether the Triton kernels run here."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None


def kernel_obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why the kernels cannot run on tensors of this dtype and device, or None if they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels have no {dtype}"
    if device.type == "cuda":
        return _gpu_obstacle(dtype, device)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the kernels need a CUDA device, or TRITON_INTERPRET=1 on a CPU, and the tensors are on {device}"


def _gpu_obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs"
    if torch.compiler.is_compiling():
        return None  # the question would become part of the graph
    needed = (8, 0) if dtype == torch.bfloat16 else (7, 0)
    found = torch.cuda.get_device_capability(device)
    if found < needed:
        wanted, has = (".".join(map(str, capability)) for capability in (needed, found))
        return f"of {dtype} they need compute capability {wanted}, and {device} has {has}"
    return None
