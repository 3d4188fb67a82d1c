"""The kernels of `first_block`: one program works on BLOCK_C channels of one image.

Tiles have channels as rows and pixels as columns: what belongs to a channel is then the same along a row, and
the gradient of the convolution's output is the left operand of the next product, without leaving registers.
"""

import triton
import triton.language as tl

from .pairs import dot

# A row of the image plus this lies outside.
FAR = tl.constexpr(1 << 16)
STEEP = tl.constexpr(2.0**60)


@triton.jit
def _weights(
    TAPS, channels, tap_row, tap_column, DTYPE: tl.constexpr, IN: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    taps = tl.arange(0, BLOCK_K)
    return tl.load(
        TAPS + channels[:, None] * tap_column + taps[None, :] * tap_row,
        mask=(taps < 9 * IN)[None, :], other=0.0,
    ).to(DTYPE)  # fmt: skip


@triton.jit
def _operands(
    X, TAPS, per_group, x_image, x_channel, x_row, x_column, tap_row, tap_column,
    IN: tl.constexpr, PADDING: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The program's channels, its weights [BLOCK_C, BLOCK_K], and for each tap [BLOCK_K, 1] the address, row
    and column in x that pixel (0, 0) of the convolution's map sees, and what is seen outside of x.

    After the taps comes one that always sees 1, with weight 0: its products are sums.
    """
    first = tl.program_id(1) * BLOCK_C
    channels = first + tl.arange(0, BLOCK_C)
    weights = _weights(TAPS, channels, tap_row, tap_column, X.dtype.element_ty, IN, BLOCK_K)
    taps = tl.arange(0, BLOCK_K)
    real = taps < 9 * IN
    row = taps // 3 % 3 - PADDING
    column = taps % 3 - PADDING
    channel = tl.where(real, taps // 9, 0) + first // per_group * IN
    image = X + tl.cast(tl.program_id(0), tl.int64) * x_image
    address = image + channel.to(tl.int64) * x_channel + row * x_row + column * x_column
    row = tl.where(real, row, FAR)
    outside = tl.where(taps == 9 * IN, 1.0, 0.0).to(X.dtype.element_ty)
    return channels, weights, address[:, None], row[:, None], column[:, None], outside[:, None]


@triton.jit
def _convolved(
    weights, address, tap_row, tap_column, outside, row, column, x_row, x_column,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the pixels of a row and column each see, [BLOCK_K, BLOCK_P], and the convolution's output there,
    [BLOCK_C, BLOCK_P]; outside the convolution's map taps see nothing but the one that always sees 1.
    """
    offsets = row * x_row + column * x_column
    in_row = tl.where((row < DOWN) & (column < ACROSS), row, FAR)[None, :] + tap_row
    in_column = column[None, :] + tap_column
    inside = (in_row >= 0) & (in_row < HEIGHT) & (in_column >= 0) & (in_column < WIDTH)
    patches = tl.load(address + offsets[None, :], mask=inside, other=outside)
    nothing = tl.zeros((weights.shape[0], row.shape[0]), dtype=tl.float32)
    return patches, dot(weights, patches, nothing, PRECISION)


@triton.jit
def _positive_part(value):
    """The ReLU; not-a-number passes, as in torch's."""
    return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _line(SCALE, BIAS, channels, mean, rstd):
    """The factor and summand, [BLOCK_C, 1] each, that turn the convolution's output into the ReLU's input."""
    factor = tl.load(SCALE + channels) * rstd
    return factor[:, None], (tl.load(BIAS + channels) - mean * factor)[:, None]


@triton.jit
def _gradients(GRAD_OUT, row, column, channels, num_channels, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """The gradients of the output's cells at these rows and columns, [BLOCK_C, BLOCK_P]; 0 outside."""
    inside = (row < DOWN) & (column < ACROSS)
    cells = tl.where(inside, row * ACROSS + column, 0)
    image = GRAD_OUT + tl.cast(tl.program_id(0), tl.int64) * (DOWN * ACROSS) * num_channels
    return tl.load(
        image + channels[:, None] + (cells * num_channels)[None, :], mask=inside[None, :], other=0.0
    )


@triton.jit(do_not_specialize=["per_group", "x_image", "x_channel", "x_row", "tap_row", "tap_column"])
def forward_kernel(
    X, TAPS, SCALE, BIAS, OUT, MEAN, RSTD, eps, num_channels, per_group,
    x_image, x_channel, x_row, x_column, tap_row, tap_column,
    IN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
    PADDING: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """OUT [batch, cells, num_channels]; MEAN and RSTD [batch, num_channels]."""
    channels, weights, address, row_of_tap, column_of_tap, outside = _operands(
        X, TAPS, per_group, x_image, x_channel, x_row, x_column, tap_row, tap_column,
        IN, PADDING, BLOCK_K, BLOCK_C,
    )  # fmt: skip
    NUM_PIXELS: tl.constexpr = DOWN * ACROSS
    slots = tl.arange(0, BLOCK_P)
    # The variance is taken around the mean of some pixels: it must be no small difference of large numbers.
    # That mean is the weight of the tap that always sees 1, so the product subtracts it; it is rounded to be
    # the same number in TF32 and bfloat16.
    pixels = slots * (NUM_PIXELS // BLOCK_P | 1) % NUM_PIXELS
    _, y = _convolved(
        weights, address, row_of_tap, column_of_tap, outside, pixels // ACROSS, pixels % ACROSS,
        x_row, x_column, HEIGHT, WIDTH, DOWN, ACROSS, PRECISION,
    )  # fmt: skip
    middle = (tl.sum(y, 1) / BLOCK_P).to(tl.bfloat16).to(tl.float32)
    is_one = (tl.arange(0, BLOCK_K) == 9 * IN)[None, :]
    off_middle = tl.where(is_one, -middle[:, None], weights.to(tl.float32)).to(weights.dtype)
    # Every slot of the tile has its own sums, since operations across lanes are slow.
    seen = tl.zeros((BLOCK_K, BLOCK_P), dtype=tl.float32)
    squares = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    for start in range(0, NUM_PIXELS, BLOCK_P):
        pixels = start + slots
        patches, y = _convolved(
            off_middle, address, row_of_tap, column_of_tap, outside, pixels // ACROSS, pixels % ACROSS,
            x_row, x_column, HEIGHT, WIDTH, DOWN, ACROSS, PRECISION,
        )  # fmt: skip
        if NUM_PIXELS % BLOCK_P:
            y = tl.where((pixels < NUM_PIXELS)[None, :], y, 0.0)
        seen += patches.to(tl.float32)
        squares += y * y
    mean = tl.sum(weights.to(tl.float32) * tl.sum(seen, 1)[None, :], 1) / NUM_PIXELS
    away = mean - middle
    variance = _positive_part(tl.sum(squares, 1) / NUM_PIXELS - away * away)
    rstd = 1.0 / tl.sqrt(variance + eps)
    first = tl.cast(tl.program_id(0), tl.int64) * num_channels
    tl.store(MEAN + first + channels, mean)
    tl.store(RSTD + first + channels, rstd)

    factor, summand = _line(SCALE, BIAS, channels, mean, rstd)
    # The mean over a window is the sum of its pixels, each divided by their number.
    factor *= 1.0 / (POOL * POOL)
    summand *= 1.0 / (POOL * POOL)
    CELLS_ACROSS: tl.constexpr = ACROSS // POOL
    NUM_CELLS: tl.constexpr = DOWN // POOL * CELLS_ACROSS
    image = OUT + first * NUM_CELLS
    for start in range(0, NUM_CELLS, BLOCK_P):
        cells = start + slots
        row = cells // CELLS_ACROSS * POOL
        column = cells % CELLS_ACROSS * POOL
        out = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
        for place in range(0, POOL * POOL):
            _, y = _convolved(
                weights, address, row_of_tap, column_of_tap, outside,
                row + place // POOL, column + place % POOL, x_row, x_column,
                HEIGHT, WIDTH, DOWN, ACROSS, PRECISION,
            )  # fmt: skip
            y = y * factor + summand
            out += _positive_part(y) if RELU else y
        tl.store(
            image + channels[:, None] + (cells * num_channels)[None, :], out.to(OUT.dtype.element_ty),
            mask=(cells < NUM_CELLS)[None, :],
        )  # fmt: skip


@triton.jit(do_not_specialize=["per_group", "x_image", "x_channel", "x_row", "tap_row", "tap_column"])
def backward_kernel(
    GRAD_OUT, X, TAPS, SCALE, BIAS, MEAN, RSTD, GRAD_TAPS, GRAD_SCALE, GRAD_BIAS, num_channels, per_group,
    x_image, x_channel, x_row, x_column, tap_row, tap_column,
    IN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
    PADDING: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """GRAD_TAPS [batch, taps, num_channels]; GRAD_SCALE and GRAD_BIAS [batch, num_channels]."""
    channels, weights, address, row_of_tap, column_of_tap, outside = _operands(
        X, TAPS, per_group, x_image, x_channel, x_row, x_column, tap_row, tap_column,
        IN, PADDING, BLOCK_K, BLOCK_C,
    )  # fmt: skip
    first = tl.cast(tl.program_id(0), tl.int64) * num_channels
    mean = tl.load(MEAN + first + channels)
    rstd = tl.load(RSTD + first + channels)
    factor, summand = _line(SCALE, BIAS, channels, mean, rstd)
    # A last odd row or column makes windows that stick out: their gradient is 0.
    WINDOWS_ACROSS: tl.constexpr = (ACROSS + POOL - 1) // POOL
    NUM_WINDOWS: tl.constexpr = (DOWN + POOL - 1) // POOL * WINDOWS_ACROSS
    slots = tl.arange(0, BLOCK_P)
    if RELU:
        # A steep line clamped to 0 and 1 is a step: one instruction, and it takes no predicate registers.
        step_factor = factor * STEEP
        step_summand = summand * STEEP
    # The sums of what each tap sees: as it is, times the gradient d before the ReLU, and times the
    # convolution's output y. As y is linear in what its taps see, the sum of d y follows from these: one pass
    # is enough.
    seen = tl.zeros((BLOCK_K, BLOCK_P), dtype=tl.float32)
    seen_d = tl.zeros((BLOCK_C, BLOCK_K), dtype=tl.float32)
    seen_y = tl.zeros((BLOCK_C, BLOCK_K), dtype=tl.float32)
    for start in range(0, NUM_WINDOWS, BLOCK_P):
        row = (start + slots) // WINDOWS_ACROSS
        column = (start + slots) % WINDOWS_ACROSS
        grad = _gradients(GRAD_OUT, row, column, channels, num_channels, DOWN // POOL, ACROSS // POOL)
        for place in range(0, POOL * POOL):
            patches, y = _convolved(
                weights, address, row_of_tap, column_of_tap, outside,
                row * POOL + place // POOL, column * POOL + place % POOL, x_row, x_column,
                HEIGHT, WIDTH, DOWN, ACROSS, PRECISION,
            )  # fmt: skip
            seen += patches.to(tl.float32)
            d = grad * tl.clamp(y * step_factor + step_summand, 0.0, 1.0) if RELU else grad
            patches = tl.trans(patches)
            seen_d = dot(d.to(patches.dtype), patches, seen_d, PRECISION)
            seen_y = dot(y.to(patches.dtype), patches, seen_y, PRECISION)
    seen_d *= 1.0 / (POOL * POOL)
    taps = tl.arange(0, BLOCK_K)
    grad_bias = tl.sum(tl.where((taps == 9 * IN)[None, :], seen_d, 0.0), 1)
    tl.store(GRAD_BIAS + first + channels, grad_bias)
    grad_scale = rstd * (tl.sum(weights.to(tl.float32) * seen_d, 1) - mean * grad_bias)
    tl.store(GRAD_SCALE + first + channels, grad_scale)

    # With scale r (d - mean(d) - n mean(d n)) in place of d.
    on_y = -grad_scale * rstd / (DOWN * ACROSS)
    on_one = -grad_bias / (DOWN * ACROSS) - on_y * mean
    grad_taps = factor * (seen_d + seen_y * on_y[:, None] + on_one[:, None] * tl.sum(seen, 1)[None, :])
    tl.store(
        GRAD_TAPS + first * (9 * IN) + channels[:, None] + (taps * num_channels)[None, :], grad_taps,
        mask=(taps < 9 * IN)[None, :],
    )  # fmt: skip
