"""How the compiled layers run under `torch.vmap`: as one call, on more images or on more channels.

The batch of vmap joins the images. But where each of its elements has weights of its own, it joins the
channels, as it does in the convolutions before and after, so that no map is copied between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# The dimensions of a tensor's images and of its channels; None where it has none.
KINDS: dict[str, tuple[int | None, int]] = {
    "map": (0, 1),  # [B, C, H, W]
    "value": (0, 1),  # [B, C]
    "channel": (None, 0),  # [C]
    "taps": (None, 1),  # [9 I, C]
    "taps of images": (0, 2),  # [B, 9 I, C]
}

Dims = Sequence[int | None]


def register(op: str, arguments: Sequence[str], results: Sequence[str], *, grouped: bool = True) -> None:
    """Teach `torch.vmap` an operator of this package that mixes neither images nor channels.

    Args:
        op: its name.
        arguments: kinds, from `KINDS`, of its first arguments; the others are not tensors.
        results: kinds of its results.
        grouped: whether it takes several groups of channels, each with its own images, on a CPU too.
    """
    call = getattr(torch.ops.mim4dd, op)
    torch.library.register_vmap(f"mim4dd::{op}", rule(call, arguments, results, grouped=grouped))


def rule(
    call: Callable[..., Sequence[Tensor]], arguments: Sequence[str], results: Sequence[str], *, grouped: bool
) -> Callable[..., Any]:
    """Return the rule that `register` registers."""

    def batched(info: Any, in_dims: Dims, *given: Any) -> tuple[Any, Any]:
        size, tensors, options = info.batch_size, given[: len(arguments)], given[len(arguments) :]
        dims = in_dims[: len(arguments)]
        own_weights = any(
            dim is not None and KINDS[kind][0] is None for kind, dim in zip(arguments, dims, strict=True)
        )
        if own_weights and not grouped and not takes_groups(tensors[0].device):
            each = zip(*(slices(t, dim, size) for t, dim in zip(tensors, dims, strict=True)), strict=True)
            of_each = zip(*(call(*own, *options) for own in each), strict=True)
            return tuple(torch.stack(parts) for parts in of_each), (0,) * len(results)
        axes = [KINDS[kind][own_weights] for kind in arguments]
        folded = [fold(t, dim, axis, size) for t, dim, axis in zip(tensors, dims, axes, strict=True)]
        axes = [KINDS[kind][own_weights] for kind in results]
        unfolded = [unfold(out, axis, size) for out, axis in zip(call(*folded, *options), axes, strict=True)]
        return tuple(out for out, _ in unfolded), tuple(dim for _, dim in unfolded)

    return batched


def takes_groups(device: torch.device) -> bool:
    """Return whether the compiled convolutions of a device take groups; those of a CPU do not."""
    return device.type != "cpu"


def fold(tensor: Tensor, dim: int | None, axis: int | None, size: int) -> Tensor:
    """Merge the batch at `dim`, or `size` copies where `dim` is None, into an axis.

    An argument that was left out is an empty vector, and is returned as it is.
    """
    if axis is None or (not tensor.numel() and tensor.ndim - (dim is not None) == 1):
        return tensor
    if dim is None:
        tensor = tensor.unsqueeze(axis).expand(*tensor.shape[:axis], size, *tensor.shape[axis:])
    else:
        tensor = tensor.movedim(dim, axis)
    if tensor.ndim == 5 and axis == 1:  # channels of maps: if it takes a copy to join them, they come last
        return tensor.permute(0, 3, 4, 1, 2).flatten(3).movedim(3, 1)
    return tensor.flatten(axis, axis + 1)


def unfold(tensor: Tensor, axis: int | None, size: int) -> tuple[Tensor, int | None]:
    """Split the batch off an axis again; return its dimension as well, None for an unwanted, empty result."""
    if axis is None or tensor.ndim == 1:
        return tensor, None
    return tensor.unflatten(axis, (size, tensor.shape[axis] // size)), axis


def slices(tensor: Tensor, dim: int | None, size: int) -> Sequence[Tensor]:
    """Return the elements of the batch at `dim`, or `size` times the same tensor where `dim` is None."""
    return [tensor] * size if dim is None else tensor.unbind(dim)
