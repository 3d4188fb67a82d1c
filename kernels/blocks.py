"""Many pairs: blocks of logits in a bounded workspace, the gradients as library products of the block.

The host walks over blocks of BLOCK x BLOCK pairs in a fixed order. A block's kernel forms the logits, loss and
derivative by each logit in one pass and writes only the derivative, in the dtype of the features; one matrix
product a side, accumulated in float32, takes it to the features. InfoNCE first walks once to find the
log-sum-exp of rows and, if symmetric, of columns from the same logits. 6 MND operations for NCE with both
sides, 4 with one, and 2 more for InfoNCE; memory O((M + N) D) and one block.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mim4dd.reference import Objective, saved_dtype

from .launch import BLOCKS, Tile, choose, dot_precision, precision_of
from .pairs import LN2, LOG2E, count_equal, inverse_norm, pair_terms, row_products, weights

# Rows and columns of a block. The products read and write their float32 sums once a block, 16 D (rows +
# columns) bytes for 4 rows columns D operations: at 8,192 a tenth of the time of the products on an H100 by
# arithmetic, and a workspace of 128 MiB in bfloat16.
BLOCK = 8192


@triton.jit(do_not_specialize=["rows", "num_others"])
def rows_kernel(
    FEATURES, LABELS, OTHERS, INVERSE, COUNTS, rows, num_others, width,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of each row its inverse norm, and how many of OTHERS have its label."""
    own = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = own < rows
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        features = start + tl.arange(0, BLOCK_D)
        values = tl.load(
            FEATURES + own.to(tl.int64)[:, None] * width + features[None, :],
            mask=in_rows[:, None] & (features < width)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        squares += tl.sum(values * values, 1)
    tl.store(INVERSE + own, inverse_norm(squares), mask=in_rows)
    labels = tl.load(LABELS + own, mask=in_rows, other=0)
    tl.store(COUNTS + own, count_equal(labels, OTHERS, num_others, 128), mask=in_rows)


@triton.jit
def _tile_logits2(
    A, K, A_INVERSE, K_INVERSE, SCALES, M, N, width,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The tile of this program: its place, inverse norms and critic logits in base 2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # GROUP rows of tiles at a time, so that programs running together share operands in the L2.
    first = tl.program_id(0) // (GROUP * tiles_n) * GROUP
    in_group = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + tl.program_id(0) % (GROUP * tiles_n) % in_group
    tile_n = tl.program_id(0) % (GROUP * tiles_n) // in_group
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < M
    in_columns = columns < N
    products, _, _ = row_products(
        A, K, rows, columns, in_rows, in_columns, width, 0, width,
        False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    a_inverse = tl.load(A_INVERSE + rows, mask=in_rows, other=0.0)
    k_inverse = tl.load(K_INVERSE + columns, mask=in_columns, other=0.0)
    scale2 = LOG2E / tl.load(SCALES)
    x2 = products * (a_inverse * scale2)[:, None] * k_inverse[None, :] - tl.log2(tl.load(SCALES + 1))
    return tile_m, tile_n, rows, columns, in_rows, in_columns, a_inverse, k_inverse, x2


@triton.jit
def _log_sum_exp2(x2, AXIS: tl.constexpr):
    largest = tl.max(x2, AXIS)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    return shift + tl.log2(tl.sum(tl.exp2(x2 - tl.expand_dims(shift, AXIS)), AXIS))


@triton.jit(do_not_specialize=["M", "N"])
def sums_kernel(
    A, K, A_INVERSE, K_INVERSE, SCALES, ROW_LSE2, COLUMN_LSE2, M, N, width,
    SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (base 2) of the rows, ROW_LSE2 [tiles, M], and columns, COLUMN_LSE2 [tiles, N], of a tile."""
    tile_m, tile_n, rows, columns, in_rows, in_columns, _, _, x2 = _tile_logits2(
        A, K, A_INVERSE, K_INVERSE, SCALES, M, N, width, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, GROUP
    )
    x2 = tl.where(in_rows[:, None] & in_columns[None, :], x2, float("-inf"))
    tl.store(ROW_LSE2 + tile_n * M + rows, _log_sum_exp2(x2, 1), mask=in_rows)
    if SYMMETRIC:
        tl.store(COLUMN_LSE2 + tile_m * N + columns, _log_sum_exp2(x2, 0), mask=in_columns)


@triton.jit(do_not_specialize=["M", "N", "num_anchors", "num_keys"])
def pairs_kernel(
    A, K, A_INVERSE, K_INVERSE, A_COUNTS, K_COUNTS, A_LSE2, K_LSE2, MEANS, SCALES,
    ANCHOR_LABELS, KEY_LABELS, GAIN, SLOPES, SUMS,
    M, N, width, num_anchors, num_keys, negatives,
    NCE: tl.constexpr, SYMMETRIC: tl.constexpr, ALL_NEGATIVES: tl.constexpr, GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """SUMS [tiles, 3] of loss, slope times cosine, slope; and with GRADIENT the SLOPES [M, N] of the block:
    dL/dx over both norms, times GAIN."""
    _, _, rows, columns, in_rows, in_columns, a_inverse, k_inverse, x2 = _tile_logits2(
        A, K, A_INVERSE, K_INVERSE, SCALES, M, N, width, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, GROUP
    )
    if NCE:
        a_lse2 = a_inverse
        k_lse2 = k_inverse
    else:
        a_lse2 = tl.load(A_LSE2 + rows, mask=in_rows, other=0.0)
        k_lse2 = tl.load(K_LSE2 + columns, mask=in_columns, other=0.0)
    a_counts = tl.load(A_COUNTS + rows, mask=in_rows, other=0)
    k_counts = tl.load(K_COUNTS + columns, mask=in_columns, other=0)
    a_positive, a_other = weights(a_counts, num_keys, tl.load(MEANS), negatives, NCE, ALL_NEGATIVES)
    k_positive, k_other = weights(k_counts, num_anchors, tl.load(MEANS + 1), negatives, NCE, ALL_NEGATIVES)
    a_labels = tl.load(ANCHOR_LABELS + rows, mask=in_rows, other=0)
    k_labels = tl.load(KEY_LABELS + columns, mask=in_columns, other=0)
    loss2, slopes = pair_terms(
        x2, a_labels[:, None] == k_labels[None, :], in_rows[:, None] & in_columns[None, :],
        a_positive, a_other, a_lse2, k_positive, k_other, k_lse2, NCE, SYMMETRIC,
    )  # fmt: skip
    sums = SUMS + tl.program_id(0) * 3
    tl.store(sums, tl.sum(tl.sum(loss2, 1), 0) * LN2)
    if GRADIENT:
        # The cosine again from x, rather than kept: registers are what this kernel is short of.
        cosines = (x2 + tl.log2(tl.load(SCALES + 1))) * (tl.load(SCALES) * LN2)
        tl.store(sums + 1, tl.sum(tl.sum(slopes * cosines, 1), 0))
        tl.store(sums + 2, tl.sum(tl.sum(slopes, 1), 0))
        scaled = slopes * (a_inverse * tl.load(GAIN))[:, None] * k_inverse[None, :]
        tl.store(
            SLOPES + rows.to(tl.int64)[:, None] * N + columns[None, :], scaled.to(SLOPES.dtype.element_ty),
            mask=in_rows[:, None] & in_columns[None, :],
        )  # fmt: skip


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
    tile = choose(BLOCKS, precision, anchors.element_size(), device, lambda t: _tiles(t, *largest))
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
            NCE=nce, ALL_NEGATIVES=objective.negatives is None, GRADIENT=gradient, **options,
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
    """The labels as int32: equal where they were equal, whatever their values, without waiting for the device.

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
