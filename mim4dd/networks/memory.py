"""What a pass through a network holds, and how many images may go through it at once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import Network

GIB = 2**30
SHARE = 0.5  # of a GPU's free memory, where no budget is given


def per_image(network: Network, image: tuple[int, ...], *, gradients: bool, transformed: bool = False) -> int:
    """Return the bytes that an image [C, H, W] takes on its way through, worked out from shapes alone.

    Without gradients that is the largest input and output of an operator together, with them what all
    operators give. Weights, the workspace of a library and fragmentation come on top.

    Args:
        network: with its precision, on the device it is to run on.
        image: shape of the image.
        gradients: whether maps are kept for gradients by the weights.
        transformed: whether these are made by `torch.func`, which keeps the maps of the way back as well.
    """
    shapes = copy.deepcopy(network).to("meta")
    shapes.precision = "fp32"
    with _Operators() as operators, torch.no_grad():
        shapes.features(torch.empty(1, *image, device="meta"))
    on_cpu = next(network.parameters()).device.type == "cpu"
    numbers = sum(operators.outputs) if gradients else max(operators.both)
    if not on_cpu and not gradients:
        numbers = numbers * 3 // 2  # the operators around a normalisation are not fused there
    # On a GPU autocast normalises in float32, whatever the precision.
    return numbers * (2 if on_cpu and network.precision == "bf16" else 4) * (2 if transformed else 1)


class _Operators(TorchDispatchMode):
    """Notes the numbers in the maps [1, ...] that every operator gives, and reads and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[int] = []
        self.both: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        out = result[0] if isinstance(result, tuple) else result
        if isinstance(out, Tensor) and out.ndim and len(out) == 1:
            self.outputs.append(out.numel())
            self.both.append(out.numel() + (args[0].numel() if args and isinstance(args[0], Tensor) else 0))
        return result


def budget(gib: float | None, device: torch.device) -> int | None:
    """Return the bytes that a pass may take: on a GPU what is asked for, or a share of what is free.

    None on a CPU, where chunks are of the size of its cache, which is far below any budget.
    """
    if device.type == "cpu":
        return None
    return int(gib * GIB) if gib else int(SHARE * torch.cuda.mem_get_info(device)[0])
