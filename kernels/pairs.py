"""What the kernels share: products of rows, label counts, and the losses of a pair with their gradients.

Everything works in base 2 (x2 = x log2 e), since exp2 and log2 are single instructions and exp and log are
not. Scales are applied to the accumulated products, never to the features.
"""

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# How many log-sum-exps a row needs: none; over all its pairs; or over those that are not positive and over
# those that are, each with a maximum of its own, as the positives may be far below the nearest other.
LOG_SUMS = {"nce": 0, "info_nce": 1, "info_nce_any": 2}

# The logit of a pair that does not count. Finite, so that no sum or product over it is NaN.
LEFT_OUT = tl.constexpr(-1e30)

# The interpreter computes bfloat16 wrongly without a word and has no libdevice.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, float32."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def log2(x):
    """log2 of x in [1, 2]."""
    # tl.log2 is a polynomial of 30 instructions; this is one, and 1 + exp2 stays far from its weak spots.
    if INTERPRET:
        return tl.log2(x)
    return libdevice.fast_log2f(x)


@triton.jit
def row_products(
    A, K, rows, columns, in_rows, in_columns, width, low, high,
    SQUARES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products of rows of A and K over the features low..high, and with SQUARES the rows' own squares."""
    features = low + tl.arange(0, BLOCK_D)
    a_pointers = A + rows.to(tl.int64)[:, None] * width + features[None, :]
    k_pointers = K + columns.to(tl.int64)[:, None] * width + features[None, :]
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    a_squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    k_squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(low, high, BLOCK_D):
        in_width = start + tl.arange(0, BLOCK_D) < high
        a = tl.load(a_pointers, mask=in_rows[:, None] & in_width[None, :], other=0.0)
        k = tl.load(k_pointers, mask=in_columns[:, None] & in_width[None, :], other=0.0)
        products = dot(a, tl.trans(k), products, PRECISION)
        if SQUARES:
            a_squares += tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
            k_squares += tl.sum(k.to(tl.float32) * k.to(tl.float32), 1)
        a_pointers += BLOCK_D
        k_pointers += BLOCK_D
    return products, a_squares, k_squares


@triton.jit
def inverse_norm(squares):
    """1 / length, 0 for a zero row."""
    return tl.where(squares > 0.0, tl.rsqrt(tl.where(squares > 0.0, squares, 1.0)), 0.0)


@triton.jit
def count_equal(labels, OTHERS, num_others, BLOCK: tl.constexpr):
    """For each of `labels`, how many of OTHERS equal it."""
    counts = tl.zeros(labels.shape, dtype=tl.int32)
    for start in range(0, num_others, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        others = tl.load(OTHERS + offsets, mask=offsets < num_others, other=0)
        equal = (labels[:, None] == others[None, :]) & (offsets < num_others)[None, :]
        counts += tl.sum(equal.to(tl.int32), 1)
    return counts


@triton.jit
def weights(counts, num_others, mean, negatives, LOSS: tl.constexpr, ALL_NEGATIVES: tl.constexpr):
    """The weight of each row's positive pairs, then of its negative pairs (NCE) or the row (InfoNCE)."""
    on_positive = mean / tl.maximum(counts, 1).to(tl.float32)
    if LOSS == "nce":
        if ALL_NEGATIVES:
            on_other = tl.zeros_like(on_positive) + mean
        else:
            on_other = mean * negatives / tl.maximum(num_others - counts, 1).to(tl.float32)
    else:
        on_positive = tl.where(counts > 0, on_positive, 0.0)
        on_other = tl.where(counts > 0, mean, 0.0)
    return on_positive, on_other


@triton.jit
def any_terms(others2, positives2):
    """From the log-sum-exps of a row's pairs that are not positive and of those that are: the loss of the row
    with positives taken together (base 2), its lse2, and pull2 (see `info_nce_pair`).

    The loss is the softplus of the odds against a positive: the difference of the log-sum-exps of all pairs
    and of the positives would cancel in a solved row.
    """
    odds2 = others2 - positives2
    rest2 = log2(1.0 + tl.exp2(-tl.abs(odds2)))
    lse2 = tl.maximum(others2, positives2) + rest2
    return tl.maximum(odds2, 0.0) + rest2, lse2, lse2 - odds2


@triton.jit
def nce_pair(x2, positive, on_positive, on_negative):
    """The weighted NCE loss of a pair in base 2, and its derivative by x.

    Pairs whose loss is below 2^-24 count as 0 in the loss (1 + t rounds to 1), not in the gradient. One
    softplus on a selected sign: two, one for each sign, take 255 registers and spill.
    """
    z2 = tl.where(positive, -x2, x2)
    weight = tl.where(positive, on_positive, on_negative)
    t = tl.exp2(-tl.abs(z2))
    loss = weight * (tl.maximum(z2, 0.0) + log2(1.0 + t))
    slope = weight * (tl.where(z2 >= 0.0, 1.0, t) / (1.0 + t))
    return loss, tl.where(positive, -slope, slope)


@triton.jit
def info_nce_pair(x2, positive, on_positive, on_row, lse2, pull2, LOSS: tl.constexpr):
    """The weighted InfoNCE loss of a pair in base 2, and its derivative by x.

    With positives taken together the loss is that of rows, see `any_terms`. A positive pair is pulled by its
    share among the positives times the chance of the others: one power, 2^(x2 - pull2), as the difference of
    two would cancel in a solved row.
    """
    if LOSS == "info_nce":
        loss = tl.where(positive, on_positive * (lse2 - x2), 0.0)
        slope = on_row * tl.exp2(x2 - lse2) - tl.where(positive, on_positive, 0.0)
    else:
        loss = tl.zeros_like(x2)
        slope = on_row * tl.exp2(tl.where(positive, x2 - pull2, x2 - lse2))
        slope = tl.where(positive, -slope, slope)
    return loss, slope


@triton.jit
def _of_pairs(row, column, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr):
    if BY_ROW and BY_COLUMN:
        return row[:, None] + column[None, :]
    elif BY_ROW:  # noqa: RET505 (one return after the other is no branch to Triton)
        return row[:, None]
    else:
        return column[None, :]


@triton.jit
def pair_terms(
    x2, positive, row_positive, row_other, row_lse2, row_pull2,
    column_positive, column_other, column_lse2, column_pull2,
    LOSS: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """Loss (base 2) and derivative by x of the pairs of a tile, of the losses of rows, columns, or both.

    A pair that does not count has x2 = LEFT_OUT and is not positive: both its terms are 0.
    """
    if LOSS == "nce":
        # Both directions see the same x, so their weights add.
        on_positive = _of_pairs(row_positive, column_positive, BY_ROW, BY_COLUMN)
        on_negative = _of_pairs(row_other, column_other, BY_ROW, BY_COLUMN)
        loss, slope = nce_pair(x2, positive, on_positive, on_negative)
    else:
        if BY_ROW:
            loss, slope = info_nce_pair(
                x2, positive, row_positive[:, None], row_other[:, None],
                row_lse2[:, None], row_pull2[:, None], LOSS,
            )  # fmt: skip
        if BY_COLUMN:
            more_loss, more_slope = info_nce_pair(
                x2, positive, column_positive[None, :], column_other[None, :],
                column_lse2[None, :], column_pull2[None, :], LOSS,
            )  # fmt: skip
            if BY_ROW:
                loss += more_loss
                slope += more_slope
            else:
                loss = more_loss
                slope = more_slope
    return loss, slope
