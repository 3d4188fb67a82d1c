"""Differentiable siamese augmentation (DSA, ICML 2021): sample parameters, apply them to a batch of images.

Sampling and applying are separate so that one set of parameters can serve real and synthetic images alike:
draw a row per class, then `params[labels]` gives every image the row of its class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, extension
from . import checks, op, reference
from .params import AugmentParams
from .sampling import pad_and_crop, sample, sample_each
from .strategy import DSA, parts_of

__all__ = [
    "DSA",
    "AugmentParams",
    "apply",
    "pad_and_crop",
    "parts_of",
    "sample",
    "sample_each",
]


def apply(
    images: Tensor,
    params: AugmentParams,
    *,
    rows: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    align_corners: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Augment images: colour, then one resampling (shift, flip, scale, rotate composed), then cutout.

    Colour is brightness, saturation, contrast in this order; resampling is bilinear with zeros outside, and
    exact where only shifts and flips are asked for. Differentiable in the images alone, any number of times.

    Args:
        images: [B, C, H, W], any strides; float16, bfloat16, float32 or float64, or uint8, which is taken as
            a fraction of 255. At most 16384 channels and pixels a side. Sums are in float32 at least.
        params: B rows, or any number of them where `rows` says which image takes which.
        rows: integers [B], the row of each image; labels, where there is a row per class.
        mean: floats [C], subtracted from the images first, of pixels in [0, 1]. Given with `std`; both are
            taken in float32.
        std: floats [C], what the images are then divided by.
        align_corners: the meaning of a normalised coordinate (the DSA paper ran with True); the two differ
            only where a non-square image is rotated.
        backend: "reference", "fused" (compiled), or None for the best that is built.

    Returns:
        A new tensor [B, C, H, W] of the images' dtype (float32 for uint8) and, fused, of their memory format.
        To avoid a device synchronisation, the op on CUDA fills an image with NaN if its parameters are not
        finite or its row is out of range; on the CPU that is an error.

    Raises:
        ValueError: wrong type, rank, size, dtype, device or number of rows; params, mean or std that require
            a gradient; parameters that are not finite or rows out of range (CPU); an unknown backend.
        RuntimeError: `backend="fused"` where the extension is not built.
    """
    params, rows, mean, std = checks.prepare(images, params, rows, mean, std)
    fused = backends.resolve("augment.apply", backend, extension.obstacle(images.device)) == "fused"
    if not fused or torch.compiler.is_compiling():
        checks.check(images, params, rows, mean, std)
    if not fused:
        if backend is None:
            extension.warn_once()
        return reference.augment(images, params, rows, mean, std, align_corners)
    try:
        return op.augment(images, list(params.stored().values()), rows, mean, std, align_corners)
    except ValueError:  # the op checks for itself, and faster, but says less
        checks.check(images, params, rows, mean, std)
        raise
