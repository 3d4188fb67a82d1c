"""The kernels of `sides`: what is known of a row before the pairs, and its gradient after them."""

import triton
import triton.language as tl

from .pairs import inverse_norm, weights


@triton.jit(do_not_specialize=["rows", "num_others"])
def rows_kernel(
    FEATURES, COUNTS, MEAN, INVERSE, ON_POSITIVE, ON_OTHER, rows, num_others, width, negatives,
    LOSS: tl.constexpr, ALL_NEGATIVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of each row its inverse norm and, from the COUNTS of its positives, the weights of its pairs."""
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
    counts = tl.load(COUNTS + own, mask=in_rows, other=0)
    on_positive, on_other = weights(counts, num_others, tl.load(MEAN), negatives, LOSS, ALL_NEGATIVES)
    tl.store(INVERSE + own, inverse_norm(squares), mask=in_rows)
    tl.store(ON_POSITIVE + own, on_positive, mask=in_rows)
    tl.store(ON_OTHER + own, on_other, mask=in_rows)


@triton.jit
def _sum_of_parts(PARTS, offsets, mask, stride, num_parts, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    total = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for part in range(0, num_parts):
        total += tl.load(PARTS + tl.cast(part, tl.int64) * stride + offsets, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["rows", "num_parts"])
def gradient_kernel(
    PARTS, FEATURES, INVERSE, SCALES, GAIN, OUT, rows, width, num_parts,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sum of PARTS [parts, rows, width], less what lies along the features: normalised rows ignore it."""
    own = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = own < rows
    first = own.to(tl.int64)[:, None] * width
    stride = tl.cast(rows, tl.int64) * width
    along = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        features = start + tl.arange(0, BLOCK_D)
        offsets = first + features[None, :]
        mask = in_rows[:, None] & (features < width)[None, :]
        total = _sum_of_parts(PARTS, offsets, mask, stride, num_parts, BLOCK_M, BLOCK_D)
        along += tl.sum(total * tl.load(FEATURES + offsets, mask=mask, other=0.0).to(tl.float32), 1)
    inverse = tl.load(INVERSE + own, mask=in_rows, other=0.0)
    along *= inverse * inverse
    factor = 1.0 / (tl.load(GAIN) * tl.load(SCALES))
    for start in range(0, width, BLOCK_D):
        features = start + tl.arange(0, BLOCK_D)
        offsets = first + features[None, :]
        mask = in_rows[:, None] & (features < width)[None, :]
        total = _sum_of_parts(PARTS, offsets, mask, stride, num_parts, BLOCK_M, BLOCK_D)
        values = tl.load(FEATURES + offsets, mask=mask, other=0.0).to(tl.float32)
        gradient = (total - along[:, None] * values) * factor
        tl.store(OUT + offsets, gradient.to(OUT.dtype.element_ty), mask=mask)
