"""What a pass through a network holds, and how many images may go through it at once."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import extension
from .blocks import OnePassBlock
from .first_block import fits
from .network import Network
from .on_gpu import runs as kernels_run

GIB = 2**30
SHARE = 0.5  # of a GPU's free memory, where no budget is given
# Images per forward pass without gradients: on CPU what keeps a map in the cache (twice as fast as 640).
CHUNK = {"cpu": 32, "cuda": 1024}


def per_image(network: Network, image: tuple[int, ...], *, gradients: bool, transformed: bool = False) -> int:
    """Return the bytes that an image [C, H, W] takes on its way through, computed from shapes alone.

    Without gradients that is the largest input and output of one operator together, with gradients the
    outputs of all operators. Weights, the workspace of a library (cuDNN's, in float32, is larger than the
    maps) and fragmentation come on top.

    Args:
        network: with its precision, on the device it is to run on.
        image: shape of the image.
        gradients: whether maps are saved for the gradients of the weights.
        transformed: whether `torch.func` computes these, which saves the maps of the backward pass as well.
    """
    on_cpu, dtype, fused = _way(network)
    shapes = copy.deepcopy(network).to("meta")
    shapes.precision = "fp32"
    x = torch.empty(1, *image, device="meta")
    steps = _blocks(shapes, x) if fused else _operators(shapes, x)
    numbers = sum(out for _, out in steps) if gradients else max(given + out for given, out in steps)
    if (transformed or not gradients) and not fused and not on_cpu:
        numbers = numbers * 3 // 2  # the operators around a normalisation are not fused there
    # On a GPU autocast normalises in float32, whatever the precision, except in blocks that run as kernels.
    half = dtype == torch.bfloat16 and (fused or on_cpu)
    return numbers * (2 if half else 4) * (2 if transformed else 1)


def per_first_derivative(network: Network, image: tuple[int, ...], *, twice: bool) -> int:
    """Return the bytes that an image [C, H, W] takes where a GPU differentiates a fused first block by it.

    There the block's convolution and its patches are computed again, with their gradients, and `twice` for a
    derivative of that (`on_gpu`); 0 where the block is no single operator there.
    """
    on_cpu, dtype, fused = _way(network)
    if on_cpu or not fused:
        return 0
    x = torch.empty(1, *image, device="meta")
    block = copy.deepcopy(network.blocks[0]).to("meta")
    assert isinstance(block, OnePassBlock)
    convolution, padding, _ = block.parts
    if not fits(x, convolution.weight, padding):
        return 0
    out_channels, in_channels, *taps = convolution.weight.shape
    pixels = math.prod(side + 2 * each - 2 for side, each in zip(image[1:], padding, strict=True))
    convolved, patches = out_channels * pixels, in_channels * math.prod(taps) * pixels
    numbers = (4 if twice else 2) * (convolved + patches) + x.numel() + block(x).numel()
    return numbers * dtype.itemsize


def _way(network: Network) -> tuple[bool, torch.dtype, bool]:
    """Whether it runs on a CPU, what its maps are made of, and whether its blocks are fused there."""
    device = next(network.parameters()).device
    on_cpu = device.type == "cpu"
    dtype = torch.bfloat16 if network.precision == "bf16" else torch.float32
    compiled = extension.available() if on_cpu else kernels_run(dtype, device)
    return on_cpu, dtype, compiled and all(isinstance(b, OnePassBlock) for b in network.blocks)


Steps = list[tuple[int, int]]  # for one image, how many numbers each step reads and writes


@torch.no_grad()
def _operators(network: Network, x: Tensor) -> Steps:
    """Operator by operator."""
    with _Operators() as operators:
        network.features(x)
    return operators.steps


@torch.no_grad()
def _blocks(network: Network, x: Tensor) -> Steps:
    """Convolution and normalisation of every block, or the whole first block where it is one operator."""
    steps: Steps = []
    for block in network.blocks:
        assert isinstance(block, OnePassBlock)
        out, (convolution, padding, _) = block(x), block.parts
        convolved = out.shape[1] * (x.shape[2] + 2 * padding[0] - 2) * (x.shape[3] + 2 * padding[1] - 2)
        if fits(x, convolution.weight, padding):
            steps.append((x.numel(), out.numel()))
        else:
            steps += [(x.numel(), convolved), (convolved, out.numel())]
        x = out
    return steps


class _Operators(TorchDispatchMode):
    """Records how many numbers there are in the maps [1, ...] that every operator reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: Steps = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        out = result[0] if isinstance(result, tuple) else result
        if isinstance(out, Tensor) and out.ndim and len(out) == 1:
            given = args[0].numel() if args and isinstance(args[0], Tensor) else 0
            self.steps.append((given, out.numel()))
        return result


def budget(gib: float | None, device: torch.device) -> int | None:
    """Return the bytes that a pass may take: on a GPU `gib`, or else a share of what is free.

    None on a CPU, where the cache decides the size of a chunk, far below any budget.
    """
    if device.type == "cpu":
        return None
    if gib:
        return int(gib * GIB)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for reuse
    return int(SHARE * (torch.cuda.mem_get_info(device)[0] + kept))


def chunk_size(network: Network, images: Tensor) -> int:
    """Return how many images [N, C, H, W] to take through a network at once without gradients.

    That is `CHUNK`, or on a GPU fewer where so many would take more than `SHARE` of its free memory.
    """
    most, free = CHUNK[images.device.type], budget(None, images.device)
    if free is None:
        return most
    return max(1, min(most, free // per_image(network, tuple(images.shape[1:]), gradients=False)))
