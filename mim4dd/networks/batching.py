"""How the compiled layers run under `torch.vmap`: as one call, on more images or on more channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Where the images and the channels of a tensor are counted, None where they are not.
KINDS: dict[str, tuple[int | None, int]] = {
    "map": (0, 1),  # [B, C, H, W]
    "value": (0, 1),  # [B, C]
    "channel": (None, 0),  # [C]
    "taps": (None, 1),  # [9 I, C]
    "taps of images": (0, 2),  # [B, 9 I, C]
}


def register_vmap(op: str, arguments: Sequence[str], results: Sequence[str], *, grouped: bool = True) -> None:
    """Teach `torch.vmap` an operator whose images and channels do not mix.

    What is batched joins the images; but where each of the batch has weights of its own, it joins the
    channels: so does the convolution that comes before or after, and no map is copied in between.

    Args:
        op: name of an operator of this package.
        arguments: kinds of its first arguments, of `KINDS`; the others are not tensors.
        results: kinds of what it returns.
        grouped: whether on a CPU too it takes several groups of channels, each with its own images.
    """
    call = getattr(torch.ops.mim4dd, op)

    def rule(info: Any, in_dims: Sequence[int | None], *given: Any) -> tuple[Any, Any]:
        size, tensors, options = info.batch_size, given[: len(arguments)], given[len(arguments) :]
        own_weights = any(
            dim is not None and KINDS[kind][0] is None for kind, dim in zip(arguments, in_dims, strict=False)
        )
        if own_weights and not grouped and tensors[0].device.type == "cpu":
            each = [
                call(
                    *(t if d is None else t.select(d, k) for t, d in zip(tensors, in_dims, strict=False)),
                    *options,
                )
                for k in range(size)
            ]
            return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0,) * len(results)
        axes = [KINDS[kind][own_weights] for kind in arguments]
        axes_of_results = [KINDS[kind][own_weights] for kind in results]
        folded = [
            _fold(tensor, dim, axis, size) for tensor, dim, axis in zip(tensors, in_dims, axes, strict=False)
        ]
        unfolded = [
            _unfold(tensor, axis, size)
            for tensor, axis in zip(call(*folded, *options), axes_of_results, strict=True)
        ]
        return tuple(t for t, _ in unfolded), tuple(d for _, d in unfolded)

    torch.library.register_vmap(f"mim4dd::{op}", rule)


def _fold(tensor: Tensor, dim: int | None, axis: int | None, size: int) -> Tensor:
    """Merge the batch into an axis."""
    if axis is None:
        return tensor
    if dim is None:
        tensor = tensor.unsqueeze(axis).expand(*tensor.shape[:axis], size, *tensor.shape[axis:])
    else:
        tensor = tensor.movedim(dim, axis)
    return tensor.flatten(axis, axis + 1)


def _slices(tensor: Tensor, dim: int | None, size: int) -> Sequence[Tensor]:
    return [tensor] * size if dim is None else tensor.unbind(dim)


def _unfold(tensor: Tensor, axis: int | None, size: int) -> tuple[Tensor, int | None]:
    """Take the batch out of an axis again; what was not wanted is empty."""
    if axis is None or tensor.ndim == 1:
        return tensor, None
    return tensor.unflatten(axis, (size, tensor.shape[axis] // size)), axis
