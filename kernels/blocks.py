"""Many pairs: blocks of logits in a bounded workspace, the gradients as library products of the block.

The host walks over blocks of BLOCK x BLOCK pairs in a fixed order. A block's kernel forms the logits, loss
and derivative by each logit in one pass and writes only the derivative, in the dtype of the features; one
matrix product a side, accumulated in float32, takes it to the features. InfoNCE first walks once to find the
log-sum-exp of rows and, if symmetric, of columns from the same logits. 6 MND operations for NCE with both
sides, 4 with one, and 2 more for InfoNCE; memory O((M + N) D) and one block.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from mim4dd.reference import Objective, saved_dtype

from .block_kernels import pairs_kernel, rows_kernel, sums_kernel
from .launch import Tile, choose, dot_precision, precision_of

# Rows and columns of a block. The products read and write their float32 sums once a block, 16 D (rows +
# columns) bytes for 4 rows columns D operations: at 8,192 a tenth of the time of the products on an H100 by
# arithmetic, and a workspace of 128 MiB in bfloat16.
BLOCK = 8192


def contrast(
    objective: Objective,
    scales: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    anchors: Tensor,
    keys: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """One layer's loss [1] and gradients by scales [2, 1], anchors and keys ([rows, 0] where not wanted).

    Features are contiguous, aligned, of a width that is a multiple of 16; other arguments as in
    `kernels.contrast`.
    """
    nce, gradient = objective.name == "nce", any(wanted)
    _, want_anchors, want_keys = wanted
    m, n, width, device = len(anchors), len(keys), anchors.shape[1], anchors.device
    precision = precision_of(anchors.dtype)
    largest = (min(m, BLOCK), min(n, BLOCK))
    tile = choose(
        table_name(objective, wanted),
        precision,
        anchors.element_size(),
        device,
        lambda t: _tiles(t, *largest),
    )
    options = {
        "SYMMETRIC": objective.symmetric, "PRECISION": dot_precision(precision), "GROUP": 8,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_D": tile.d,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    anchor_labels, key_labels = _ranks(anchor_labels, key_labels)
    a_inverse, a_counts = _rows(anchors, anchor_labels, key_labels)
    k_inverse, k_counts = _rows(keys, key_labels, anchor_labels)
    a_lse2, k_lse2 = zeros(m), zeros(n)
    if nce:
        means = torch.tensor([1 / m, 1 / n], device=device)
    else:
        means = torch.stack([(counts > 0).sum() for counts in (a_counts, k_counts)]).clamp_min(1).reciprocal()
        a_lse2.fill_(-torch.inf)
        k_lse2.fill_(-torch.inf)
        for rows, columns in _walk(m, n):
            a, k = anchors[rows], keys[columns]
            row_lse2 = empty(triton.cdiv(len(k), tile.n), len(a))
            column_lse2 = empty(triton.cdiv(len(a), tile.m), len(k))
            sums_kernel[(_tiles(tile, len(a), len(k)),)](
                a, k, a_inverse[rows], k_inverse[columns], scales, row_lse2, column_lse2,
                len(a), len(k), width, **options,
            )  # fmt: skip
            _add_log_sums2(a_lse2[rows], row_lse2)
            if objective.symmetric:
                _add_log_sums2(k_lse2[columns], column_lse2)

    # Slopes are stored over both norms, so that one block serves both products. The gain brings the largest
    # near 1: float16 has no room for 1 / M over two norms.
    temperature = scales[0, 0]
    gain = min(m, n) / (a_inverse.amax() * k_inverse.amax()).clamp_min(1e-30)
    workspace = empty(largest[0] * largest[1] if gradient else 0, dtype=anchors.dtype)
    sums = zeros(3)
    by_anchors, by_keys = zeros(m, width if want_anchors else 0), zeros(n, width if want_keys else 0)
    for rows, columns in _walk(m, n):
        a, k = anchors[rows], keys[columns]
        slopes = workspace[: len(a) * len(k)].view(len(a), len(k)) if gradient else workspace
        block_sums = zeros(_tiles(tile, len(a), len(k)), 3)
        pairs_kernel[(_tiles(tile, len(a), len(k)),)](
            a, k, a_inverse[rows], k_inverse[columns], a_counts[rows], k_counts[columns],
            a_lse2[rows], k_lse2[columns], means, scales, anchor_labels[rows], key_labels[columns],
            gain, slopes, block_sums,
            len(a), len(k), width, m, n, float(objective.negatives or 0),
            NCE=nce, ALL_NEGATIVES=objective.negatives is None,
            GRADIENT=gradient, BY_SCALES=wanted[0], **options,
        )  # fmt: skip
        sums += block_sums.sum(0)
        if want_anchors:
            _add_product(by_anchors[rows], slopes, k)
        if want_keys:
            _add_product(by_keys[columns], slopes.T, a)
    for want, by_side, side, inverse in (
        (want_anchors, by_anchors, anchors, a_inverse),
        (want_keys, by_keys, keys, k_inverse),
    ):
        for start in range(0, len(side) if want else 0, BLOCK):
            rows = slice(start, start + BLOCK)
            _across(by_side[rows], side[rows], inverse[rows, None]).div_(gain * temperature)
    by_scales = -torch.stack([sums[1] / temperature.square(), sums[2] / scales[1, 0]])[:, None]
    saved = saved_dtype(anchors.dtype)
    return [sums[:1], by_scales, by_anchors.to(saved), by_keys.to(saved)]


def table_name(objective: Objective, wanted: Sequence[bool]) -> str:
    """The launch table of a call."""
    return "LONG_BLOCKS" if objective.symmetric or wanted[0] else "BLOCKS"


def _rows(features: Tensor, labels: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse norms [rows], and how many of `others` have each row's label, int32 [rows]."""
    rows, width = features.shape
    inverse = torch.empty(rows, device=features.device)
    counts = torch.empty(rows, dtype=torch.int32, device=features.device)
    rows_kernel[(triton.cdiv(rows, 32),)](
        features, labels, others, inverse, counts, rows, len(others), width, BLOCK_M=32, BLOCK_D=128
    )
    return inverse, counts


def _ranks(anchor_labels: Tensor, key_labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels as int32, equal where they were equal; without waiting for the device.

    64-bit labels cost the tile of pairs 32 registers a thread, and it would spill.
    """
    labels = torch.cat([anchor_labels, key_labels])
    ordered, order = labels.sort()
    ranks = torch.zeros_like(labels, dtype=torch.int32)
    ranks[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    ranks = torch.empty_like(ranks).scatter_(0, order, ranks)
    # Clones, so that both begin at an aligned address.
    return ranks[: len(anchor_labels)].clone(), ranks[len(anchor_labels) :].clone()


def _walk(m: int, n: int) -> Iterator[tuple[slice, slice]]:
    for row in range(0, m, BLOCK):
        for column in range(0, n, BLOCK):
            yield slice(row, row + BLOCK), slice(column, column + BLOCK)


def _tiles(tile: Tile, m: int, n: int) -> int:
    return triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)


def _add_log_sums2(total: Tensor, parts: Tensor) -> None:
    """Put log2 of the sum of 2^total [rows] and 2^parts [tiles, rows] into `total`."""
    log2 = math.log(2)
    total.copy_(torch.cat([total[None], parts]).mul_(log2).logsumexp(0).div_(log2))


def _across(gradient: Tensor, features: Tensor, inverse: Tensor) -> Tensor:
    """Take from `gradient` what lies along the rows of `features`, in place: normalised rows ignore it."""
    along = (gradient * features).sum(1, keepdim=True).mul_(inverse.square())
    return gradient.addcmul_(features, along, value=-1)


def _add_product(total: Tensor, slopes: Tensor, features: Tensor) -> None:
    """total += slopes @ features, summed in float32."""
    if total.is_cuda and features.dtype != torch.float32:
        torch.addmm(total, slopes, features, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(slopes.float(), features.float())
