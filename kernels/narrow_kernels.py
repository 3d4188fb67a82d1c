"""The kernel of `narrow`."""

import triton
import triton.language as tl

from .pairs import LEFT_OUT, LN2, LOG2E, dot, pair_terms


@triton.jit(do_not_specialize=["num_own", "num_others", "others_per_part"])
def narrow_kernel(
    OWN, OTHERS, OWN_INVERSE, OTHER_INVERSE, OWN_LABELS, OTHER_LABELS,
    OWN_POSITIVE, OWN_OTHER, OWN_LSE2, OWN_PULL2, OTHER_POSITIVE, OTHER_OTHER, OTHER_LSE2, OTHER_PULL2,
    SCALES, GAIN, PARTS, SUMS, num_own, num_others, others_per_part,
    WIDTH: tl.constexpr, LOSS: tl.constexpr, BY_OWN: tl.constexpr, BY_OTHER: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr, SUM: tl.constexpr, BY_SCALES: tl.constexpr, GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of OWN rows against one part of the OTHERS, once over.

    PARTS [parts, own, WIDTH] gets the sum over the others of slope times their unit rows, over the own norm
    and times GAIN; SUMS [parts, tiles, 3], with SUM the loss and BY_SCALES slope times cosine and slope.
    """
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tl.arange(0, BLOCK_D)
    in_rows = rows < num_own
    in_width = features < WIDTH
    offsets = rows.to(tl.int64)[:, None] * WIDTH + features[None, :]
    own = tl.load(OWN + offsets, mask=in_rows[:, None] & in_width[None, :], other=0.0)
    own_inverse = tl.load(OWN_INVERSE + rows, mask=in_rows, other=0.0)
    own_labels = tl.load(OWN_LABELS + rows, mask=in_rows, other=-2)
    own_scale2 = own_inverse * (LOG2E / tl.load(SCALES))
    bias2 = -tl.log2(tl.load(SCALES + 1))
    gain = tl.load(GAIN)
    # What the loss makes no use of, here and of the others, the compiler drops.
    own_positive = tl.load(OWN_POSITIVE + rows, mask=in_rows, other=0.0)
    own_other = tl.load(OWN_OTHER + rows, mask=in_rows, other=0.0)
    own_lse2 = tl.load(OWN_LSE2 + rows, mask=in_rows, other=0.0)
    own_pull2 = tl.load(OWN_PULL2 + rows, mask=in_rows, other=0.0)
    loss2 = tl.zeros((BLOCK_M,), dtype=tl.float32)
    along = tl.zeros((BLOCK_M,), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    gradient = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    low = part * others_per_part
    high = tl.minimum(low + others_per_part, num_others)
    pointers = OTHERS + (low + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None] * WIDTH + features[None, :]
    for start in range(low, high, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        in_columns = columns < high
        others = tl.load(pointers, mask=in_columns[:, None] & in_width[None, :], other=0.0)
        pointers += BLOCK_N * WIDTH
        other_inverse = tl.load(OTHER_INVERSE + columns, mask=in_columns, other=0.0)
        other_labels = tl.load(OTHER_LABELS + columns, mask=in_columns, other=-1)
        other_positive = tl.load(OTHER_POSITIVE + columns, mask=in_columns, other=0.0)
        other_other = tl.load(OTHER_OTHER + columns, mask=in_columns, other=0.0)
        other_lse2 = tl.load(OTHER_LSE2 + columns, mask=in_columns, other=0.0)
        other_pull2 = tl.load(OTHER_PULL2 + columns, mask=in_columns, other=0.0)
        products = dot(own, tl.trans(others), tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), PRECISION)
        # Cosines, but for the own norm.
        products = products * other_inverse[None, :]
        # Columns past the last are left out by their bias, which costs no operation on pairs.
        x2 = products * own_scale2[:, None] + tl.where(in_columns, bias2, LEFT_OUT)[None, :]
        positive = own_labels[:, None] == other_labels[None, :]
        if EXCLUDE_SELF:
            different = rows[:, None] != columns[None, :]
            x2 = tl.where(different, x2, LEFT_OUT)
            positive = positive & different
        pair_loss2, slopes = pair_terms(
            x2, positive, own_positive, own_other, own_lse2, own_pull2,
            other_positive, other_other, other_lse2, other_pull2, LOSS, BY_OWN, BY_OTHER,
        )  # fmt: skip
        if SUM:
            loss2 += tl.sum(pair_loss2, 1)
        if BY_SCALES:
            along += tl.sum(slopes * products, 1)
            total += tl.sum(slopes, 1)
        if GRADIENT:
            scaled = slopes * (other_inverse * gain)[None, :]
            gradient = dot(scaled.to(others.dtype), others, gradient, PRECISION)
    sums = SUMS + (part * tl.num_programs(0) + tl.program_id(0)) * 3
    if SUM:
        tl.store(sums, tl.sum(tl.where(in_rows, loss2, 0.0), 0) * LN2)
    if BY_SCALES:
        tl.store(sums + 1, tl.sum(tl.where(in_rows, along * own_inverse, 0.0), 0))
        tl.store(sums + 2, tl.sum(tl.where(in_rows, total, 0.0), 0))
    if GRADIENT:
        tl.store(
            PARTS + part.to(tl.int64) * num_own * WIDTH + offsets, gradient * own_inverse[:, None],
            mask=in_rows[:, None] & in_width[None, :],
        )  # fmt: skip
