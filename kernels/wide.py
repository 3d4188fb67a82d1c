"""Many pairs of many features: blocks of logits in a bounded workspace, gradients as products of the block.

The host walks over blocks of pairs in a fixed order. A block's kernel forms the logits, loss and derivative
by each logit in one pass and writes only the derivative, in the dtype of the features; one library product a
side, accumulated in float32, takes it to the features. InfoNCE walks once before, for its log-sum-exps.
6 MND operations for NCE with both sides, 4 with one, and 2 more for InfoNCE; memory O((M + N) D) and one
block.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mim4dd.losses.form import LossForm

from . import sides
from .launch import Tile, choose, dot_precision, precision_of
from .sides import walk
from .wide_kernels import pairs_kernel


def contrast(
    form: LossForm,
    scales: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    anchors: Tensor,
    keys: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """One layer's loss [1] and gradients for scales [2, 1], anchors and keys (empty where not wanted).

    Features are contiguous, aligned, of a width that is a multiple of 16; other arguments as in
    `kernels.contrast`.
    """
    a, k, largest, loss = sides.prepare(form, scales, anchor_labels, key_labels, anchors, keys)
    gradient = any(wanted)
    if loss is not None and not gradient:
        return [loss, *[loss.new_empty(0)] * 3]
    _, want_anchors, want_keys = wanted
    m, n, width, device = len(anchors), len(keys), anchors.shape[1], anchors.device
    block_m, block_n = min(m, sides.BLOCK), min(n, sides.BLOCK)
    precision = precision_of(anchors.dtype)
    tile = choose(table_name(form, wanted, width), anchors, lambda t: _tiles(t, block_m, block_n))
    # Slopes are stored over both norms, so that one block serves both products. The products read and write
    # their float32 sums once a block, 16 D (rows + columns) bytes for 4 rows columns D operations: at 8,192 a
    # tenth of the time of the products on an H100 by arithmetic, and a workspace of 128 MiB in bfloat16.
    gain = sides.gain(anchors.dtype, largest * a.inverse.amax() * k.inverse.amax())
    workspace = torch.empty(block_m * block_n if gradient else 0, dtype=anchors.dtype, device=device)
    sums = scales.new_zeros(3)
    grad_anchors = scales.new_zeros(m, width if want_anchors else 0)
    grad_keys = scales.new_zeros(n, width if want_keys else 0)
    for rows, columns in walk(m, n):
        row, column = a.of(rows), k.of(columns)
        shape = len(row.features), len(column.features)
        slopes = workspace[: shape[0] * shape[1]].view(shape) if gradient else workspace
        block_sums = scales.new_zeros(_tiles(tile, *shape), 3)
        pairs_kernel[(_tiles(tile, *shape),)](
            row.features, column.features, row.inverse, column.inverse, row.labels, column.labels,
            row.on_positive, row.on_other, row.lse2, row.pull2,
            column.on_positive, column.on_other, column.lse2, column.pull2,
            scales, gain, slopes, block_sums, *shape, width, rows.start - columns.start,
            LOSS=form.name, SYMMETRIC=form.symmetric, EXCLUDE_SELF=form.exclude_self,
            SUM=loss is None, GRADIENT=gradient, BY_SCALES=wanted[0], PRECISION=dot_precision(precision),
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_D=tile.d, GROUP=8,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        sums += block_sums.sum(0)
        if want_anchors:
            _add_product(grad_anchors[rows], slopes, column.features)
        if want_keys:
            _add_product(grad_keys[columns], slopes.T, row.features)
    return [
        sums[:1] if loss is None else loss,
        sides.scale_gradient(sums, scales),
        sides.feature_gradient(grad_anchors[None], a, scales, gain) if want_anchors else grad_anchors,
        sides.feature_gradient(grad_keys[None], k, scales, gain) if want_keys else grad_keys,
    ]


def table_name(form: LossForm, wanted: Sequence[bool], width: int) -> str:
    """The launch table of a call."""
    return "LONG_WIDE" if form.symmetric or wanted[0] else "WIDE"


def _tiles(tile: Tile, m: int, n: int) -> int:
    return triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)


def _add_product(total: Tensor, slopes: Tensor, features: Tensor) -> None:
    """total += slopes @ features, summed in float32."""
    if total.is_cuda and features.dtype != torch.float32:
        torch.addmm(total, slopes, features, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(slopes.float(), features.float())
