"""Few pairs, many features: the sizes of distillation, where launches are the cost.

The logits are smaller than the keys, so they may be scratch. Three launches, four for InfoNCE, whatever the
number of layers, and both gradients with them:

    dots    products and squares of rows, the features split over programs; label counts
    sums    (InfoNCE) log-sum-exps of rows and columns
    pairs   norms, loss, derivative by each logit
    finish  the gradients for features, as products with an epilogue; sums over tiles

With c the cosine, g = dL/dx and q_i = sum_j g_ij c_ij, the gradient through the normalisation is
dA = (1/|a|t) (G K/|k|) - (q/t|a|^2) A: no sum over features beside the product.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
from torch import Tensor

from mim4dd.losses.form import LossForm, saved_dtype

from . import launch
from .finish_kernels import finish_kernel
from .launch import Tile, choose, dot_precision, precision_of
from .pairs import LOG_SUMS
from .skinny_kernels import dots_kernel, pairs_kernel, sums_kernel

# What a program of `pairs_kernel` and `sums_kernel` looks at; both only read scratch once.
PAIRS_TILE = (16, 64)
SUMS_TILE = (16, 64)


def contrast(
    form: LossForm,
    scales: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    anchors: Sequence[Tensor],
    keys: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Losses [L] and gradients for scales [2, L], anchors and keys ([rows, 0] for a side not wanted).

    Features are contiguous, aligned, of widths that are multiples of 16; other arguments as in
    `kernels.contrast`.
    """
    num_sums, layers = LOG_SUMS[form.name], len(anchors)
    m, n, device, dtype = len(anchors[0]), len(keys[0]), anchors[0].device, anchors[0].dtype
    widths = tuple(a.shape[1] for a in anchors)
    precision = precision_of(dtype)
    _, multiprocessors = launch.device_limits(device)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def tiles(tile: Tile) -> int:
        return triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)

    # Every program sums the same number of features, so that layers of different widths are balanced; two
    # programs a multiprocessor hide the latency of each other's loads.
    tile = choose("DOTS", anchors[0], lambda t: tiles(t) * max(1, sum(widths) // 512))
    slots_wanted = max(1, 2 * multiprocessors // tiles(tile))
    split = triton.cdiv(triton.cdiv(sum(widths), slots_wanted), tile.d) * tile.d
    num_slots = tuple(triton.cdiv(width, split) for width in widths)
    first_slot = tuple(accumulate((0, *num_slots[:-1])))
    slots = sum(num_slots)
    products, a_squares, k_squares = empty(slots, m, n), empty(slots, m), empty(slots, n)
    a_counts, k_counts = empty(m, dtype=torch.int32), empty(n, dtype=torch.int32)
    dots_kernel[(tiles(tile), slots + 1)](
        tuple(anchors), tuple(keys), widths, first_slot, anchor_labels, key_labels,
        products, a_squares, k_squares, a_counts, k_counts, m, n, split, slots,
        L=layers, EXCLUDE_SELF=form.exclude_self, PRECISION=dot_precision(precision),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_D=tile.d, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip

    a_lse2, k_lse2, means = empty(num_sums, layers, m), empty(num_sums, layers, n), empty(2)
    if num_sums:
        own, other = SUMS_TILE
        programs = triton.cdiv(m, own) + (triton.cdiv(n, own) if form.symmetric else 0)
        sums_kernel[(programs, layers, num_sums)](
            products, a_squares, k_squares, anchor_labels, key_labels, a_counts, k_counts, scales,
            first_slot, num_slots, a_lse2, k_lse2, means, m, n,
            NUM_SUMS=num_sums, L=layers, EXCLUDE_SELF=form.exclude_self, OWN=own, OTHER=other,
        )  # fmt: skip

    block_m, block_n = PAIRS_TILE
    tiles_m, tiles_n = triton.cdiv(m, block_m), triton.cdiv(n, block_n)
    slopes, sums = empty(layers, m, n), empty(layers, tiles_m * tiles_n, 3)
    a_along, k_along = empty(layers, tiles_n, m), empty(layers, tiles_m, n)
    a_inverse, k_inverse = empty(layers, m), empty(layers, n)
    pairs_kernel[(tiles_m * tiles_n, layers)](
        products, a_squares, k_squares, a_counts, k_counts, a_lse2, k_lse2, means, scales,
        anchor_labels, key_labels, first_slot, num_slots,
        slopes, a_along, k_along, a_inverse, k_inverse, sums, m, n, float(form.negatives or 0),
        L=layers, LOSS=form.name, SYMMETRIC=form.symmetric,
        ALL_NEGATIVES=form.negatives is None, EXCLUDE_SELF=form.exclude_self,
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip

    _, want_anchors, want_keys = wanted
    losses, grad_scales = empty(layers), empty(2, layers)
    grad_anchors = [empty(m, width if want_anchors else 0, dtype=saved_dtype(dtype)) for width in widths]
    grad_keys = [empty(n, width if want_keys else 0, dtype=saved_dtype(dtype)) for width in widths]
    sizes = [size for size, want in ((m, want_anchors), (n, want_keys)) if want]

    def gradient_tiles(tile: Tile, rows: int) -> list[int]:
        return [triton.cdiv(rows, tile.m) * triton.cdiv(width, tile.d) for width in widths]

    tile = choose("PRODUCT", anchors[0], lambda t: sum(sum(gradient_tiles(t, s)) for s in sizes))
    a_tiles = gradient_tiles(tile, m) if want_anchors else [0] * layers
    k_tiles = gradient_tiles(tile, n) if want_keys else [0] * layers
    *first_tile, programs = accumulate((layers, *a_tiles, *k_tiles))
    finish_kernel[(programs,)](
        tuple(anchors), tuple(keys), tuple(grad_anchors), tuple(grad_keys), widths,
        tuple(first_tile[:layers]), tuple(first_tile[layers:]),
        slopes, a_along, k_along, a_inverse, k_inverse, sums, scales, losses, grad_scales,
        m, n, tiles_m * tiles_n, tiles_n, tiles_m,
        L=layers, BY_ANCHORS=want_anchors, BY_KEYS=want_keys, PRECISION=dot_precision(precision),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_D=tile.d, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return [losses, grad_scales, *grad_anchors, *grad_keys]
