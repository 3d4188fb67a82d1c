"""The last kernel of `skinny`: the sums over tiles and the gradients for features."""

import triton
import triton.language as tl

from .layers import at, layer_at
from .pairs import dot


@triton.jit
def _total(SUMS, num_tiles):
    total = tl.zeros((256,), dtype=tl.float32)
    for start in range(0, num_tiles, 256):
        tiles = start + tl.arange(0, 256)
        total += tl.load(SUMS + tiles * 3, mask=tiles < num_tiles, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _gradient_tile(
    OWN, OTHER, OUT, SLOPES, ALONG, OWN_INVERSE, OTHER_INVERSE, SCALES,
    tile, layer, width, num_own, num_others, along_tiles,
    OF_KEYS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M x BLOCK_D of the gradient for the features OWN; SLOPES is [anchors, keys] for both sides."""
    tiles_d = tl.cdiv(width, BLOCK_D)
    own = (tile // tiles_d) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = (tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_own = own < num_own
    in_width = features < width
    slopes_of_layer = SLOPES + layer.to(tl.int64) * num_own * num_others
    product = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(0, num_others, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        in_other = other < num_others
        inverse = tl.load(OTHER_INVERSE + layer * num_others + other, mask=in_other, other=0.0)
        if OF_KEYS:
            slopes = tl.load(
                slopes_of_layer + other.to(tl.int64)[:, None] * num_own + own[None, :],
                mask=in_other[:, None] & in_own[None, :], other=0.0,
            )  # fmt: skip
            slopes = tl.trans(slopes)
        else:
            slopes = tl.load(
                slopes_of_layer + own.to(tl.int64)[:, None] * num_others + other[None, :],
                mask=in_own[:, None] & in_other[None, :], other=0.0,
            )  # fmt: skip
        values = tl.load(
            OTHER + other.to(tl.int64)[:, None] * width + features[None, :],
            mask=in_other[:, None] & in_width[None, :], other=0.0,
        )  # fmt: skip
        slopes = slopes * inverse[None, :]
        if values.dtype == tl.float16:
            # Slopes can be below the range of float16; TF32 holds both exactly enough.
            product = dot(slopes, values.to(tl.float32), product, "tf32")
        else:
            product = dot(slopes.to(values.dtype), values, product, PRECISION)
    along = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for part in range(0, along_tiles):
        along += tl.load(ALONG + (layer * along_tiles + part) * num_own + own, mask=in_own, other=0.0)
    own_inverse = tl.load(OWN_INVERSE + layer * num_own + own, mask=in_own, other=0.0)
    offsets = own.to(tl.int64)[:, None] * width + features[None, :]
    mask = in_own[:, None] & in_width[None, :]
    values = tl.load(OWN + offsets, mask=mask, other=0.0).to(tl.float32)
    outward = own_inverse / tl.load(SCALES + layer)
    gradient = outward[:, None] * (product - (own_inverse * along)[:, None] * values)
    tl.store(OUT + offsets, gradient.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "N"])
def finish_kernel(
    anchors, keys, grad_anchors, grad_keys, widths, first_a_tile, first_k_tile,
    SLOPES, A_ALONG, K_ALONG, A_INVERSE, K_INVERSE, SUMS, SCALES, LOSSES, BY_SCALES,
    M, N, num_sums, a_along_tiles, k_along_tiles,
    L: tl.constexpr, BY_ANCHORS: tl.constexpr, BY_KEYS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a layer adds up its loss and the gradients by its scales; the others make one tile each of
    the gradients by anchors, then by keys (`first_*_tile`: where each layer's begin)."""
    program = tl.program_id(0)
    if program < L:
        sums = SUMS + program * num_sums * 3
        temperature = tl.load(SCALES + program)
        noise_ratio = tl.load(SCALES + L + program)
        tl.store(LOSSES + program, _total(sums, num_sums))
        tl.store(BY_SCALES + program, -_total(sums + 1, num_sums) / (temperature * temperature))
        tl.store(BY_SCALES + L + program, -_total(sums + 2, num_sums) / noise_ratio)
    if BY_ANCHORS:  # noqa: SIM102 (known when compiling, unlike the condition below)
        if (program >= L) & (program < first_k_tile[0]):
            layer = layer_at(first_a_tile, program, L)
            _gradient_tile(
                at(anchors, layer, L), at(keys, layer, L), at(grad_anchors, layer, L),
                SLOPES, A_ALONG, A_INVERSE, K_INVERSE, SCALES,
                program - at(first_a_tile, layer, L), layer, at(widths, layer, L), M, N, a_along_tiles,
                False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    if BY_KEYS:  # noqa: SIM102
        if program >= first_k_tile[0]:
            layer = layer_at(first_k_tile, program, L)
            _gradient_tile(
                at(keys, layer, L), at(anchors, layer, L), at(grad_keys, layer, L),
                SLOPES, K_ALONG, K_INVERSE, A_INVERSE, SCALES,
                program - at(first_k_tile, layer, L), layer, at(widths, layer, L), N, M, k_along_tiles,
                True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
