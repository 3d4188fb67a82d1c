"""The kernels of `grad_weight`: products of the gradients at some pixels and of what those pixels see.

What pixels see is not written anywhere: a tile of it is read from the map, shifted by a tap, with 0 for the
padding. A program takes several taps, which share the tile of gradients.
"""

import triton
import triton.language as tl

from .pairs import dot


@triton.jit(do_not_specialize=["batch", "images", "groups"])
def sums_kernel(
    GRAD_Y, X, SUMS, batch, images, groups, num_out, num_in,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """SUMS [parts, groups * num_out, 9, num_in], each part over `images` images."""
    tile = tl.program_id(0)
    first_tap = tile % (9 // TAPS) * TAPS
    tile //= 9 // TAPS
    tiles_c = tl.cdiv(num_in, BLOCK_C)
    tiles_o = tl.cdiv(num_out, BLOCK_O)
    group = tile // (tiles_c * tiles_o)
    outs = tile // tiles_c % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    channels = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_outs = (outs < num_out)[None, :]
    in_channels = (channels < num_in)[None, :]

    # The pointers move along, as offsets from them have 32 bits.
    part = tl.cast(tl.program_id(1), tl.int64)
    first_pixel = part * images * (HEIGHT * WIDTH)
    pixels = tl.minimum(images, batch - part * images).to(tl.int32) * (HEIGHT * WIDTH)
    slots = tl.arange(0, BLOCK_P)[:, None]
    y_row = groups * num_out
    x_row = groups * num_in
    GRAD_Y += first_pixel * y_row + group * num_out
    X += first_pixel * x_row + group * num_in
    of_y = slots * y_row + outs[None, :]
    of_x = slots * x_row + channels[None, :]
    sums = ()
    for _ in tl.static_range(TAPS):
        sums += (tl.zeros((BLOCK_O, BLOCK_C), dtype=tl.float32),)
    for start in range(0, pixels, BLOCK_P):
        pixel = start + slots
        row = pixel // WIDTH % HEIGHT
        column = pixel % WIDTH
        grad = tl.load(GRAD_Y + of_y, mask=(pixel < pixels) & in_outs, other=0.0)
        grad = tl.trans(grad)
        added = ()
        for tap in tl.static_range(TAPS):
            down = (first_tap + tap) // 3 - 1
            across = (first_tap + tap) % 3 - 1
            inside = (row + down >= 0) & (row + down < HEIGHT) & (pixel < pixels)
            inside &= (column + across >= 0) & (column + across < WIDTH)
            seen = tl.load(
                X + (down * WIDTH + across) * x_row + of_x, mask=inside & in_channels, other=0.0
            )  # fmt: skip
            added += (dot(grad, seen, sums[tap], PRECISION),)
        sums = added
        GRAD_Y += BLOCK_P * y_row
        X += BLOCK_P * x_row

    SUMS += (part * groups + group) * num_out * (9 * num_in)
    for tap in tl.static_range(TAPS):
        tl.store(
            SUMS + (outs[:, None] * 9 + first_tap + tap) * num_in + channels[None, :],
            sums[tap].to(SUMS.dtype.element_ty), mask=tl.trans(in_outs) & in_channels,
        )  # fmt: skip


@triton.jit
def total_kernel(SUMS, TOTAL, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """TOTAL [size] of SUMS [PARTS, size]."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(SUMS + part * size + places, mask=places < size, other=0.0)
    tl.store(TOTAL + places, total.to(TOTAL.dtype.element_ty), mask=places < size)
