"""The kernels of `blocks`."""

import triton
import triton.language as tl

from .pairs import LN2, LOG2E, count_equal, inverse_norm, pair_terms, row_products, weights


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
    """Log-sum-exp (base 2) of each tile by row, ROW_LSE2 [tiles, M], and column, COLUMN_LSE2 [tiles, N]."""
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
    NCE: tl.constexpr, SYMMETRIC: tl.constexpr, ALL_NEGATIVES: tl.constexpr,
    GRADIENT: tl.constexpr, BY_SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """SUMS [tiles, 3] of loss and, BY_SCALES, of slope times cosine and slope; with GRADIENT the SLOPES
    [M, N] of the block, dL/dx over both norms, times GAIN."""
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
        if BY_SCALES:
            tl.store(sums + 1, tl.sum(tl.sum(slopes * cosines, 1), 0))
            tl.store(sums + 2, tl.sum(tl.sum(slopes, 1), 0))
        scaled = slopes * (a_inverse * tl.load(GAIN))[:, None] * k_inverse[None, :]
        tl.store(
            SLOPES + rows.to(tl.int64)[:, None] * N + columns[None, :], scaled.to(SLOPES.dtype.element_ty),
            mask=in_rows[:, None] & in_columns[None, :],
        )  # fmt: skip
