"""The kernels of `normalisation`: maps with channels last, each program some channels of one image.

Formulas: csrc/normalisation/image.cpp. A map is processed in blocks of windows. A window is what is pooled
into one pixel, or a single pixel without pooling; a block is a tile [windows, channels] for each pixel of a
window. Windows cover a last odd row or column, too, but have no pixel in the pooled map there. Every map is
gone through twice, first for sums. What fits one block is read once: the compiler merges equal reads, as it
does equal terms.
"""

import triton
import triton.language as tl


@triton.jit
def _own(C, BLOCK_C: tl.constexpr):
    """The image and channels of this program; neighbouring channels are processed at the same time."""
    blocks = tl.cdiv(C, BLOCK_C)
    image = tl.program_id(0) // blocks
    return image.to(tl.int64), tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _inside(start, k: tl.constexpr, ACROSS: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
            POOL: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Where pixel k of each window from `start` on is in the map, and whether; a row has ACROSS windows."""
    windows = start + tl.arange(0, BLOCK)
    row = windows // ACROSS * POOL + k // POOL
    column = windows % ACROSS * POOL + k % POOL
    # EXACT: the blocks cover the map and no more.
    inside = tl.full((BLOCK,), True, tl.int1) if EXACT else (row < H) & (column < W)
    return row * W + column, inside


@triton.jit
def _read(MAP, start, channels, C, ACROSS: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
          POOL: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A tile for each pixel of a window; 0 outside."""
    tiles = ()
    for k in tl.static_range(POOL * POOL):
        pixels, inside = _inside(start, k, ACROSS, H, W, POOL, EXACT, BLOCK)
        tile = tl.load(
            MAP + pixels[:, None] * C + channels[None, :],
            mask=inside[:, None] & (channels < C)[None, :], other=0.0,
        )  # fmt: skip
        tiles += (tile.to(tl.float32),)
    return tiles


@triton.jit
def _read_grad_out(GRAD_OUT, start, channels, C, ACROSS: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
                POOL: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The gradient of each pixel of a window before pooling; 0 where a window is not whole."""
    (grad,) = _read(GRAD_OUT, start, channels, C, ACROSS, H // POOL, W // POOL, 1, EXACT, BLOCK)
    return grad * (1.0 / (POOL * POOL))


@triton.jit
def _write(MAP, tile, start, k: tl.constexpr, channels, C, ACROSS: tl.constexpr, H: tl.constexpr,
           W: tl.constexpr, POOL: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    pixels, inside = _inside(start, k, ACROSS, H, W, POOL, EXACT, BLOCK)
    tl.store(
        MAP + pixels[:, None] * C + channels[None, :], tile.to(MAP.dtype.element_ty),
        mask=inside[:, None] & (channels < C)[None, :],
    )  # fmt: skip


@triton.jit
def _pixels_before(window, ACROSS: tl.constexpr, H: tl.constexpr, W: tl.constexpr, POOL: tl.constexpr):
    """How many pixels the windows before this one have."""
    row = tl.minimum(window // ACROSS * POOL, H)
    return row * W + tl.minimum(POOL, H - row) * tl.minimum(window % ACROSS * POOL, W)


@triton.jit
def _per_channel(VALUES, image, channels, C):
    return tl.load(VALUES + image * C + channels, mask=channels < C, other=0.0)


@triton.jit
def _affine(centred, scale, bias):
    return centred * scale[None, :] + bias[None, :]


@triton.jit
def _through(grad, centred, scale, bias, RELU: tl.constexpr):
    """The gradient of the ReLU's input; not-a-number passes, as in torch's."""
    if RELU:
        grad = tl.where(_affine(centred, scale, bias) <= 0, 0.0, grad)
    return grad


@triton.jit
def forward_kernel(
    X, WEIGHT, BIAS, OUT, MEAN, RSTD, C, eps,
    H: tl.constexpr, W: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, EXACT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The output, and the mean and inverse deviation of every channel."""
    ACROSS: tl.constexpr = (W + POOL - 1) // POOL
    WINDOWS: tl.constexpr = (H + POOL - 1) // POOL * ACROSS
    image, channels = _own(C, BLOCK_C)
    X += image * C * (H * W)
    OUT += image * C * ((H // POOL) * (W // POOL))
    mean = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)  # of the distances to the mean
    for start in range(0, WINDOWS, BLOCK):
        tiles = _read(X, start, channels, C, ACROSS, H, W, POOL, EXACT, BLOCK)
        total = tl.zeros((BLOCK, BLOCK_C), tl.float32)
        for k in tl.static_range(POOL * POOL):
            total += tiles[k]
        before = _pixels_before(start, ACROSS, H, W, POOL)
        after = _pixels_before(tl.minimum(start + BLOCK, WINDOWS), ACROSS, H, W, POOL)
        here = tl.sum(total, 0) / (after - before)
        total = tl.zeros((BLOCK, BLOCK_C), tl.float32)
        for k in tl.static_range(POOL * POOL):
            _, inside = _inside(start, k, ACROSS, H, W, POOL, EXACT, BLOCK)
            centred = tl.where(inside[:, None], tiles[k] - here[None, :], 0.0)
            total += centred * centred
        # The means and sums of squares of two parts become those of both.
        step = here - mean
        share = (after - before) / after
        mean += step * share
        squares += tl.sum(total, 0) + step * step * (before * share)
    rstd = 1.0 / tl.sqrt(squares / (H * W) + eps)
    scale = _per_channel(WEIGHT, 0, channels, C) * rstd
    bias = _per_channel(BIAS, 0, channels, C)
    for start in range(0, WINDOWS, BLOCK):
        tiles = _read(X, start, channels, C, ACROSS, H, W, POOL, EXACT, BLOCK)
        total = tl.zeros((BLOCK, BLOCK_C), tl.float32)
        for k in tl.static_range(POOL * POOL):
            value = _affine(tiles[k] - mean[None, :], scale, bias)
            if RELU:
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            total += value
        total *= 1.0 / (POOL * POOL)
        _write(OUT, total, start, 0, channels, C, ACROSS, H // POOL, W // POOL, 1, EXACT, BLOCK)
    tl.store(MEAN + image * C + channels, mean, mask=channels < C)
    tl.store(RSTD + image * C + channels, rstd, mask=channels < C)


@triton.jit
def backward_kernel(
    GRAD_OUT, X, WEIGHT, BIAS, MEAN, RSTD, GRAD_X, GRAD_WEIGHT, GRAD_BIAS, C,
    H: tl.constexpr, W: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, EXACT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of x and, image by image, those of weight and bias."""
    ACROSS: tl.constexpr = (W + POOL - 1) // POOL
    WINDOWS: tl.constexpr = (H + POOL - 1) // POOL * ACROSS
    image, channels = _own(C, BLOCK_C)
    X += image * C * (H * W)
    GRAD_X += image * C * (H * W)
    GRAD_OUT += image * C * ((H // POOL) * (W // POOL))
    mean = _per_channel(MEAN, image, channels, C)
    rstd = _per_channel(RSTD, image, channels, C)
    scale = _per_channel(WEIGHT, 0, channels, C) * rstd
    bias = _per_channel(BIAS, 0, channels, C)
    d_tile = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    dn_tile = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for start in range(0, WINDOWS, BLOCK):
        tiles = _read(X, start, channels, C, ACROSS, H, W, POOL, EXACT, BLOCK)
        grad = _read_grad_out(GRAD_OUT, start, channels, C, ACROSS, H, W, POOL, EXACT, BLOCK)
        for k in tl.static_range(POOL * POOL):
            centred = tiles[k] - mean[None, :]
            d = _through(grad, centred, scale, bias, RELU)
            d_tile += d
            dn_tile += d * centred
    d_sum = tl.sum(d_tile, 0)
    dn_sum = tl.sum(dn_tile, 0) * rstd
    constant = scale * d_sum / (H * W)
    along = scale * rstd * dn_sum / (H * W)
    for start in range(0, WINDOWS, BLOCK):
        tiles = _read(X, start, channels, C, ACROSS, H, W, POOL, EXACT, BLOCK)
        grad = _read_grad_out(GRAD_OUT, start, channels, C, ACROSS, H, W, POOL, EXACT, BLOCK)
        for k in tl.static_range(POOL * POOL):
            centred = tiles[k] - mean[None, :]
            d = _through(grad, centred, scale, bias, RELU)
            grad_x = d * scale[None, :] - constant[None, :] - centred * along[None, :]
            _write(GRAD_X, grad_x, start, k, channels, C, ACROSS, H, W, POOL, EXACT, BLOCK)
    tl.store(GRAD_WEIGHT + image * C + channels, dn_sum, mask=channels < C)
    tl.store(GRAD_BIAS + image * C + channels, d_sum, mask=channels < C)


@triton.jit
def backward_twice_kernel(
    GRAD_GRAD_X, GRAD_GRAD_WEIGHT, GRAD_GRAD_BIAS, GRAD_OUT, X, WEIGHT, BIAS, MEAN, RSTD,
    GRAD_GRAD_OUT, GRAD_X, GRAD_WEIGHT, C,
    H: tl.constexpr, W: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, EXACT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients through `backward_kernel`: of GRAD_OUT, of x and, image by image, of weight.

    With c = along_d d + along_u u, the gradient of x is r P(c) - w r^2 S n / N.
    """
    ACROSS: tl.constexpr = (W + POOL - 1) // POOL
    WINDOWS: tl.constexpr = (H + POOL - 1) // POOL * ACROSS
    image, channels = _own(C, BLOCK_C)
    X += image * C * (H * W)
    GRAD_GRAD_X += image * C * (H * W)
    GRAD_X += image * C * (H * W)
    GRAD_OUT += image * C * ((H // POOL) * (W // POOL))
    GRAD_GRAD_OUT += image * C * ((H // POOL) * (W // POOL))
    mean = _per_channel(MEAN, image, channels, C)
    rstd = _per_channel(RSTD, image, channels, C)
    scale = _per_channel(WEIGHT, 0, channels, C) * rstd
    bias = _per_channel(BIAS, 0, channels, C)
    d_tile = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    dn_tile = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    u_tile = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    un_tile = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    ud_tile = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for start in range(0, WINDOWS, BLOCK):
        tiles = _read(X, start, channels, C, ACROSS, H, W, POOL, EXACT, BLOCK)
        grad_grad_x = _read(GRAD_GRAD_X, start, channels, C, ACROSS, H, W, POOL, EXACT, BLOCK)
        grad = _read_grad_out(GRAD_OUT, start, channels, C, ACROSS, H, W, POOL, EXACT, BLOCK)
        for k in tl.static_range(POOL * POOL):
            centred = tiles[k] - mean[None, :]
            d = _through(grad, centred, scale, bias, RELU)
            d_tile += d
            dn_tile += d * centred
            u_tile += grad_grad_x[k]
            un_tile += grad_grad_x[k] * centred
            ud_tile += grad_grad_x[k] * d
    d_sum = tl.sum(d_tile, 0)
    dn_sum = tl.sum(dn_tile, 0) * rstd
    u_sum = tl.sum(u_tile, 0)
    un_sum = tl.sum(un_tile, 0) * rstd
    product = tl.sum(ud_tile, 0) - (d_sum * u_sum + dn_sum * un_sum) / (H * W)
    along_u = -scale * dn_sum / (H * W)
    along_d = _per_channel(GRAD_GRAD_WEIGHT, image, channels, C) - scale * un_sum / (H * W)
    x_constant = rstd * (along_d * d_sum + along_u * u_sum) / (H * W)
    x_along = rstd * rstd * (along_d * dn_sum + along_u * un_sum + scale * product) / (H * W)
    grad_constant = _per_channel(GRAD_GRAD_BIAS, image, channels, C) - scale * u_sum / (H * W)
    along_u *= rstd
    along_d *= rstd
    for start in range(0, WINDOWS, BLOCK):
        tiles = _read(X, start, channels, C, ACROSS, H, W, POOL, EXACT, BLOCK)
        grad_grad_x = _read(GRAD_GRAD_X, start, channels, C, ACROSS, H, W, POOL, EXACT, BLOCK)
        grad = _read_grad_out(GRAD_OUT, start, channels, C, ACROSS, H, W, POOL, EXACT, BLOCK)
        total = tl.zeros((BLOCK, BLOCK_C), tl.float32)
        for k in tl.static_range(POOL * POOL):
            centred = tiles[k] - mean[None, :]
            d = _through(grad, centred, scale, bias, RELU)
            grad_x = d * along_d[None, :] + grad_grad_x[k] * along_u[None, :]
            grad_x -= x_constant[None, :] + centred * x_along[None, :]
            _write(GRAD_X, grad_x, start, k, channels, C, ACROSS, H, W, POOL, EXACT, BLOCK)
            grad_d = grad_grad_x[k] * scale[None, :] + centred * along_d[None, :] + grad_constant[None, :]
            total += _through(grad_d, centred, scale, bias, RELU)
        total *= 1.0 / (POOL * POOL)
        _write(GRAD_GRAD_OUT, total, start, 0, channels, C, ACROSS, H // POOL, W // POOL, 1, EXACT, BLOCK)
    tl.store(GRAD_WEIGHT + image * C + channels, rstd * product, mask=channels < C)
