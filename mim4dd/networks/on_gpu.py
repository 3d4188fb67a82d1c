"""The compiled layers on a GPU: the Triton kernels, registered under the operators' names.

Float32 matrix products follow `torch.set_float32_matmul_precision`; the kernels, and the library's
convolutions, follow cuDNN's switch.

The first block has kernels of its own for its output and for the gradients of its weights, which real images
and the training of networks need. The gradients of the images and all second derivatives are needed for
synthetic images only, which are few: they are put together from matrix products and the normalisation's
kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import extension
from ..backends import kernel_obstacle
from . import by_torch

SMALL_MAP = 64  # pixels


def runs(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the kernels run on maps of this dtype there."""
    return extension.available() and device.type == "cuda" and kernel_obstacle(dtype, device) is None


def _kernel(module: str, name: str) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function of `mim4dd.kernels`, imported when it is called, as that imports Triton."""
    return lambda *arguments: getattr(import_module(f"mim4dd.kernels.{module}"), name)(*arguments)


def _convolve_grad_weight(grad_y: Tensor, x: Tensor, groups: int = 1) -> Tensor:
    # Of small maps the library takes one group after the other.
    small = groups > 1 and x.shape[2] * x.shape[3] <= SMALL_MAP
    if small and kernel_obstacle(x.dtype, x.device) is None:
        from ..kernels.grad_weight import grad_weight

        return grad_weight(grad_y, x, groups)
    return by_torch.grad_weight(grad_y, x, groups)


def _windows(x: Tensor, padding: int) -> Tensor:
    """Return what each pixel of the convolution's output sees: a view [B, C, h, w, 3, 3] of the padded x."""
    return F.pad(x, [padding] * 4).unfold(2, 3, 1).unfold(3, 3, 1)


class _FirstConvolution:
    """The first block's convolution, by products with the patches of images x [B, G * I, H, W] in G groups.

    Its output y is [B, O, h, w] with channels last, its weight is the taps [9 * I, O]. Products are of rows
    of h * w or O / G numbers: for 9 * I, no multiple of 8, the library has slow kernels in bfloat16.
    """

    def __init__(self, x: Tensor, taps: Tensor, padding: int) -> None:
        self.padding, self.size, self.dtype = padding, x.shape[2:], x.dtype
        self.map_size = tuple(side + 2 * padding - 2 for side in self.size)
        self.groups = 9 * x.shape[1] // len(taps)

    def patches(self, x: Tensor) -> Tensor:
        """Return [B, G, 9 * I, h * w], without `F.unfold`, which launches a kernel for every image."""
        windows = _windows(x, self.padding)
        return windows.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3).unflatten(1, (self.groups, -1))

    def weight(self, taps: Tensor) -> Tensor:
        """Return the taps as [G, 9 * I, O / G], what the products are with."""
        taps = taps.to(self.dtype, memory_format=torch.contiguous_format)
        return taps.unflatten(1, (self.groups, -1)).transpose(0, 1)

    def __call__(self, patches: Tensor, weight: Tensor) -> Tensor:
        rows = patches.mT @ weight
        return rows.transpose(1, 2).flatten(2).unflatten(1, self.map_size).movedim(3, 1)

    def grad_patches(self, grad_y: Tensor, weight: Tensor) -> Tensor:
        return weight @ self._rows(grad_y).mT

    def grad_x(self, grad_patches: Tensor) -> Tensor:
        return F.fold(grad_patches.flatten(1, 2), self.size, 3, padding=self.padding)

    def grad_taps(self, grad_y: Tensor, patches: Tensor) -> Tensor:
        """Return float32 [B, 9 * I, O], image by image."""
        products = patches @ self._rows(grad_y)
        return products.transpose(1, 2).flatten(2).float()

    def _rows(self, y: Tensor) -> Tensor:
        """Return a map as [B, G, h * w, O / G]."""
        return y.movedim(1, 3).flatten(1, 2).unflatten(2, (self.groups, -1)).transpose(1, 2)


class _Block(NamedTuple):
    """What the first block was given, and the moments it returned: what its derivatives are made of."""

    x: Tensor
    taps: Tensor
    scale: Tensor
    bias: Tensor
    mean: Tensor
    rstd: Tensor
    padding: int
    relu: bool
    pool: int

    @property
    def convolution(self) -> _FirstConvolution:
        return _FirstConvolution(self.x, self.taps, self.padding)

    @property
    def norm(self) -> tuple[Any, ...]:
        """What the normalisation's derivatives take beside the maps."""
        return self.scale, self.bias, self.mean, self.rstd, self.relu, self.pool


def _first_block_backward(grad_y: Tensor, *given: Any) -> tuple[Tensor, ...]:
    from ..kernels import first_block, normalisation

    block, (want_x, want_taps) = _Block(*given[:-2]), given[-2:]
    grad_x = grad_taps = block.x.new_empty(0)
    if want_x:
        convolution = block.convolution
        weight = convolution.weight(block.taps)
        convolved = convolution(convolution.patches(block.x), weight)
        grad_convolved, *grad_channels = normalisation.backward(grad_y, convolved, *block.norm)
        grad_x = convolution.grad_x(convolution.grad_patches(grad_convolved, weight))
    if want_taps or not want_x:
        grad_taps, *grad_channels = first_block.backward(grad_y, *block)
    return grad_x, grad_taps if want_taps else block.taps.new_empty(0), *grad_channels


def _first_block_backward_twice(
    grad_grad_x: Tensor,
    grad_grad_taps: Tensor,
    grad_grad_scale: Tensor,
    grad_grad_bias: Tensor,
    grad_y: Tensor,
    *given: Any,
) -> tuple[Tensor, ...]:
    from ..kernels import normalisation

    block = _Block(*given)
    convolution = block.convolution
    patches = convolution.patches(block.x)
    weight, grad_grad_weight = convolution.weight(block.taps), convolution.weight(grad_grad_taps)
    convolved = convolution(patches, weight)
    grad_convolved, *_ = normalisation.backward(grad_y, convolved, *block.norm)
    grad_grad_convolved = convolution(patches, grad_grad_weight)
    if grad_grad_x.numel():
        grad_grad_patches = convolution.patches(grad_grad_x)
        grad_grad_convolved += convolution(grad_grad_patches, weight)
    grad_grad_channels = torch.stack(
        [each.expand_as(block.mean) for each in (grad_grad_scale, grad_grad_bias)]
    )
    grad_grad_y, second_grad_convolved, grad_scale = normalisation.backward_twice(
        grad_grad_convolved, *grad_grad_channels, grad_y, convolved, *block.norm
    )
    grad_patches = convolution.grad_patches(second_grad_convolved, weight)
    grad_patches += convolution.grad_patches(grad_convolved, grad_grad_weight)
    grad_taps = convolution.grad_taps(second_grad_convolved, patches)
    if grad_grad_x.numel():
        grad_taps += convolution.grad_taps(grad_convolved, grad_grad_patches)
    return grad_grad_y, convolution.grad_x(grad_patches), grad_taps, grad_scale


_library = torch.library.Library("mim4dd", "IMPL")


def _register() -> None:
    """Register the kernels of the operators that the compiled extension has defined."""
    for name, call in {
        "convolve": by_torch.convolve,
        "convolve_grad_weight": _convolve_grad_weight,
        "instance_norm": _kernel("normalisation", "forward"),
        "instance_norm_backward": _kernel("normalisation", "backward"),
        "instance_norm_backward_twice": _kernel("normalisation", "backward_twice"),
        "first_block": _kernel("first_block", "forward"),
        "first_block_backward": _first_block_backward,
        "first_block_backward_twice": _first_block_backward_twice,
    }.items():
        _library.impl(name, call, "CUDA")


if extension.available():
    _register()
