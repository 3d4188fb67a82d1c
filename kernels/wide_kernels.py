"""The kernels of `wide` over a block of pairs; `sides` takes log-sum-exps with the first, at any width."""

import triton
import triton.language as tl

from .pairs import LEFT_OUT, LN2, LOG2E, pair_terms, row_products


@triton.jit
def _tile_logits2(
    A, K, A_INVERSE, K_INVERSE, SCALES, M, N, width, ahead,
    EXCLUDE_SELF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The tile of this program: its place, which pairs count, inverse norms and critic logits in base 2.

    Row i is the column i + `ahead` of the block, should they be one.
    """
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
    counting = in_rows[:, None] & in_columns[None, :]
    if EXCLUDE_SELF:
        counting = counting & ((rows + ahead)[:, None] != columns[None, :])
    x2 = tl.where(counting, x2, LEFT_OUT)
    return tile_m, tile_n, rows, columns, in_rows, in_columns, counting, a_inverse, k_inverse, x2


@triton.jit
def _tile_positive(
    ANCHOR_LABELS, KEY_LABELS, rows, columns, in_rows, in_columns, counting, EXCLUDE_SELF: tl.constexpr
):
    a_labels = tl.load(ANCHOR_LABELS + rows, mask=in_rows, other=-1)
    k_labels = tl.load(KEY_LABELS + columns, mask=in_columns, other=-2)
    positive = a_labels[:, None] == k_labels[None, :]
    if EXCLUDE_SELF:
        positive = positive & counting
    return positive


@triton.jit
def _log_sum2(terms, bound, AXIS: tl.constexpr):
    """log2 of the sum of 2^bound terms."""
    total = tl.sum(terms, AXIS)
    return tl.where(total > 0.0, bound + tl.log2(tl.maximum(total, 1e-37)), LEFT_OUT)


@triton.jit
def _log_sum_exp2(x2, AXIS: tl.constexpr):
    largest = tl.max(x2, AXIS)
    return largest + tl.log2(tl.sum(tl.exp2(x2 - tl.expand_dims(largest, AXIS)), AXIS))


@triton.jit
def _summand(values, positive, left_out, index: tl.constexpr, NUM_SUMS: tl.constexpr):
    """Of the values of pairs those that count in the sum of this index (see `pairs.LOG_SUMS`)."""
    if NUM_SUMS == 1:
        return values
    elif index == 0:  # noqa: RET505 (one return after the other is no branch to Triton)
        return tl.where(positive, left_out, values)
    else:
        return tl.where(positive, values, left_out)


@triton.jit(do_not_specialize=["M", "N", "ahead"])
def sums_kernel(
    A, K, A_INVERSE, K_INVERSE, ANCHOR_LABELS, KEY_LABELS, SCALES, ROW_LSE2, COLUMN_LSE2, M, N, width, ahead,
    NUM_SUMS: tl.constexpr, SYMMETRIC: tl.constexpr, EXCLUDE_SELF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """log2 of the sums of 2^x2 of each tile by row, ROW_LSE2 [tiles, NUM_SUMS, M], and by column, COLUMN_LSE2
    [tiles, NUM_SUMS, N]."""
    tile_m, tile_n, rows, columns, in_rows, in_columns, counting, _, _, x2 = _tile_logits2(
        A, K, A_INVERSE, K_INVERSE, SCALES, M, N, width, ahead,
        EXCLUDE_SELF, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, GROUP,
    )  # fmt: skip
    positive = counting
    if NUM_SUMS == 2:
        positive = _tile_positive(
            ANCHOR_LABELS, KEY_LABELS, rows, columns, in_rows, in_columns, counting, EXCLUDE_SELF
        )
    ROW_LSE2 += tile_n.to(tl.int64) * NUM_SUMS * M
    COLUMN_LSE2 += tile_m.to(tl.int64) * NUM_SUMS * N
    bound = LOG2E / tl.load(SCALES)
    if bound < 50.0:
        # A cosine is at most 1, so this is above every logit, and no term below 2^-100 of it: one exponential
        # a pair serves every sum, without looking for maxima.
        terms = tl.exp2(x2 - bound)
        for index in tl.static_range(NUM_SUMS):
            summand = _summand(terms, positive, 0.0, index, NUM_SUMS)
            tl.store(ROW_LSE2 + index * M + rows, _log_sum2(summand, bound, 1), mask=in_rows)
            if SYMMETRIC:
                tl.store(COLUMN_LSE2 + index * N + columns, _log_sum2(summand, bound, 0), mask=in_columns)
    else:
        for index in tl.static_range(NUM_SUMS):
            summand = _summand(x2, positive, LEFT_OUT, index, NUM_SUMS)
            tl.store(ROW_LSE2 + index * M + rows, _log_sum_exp2(summand, 1), mask=in_rows)
            if SYMMETRIC:
                tl.store(COLUMN_LSE2 + index * N + columns, _log_sum_exp2(summand, 0), mask=in_columns)


@triton.jit(do_not_specialize=["M", "N", "ahead"])
def pairs_kernel(
    A, K, A_INVERSE, K_INVERSE, ANCHOR_LABELS, KEY_LABELS, A_POSITIVE, A_OTHER, A_LSE2, A_PULL2,
    K_POSITIVE, K_OTHER, K_LSE2, K_PULL2, SCALES, GAIN, SLOPES, SUMS, M, N, width, ahead,
    LOSS: tl.constexpr, SYMMETRIC: tl.constexpr, EXCLUDE_SELF: tl.constexpr, SUM: tl.constexpr,
    GRADIENT: tl.constexpr, BY_SCALES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """SUMS [tiles, 3], with SUM of the loss and BY_SCALES of slope times cosine and slope; with GRADIENT the
    SLOPES [M, N] of the block, dL/dx over both norms, times GAIN."""
    _, _, rows, columns, in_rows, in_columns, counting, a_inverse, k_inverse, x2 = _tile_logits2(
        A, K, A_INVERSE, K_INVERSE, SCALES, M, N, width, ahead,
        EXCLUDE_SELF, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, GROUP,
    )  # fmt: skip
    # What the loss makes no use of the compiler drops.
    a_lse2 = tl.load(A_LSE2 + rows, mask=in_rows, other=0.0)
    k_lse2 = tl.load(K_LSE2 + columns, mask=in_columns, other=0.0)
    a_pull2 = tl.load(A_PULL2 + rows, mask=in_rows, other=0.0)
    k_pull2 = tl.load(K_PULL2 + columns, mask=in_columns, other=0.0)
    positive = _tile_positive(
        ANCHOR_LABELS, KEY_LABELS, rows, columns, in_rows, in_columns, counting, EXCLUDE_SELF
    )
    loss2, slopes = pair_terms(
        x2, positive,
        tl.load(A_POSITIVE + rows, mask=in_rows, other=0.0), tl.load(A_OTHER + rows, mask=in_rows, other=0.0),
        a_lse2, a_pull2,
        tl.load(K_POSITIVE + columns, mask=in_columns, other=0.0),
        tl.load(K_OTHER + columns, mask=in_columns, other=0.0), k_lse2, k_pull2,
        LOSS, True, SYMMETRIC,
    )  # fmt: skip
    sums = SUMS + tl.program_id(0) * 3
    if SUM:
        tl.store(sums, tl.sum(loss2) * LN2)
    if GRADIENT:
        # The cosine again from x, rather than kept: registers are what this kernel is short of.
        cosines = (x2 + tl.log2(tl.load(SCALES + 1))) * (tl.load(SCALES) * LN2)
        if BY_SCALES:
            tl.store(sums + 1, tl.sum(slopes * cosines))
            tl.store(sums + 2, tl.sum(slopes))
        scaled = slopes * (a_inverse * tl.load(GAIN))[:, None] * k_inverse[None, :]
        tl.store(
            SLOPES + rows.to(tl.int64)[:, None] * N + columns[None, :], scaled.to(SLOPES.dtype.element_ty),
            mask=in_rows[:, None] & in_columns[None, :],
        )  # fmt: skip
