"""Few pairs, many features: the sizes of distillation, where launches are the cost.

The logits are smaller than the keys, so they may be scratch. Three launches, four for InfoNCE, whatever the
number of layers, and both gradients with them:

    dots    products and squares of rows, the features split over programs; label counts
    sums    (InfoNCE) log-sum-exp of rows and columns
    pairs   norms, loss, derivative by each logit
    finish  the gradients by features, as products with an epilogue; sums over tiles

With c the cosine, g = dL/dx and q_i = sum_j g_ij c_ij, the gradient through the normalisation is
dA = (1/|a|t) (G K/|k|) - (q/t|a|^2) A: no sum over features beside the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from mim4dd.reference import Objective, saved_dtype

from . import launch
from .launch import Tile, choose, dot_precision, precision_of
from .pairs import LN2, LOG2E, count_equal, dot, inverse_norm, pair_terms, row_products, weights


@triton.jit
def _pick(values, first, index, L: tl.constexpr):
    """values[l] of the last layer l with first[l] <= index."""
    value = values[0]
    for layer in tl.static_range(1, L):
        value = tl.where(index >= first[layer], values[layer], value)
    return value


@triton.jit
def _at(values, index, L: tl.constexpr):
    """The element of a tuple at an index known at run time."""
    value = values[0]
    for layer in tl.static_range(1, L):
        value = tl.where(index == layer, values[layer], value)
    return value


@triton.jit
def _layer(first, index, L: tl.constexpr):
    """The last layer l with first[l] <= index."""
    value = 0
    for layer in tl.static_range(1, L):
        value = tl.where(index >= first[layer], layer, value)
    return value


@triton.jit(do_not_specialize=["M", "N"])
def dots_kernel(
    anchors, keys, widths, first_slot, ANCHOR_LABELS, KEY_LABELS,
    PRODUCTS, A_SQUARES, K_SQUARES, A_COUNTS, K_COUNTS,
    M, N, split,
    L: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Slot s of a layer sums features [s split, (s + 1) split): PRODUCTS [slots, M, N], *_SQUARES [slots, *]."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    slot = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < M
    in_columns = columns < N
    A = _pick(anchors, first_slot, slot, L)
    K = _pick(keys, first_slot, slot, L)
    width = _pick(widths, first_slot, slot, L)
    low = (slot - _pick(first_slot, first_slot, slot, L)) * split
    products, a_squares, k_squares = row_products(
        A, K, rows, columns, in_rows, in_columns, width, low, tl.minimum(low + split, width),
        True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    pairs = rows.to(tl.int64)[:, None] * N + columns[None, :]
    base = slot.to(tl.int64) * M * N
    tl.store(PRODUCTS + base + pairs, products, mask=in_rows[:, None] & in_columns[None, :])
    if tile_n == 0:
        tl.store(A_SQUARES + slot * M + rows, a_squares, mask=in_rows)
        if slot == 0:
            labels = tl.load(ANCHOR_LABELS + rows, mask=in_rows, other=0)
            tl.store(A_COUNTS + rows, count_equal(labels, KEY_LABELS, N, 32), mask=in_rows)
    if tile_m == 0:
        tl.store(K_SQUARES + slot * N + columns, k_squares, mask=in_columns)
        if slot == 0:
            labels = tl.load(KEY_LABELS + columns, mask=in_columns, other=0)
            tl.store(K_COUNTS + columns, count_equal(labels, ANCHOR_LABELS, M, 32), mask=in_columns)


@triton.jit
def _inverse_norms(SQUARES, rows, in_rows, length, slot_low, slot_high, BLOCK: tl.constexpr):
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in range(slot_low, slot_high):
        squares += tl.load(SQUARES + slot * length + rows, mask=in_rows, other=0.0)
    return inverse_norm(squares)


@triton.jit
def _logits2(
    PRODUCTS, rows, columns, mask, a_inverse, k_inverse, M, N, slot_low, slot_high, SCALES, layer,
    L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Cosines and critic logits in base 2 of a tile, its slots summed in their order."""
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    for slot in range(slot_low, slot_high):
        products += tl.load(PRODUCTS + tl.cast(slot, tl.int64) * M * N + offsets, mask=mask, other=0.0)
    cosines = products * a_inverse[:, None] * k_inverse[None, :]
    temperature = tl.load(SCALES + layer)
    noise_ratio = tl.load(SCALES + L + layer)
    return cosines, cosines * (LOG2E / temperature) - tl.log2(noise_ratio)


@triton.jit
def _log_sum_exp2(
    PRODUCTS, A_SQUARES, K_SQUARES, SCALES, LSE2, tile, M, N, slot_low, slot_high, layer,
    OF_KEYS: tl.constexpr, L: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of OWN anchors over all keys, or OF_KEYS the other way round, stored to LSE2 [L, *]."""
    num_own = N if OF_KEYS else M
    num_others = M if OF_KEYS else N
    OWN_SQUARES = K_SQUARES if OF_KEYS else A_SQUARES
    OTHER_SQUARES = A_SQUARES if OF_KEYS else K_SQUARES
    own = tile * OWN + tl.arange(0, OWN)
    in_own = own < num_own
    own_inverse = _inverse_norms(OWN_SQUARES, own, in_own, num_own, slot_low, slot_high, OWN)
    largest = tl.full((OWN,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((OWN,), dtype=tl.float32)
    for start in range(0, num_others, OTHER):
        other = start + tl.arange(0, OTHER)
        in_other = other < num_others
        other_inverse = _inverse_norms(OTHER_SQUARES, other, in_other, num_others, slot_low, slot_high, OTHER)
        if OF_KEYS:
            _, x2 = _logits2(
                PRODUCTS, other, own, in_other[:, None] & in_own[None, :], other_inverse, own_inverse,
                M, N, slot_low, slot_high, SCALES, layer, L, OTHER, OWN,
            )  # fmt: skip
            x2 = tl.trans(x2)
        else:
            _, x2 = _logits2(
                PRODUCTS, own, other, in_own[:, None] & in_other[None, :], own_inverse, other_inverse,
                M, N, slot_low, slot_high, SCALES, layer, L, OWN, OTHER,
            )  # fmt: skip
        x2 = tl.where(in_other[None, :], x2, float("-inf"))
        larger = tl.maximum(largest, tl.max(x2, 1))
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(x2 - larger[:, None]), 1)
        largest = larger
    tl.store(LSE2 + layer * num_own + own, largest + tl.log2(total), mask=in_own)


@triton.jit
def _mean_over_positives(COUNTS, length):
    """1 / rows that have a positive."""
    having = tl.zeros((1024,), dtype=tl.int32)
    for start in range(0, length, 1024):
        rows = start + tl.arange(0, 1024)
        having += (tl.load(COUNTS + rows, mask=rows < length, other=0) > 0).to(tl.int32)
    return 1.0 / tl.maximum(tl.sum(having, 0), 1).to(tl.float32)


@triton.jit(do_not_specialize=["M", "N"])
def sums_kernel(
    PRODUCTS, A_SQUARES, K_SQUARES, A_COUNTS, K_COUNTS, SCALES, first_slot, num_slots,
    A_LSE2, K_LSE2, MEANS, M, N,
    L: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (base 2) of each anchor over the keys: A_LSE2 [L, M]; with programs past those of the
    anchors also of each key over the anchors: K_LSE2 [L, N]. The first program finds MEANS [2]."""
    tile = tl.program_id(0)
    layer = tl.program_id(1)
    low = _at(first_slot, layer, L)
    high = low + _at(num_slots, layer, L)
    tiles_m = tl.cdiv(M, OWN)
    if (tile == 0) & (layer == 0):
        tl.store(MEANS, _mean_over_positives(A_COUNTS, M))
        tl.store(MEANS + 1, _mean_over_positives(K_COUNTS, N))
    if tile < tiles_m:
        _log_sum_exp2(
            PRODUCTS, A_SQUARES, K_SQUARES, SCALES, A_LSE2, tile, M, N, low, high, layer, False, L, OWN, OTHER
        )
    else:
        _log_sum_exp2(
            PRODUCTS, A_SQUARES, K_SQUARES, SCALES, K_LSE2, tile - tiles_m, M, N, low, high, layer,
            True, L, OWN, OTHER,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "N"])
def pairs_kernel(
    PRODUCTS, A_SQUARES, K_SQUARES, A_COUNTS, K_COUNTS, A_LSE2, K_LSE2, MEANS, SCALES,
    ANCHOR_LABELS, KEY_LABELS, first_slot, num_slots,
    SLOPES, A_ALONG, K_ALONG, A_INVERSE, K_INVERSE, SUMS, M, N, negatives,
    L: tl.constexpr, NCE: tl.constexpr, SYMMETRIC: tl.constexpr, ALL_NEGATIVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """SLOPES [L, M, N] dL/dx; of each tile its sums by row A_ALONG [L, tiles, M] and column K_ALONG of slope
    times cosine, and SUMS [L, tiles, 3] of loss, slope times cosine, slope; the inverse norms."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    layer = tl.program_id(1)
    low = _at(first_slot, layer, L)
    high = low + _at(num_slots, layer, L)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < M
    in_columns = columns < N
    valid = in_rows[:, None] & in_columns[None, :]
    a_inverse = _inverse_norms(A_SQUARES, rows, in_rows, M, low, high, BLOCK_M)
    k_inverse = _inverse_norms(K_SQUARES, columns, in_columns, N, low, high, BLOCK_N)
    cosines, x2 = _logits2(
        PRODUCTS, rows, columns, valid, a_inverse, k_inverse, M, N, low, high, SCALES, layer,
        L, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if NCE:
        a_mean = 1.0 / M
        k_mean = 1.0 / N
        a_lse2 = a_inverse
        k_lse2 = k_inverse
    else:
        a_mean = tl.load(MEANS)
        k_mean = tl.load(MEANS + 1)
        a_lse2 = tl.load(A_LSE2 + layer * M + rows, mask=in_rows, other=0.0)
        k_lse2 = a_lse2
        if SYMMETRIC:
            k_lse2 = tl.load(K_LSE2 + layer * N + columns, mask=in_columns, other=0.0)
    a_counts = tl.load(A_COUNTS + rows, mask=in_rows, other=0)
    k_counts = tl.load(K_COUNTS + columns, mask=in_columns, other=0)
    a_positive, a_other = weights(a_counts, N, a_mean, negatives, NCE, ALL_NEGATIVES)
    k_positive, k_other = weights(k_counts, M, k_mean, negatives, NCE, ALL_NEGATIVES)
    a_labels = tl.load(ANCHOR_LABELS + rows, mask=in_rows, other=0)
    k_labels = tl.load(KEY_LABELS + columns, mask=in_columns, other=0)
    loss2, slopes = pair_terms(
        x2, a_labels[:, None] == k_labels[None, :], valid,
        a_positive, a_other, a_lse2, k_positive, k_other, k_lse2, NCE, SYMMETRIC,
    )  # fmt: skip
    along = slopes * cosines
    base = layer.to(tl.int64) * M * N
    tl.store(SLOPES + base + rows.to(tl.int64)[:, None] * N + columns[None, :], slopes, mask=valid)
    tl.store(A_ALONG + (layer * tiles_n + tile_n) * M + rows, tl.sum(along, 1), mask=in_rows)
    tl.store(K_ALONG + (layer * tiles_m + tile_m) * N + columns, tl.sum(along, 0), mask=in_columns)
    if tile_n == 0:
        tl.store(A_INVERSE + layer * M + rows, a_inverse, mask=in_rows)
    if tile_m == 0:
        tl.store(K_INVERSE + layer * N + columns, k_inverse, mask=in_columns)
    sums = SUMS + (layer * tiles_m * tiles_n + tl.program_id(0)) * 3
    tl.store(sums, tl.sum(tl.sum(loss2, 1), 0) * LN2)
    tl.store(sums + 1, tl.sum(tl.sum(along, 1), 0))
    tl.store(sums + 2, tl.sum(tl.sum(slopes, 1), 0))


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
    """BLOCK_M x BLOCK_D of the gradient by the features OWN; SLOPES is [anchors, keys] for both sides."""
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
    gradient = outward[:, None] * product - (outward * own_inverse * along)[:, None] * values
    tl.store(OUT + offsets, gradient.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "N"])
def finish_kernel(
    anchors, keys, by_anchors, by_keys, widths, first_a_tile, first_k_tile,
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
    if BY_ANCHORS:
        if (program >= L) & (program < first_k_tile[0]):
            layer = _layer(first_a_tile, program, L)
            _gradient_tile(
                _at(anchors, layer, L), _at(keys, layer, L), _at(by_anchors, layer, L),
                SLOPES, A_ALONG, A_INVERSE, K_INVERSE, SCALES,
                program - _at(first_a_tile, layer, L), layer, _at(widths, layer, L), M, N, a_along_tiles,
                False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    if BY_KEYS:
        if program >= first_k_tile[0]:
            layer = _layer(first_k_tile, program, L)
            _gradient_tile(
                _at(keys, layer, L), _at(anchors, layer, L), _at(by_keys, layer, L),
                SLOPES, K_ALONG, K_INVERSE, A_INVERSE, SCALES,
                program - _at(first_k_tile, layer, L), layer, _at(widths, layer, L), N, M, k_along_tiles,
                True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip


# What a program of `pairs_kernel` and `sums_kernel` looks at; both only read scratch once.
PAIRS_TILE = (16, 64)
SUMS_TILE = (16, 64)


def contrast(
    objective: Objective,
    scales: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    anchors: Sequence[Tensor],
    keys: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Losses [L] and gradients by scales [2, L], anchors and keys ([rows, 0] for a side not wanted).

    Features are contiguous, aligned, of widths that are multiples of 16; other arguments as in
    `kernels.contrast`.
    """
    nce, layers = objective.name == "nce", len(anchors)
    m, n, device, dtype = len(anchors[0]), len(keys[0]), anchors[0].device, anchors[0].dtype
    widths = tuple(a.shape[1] for a in anchors)
    precision = precision_of(dtype)
    _, multiprocessors = launch.device_limits(device)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def tiles(tile: Tile) -> int:
        return triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)

    # Every program sums the same number of features, so that layers of different widths are balanced; two
    # programs a multiprocessor hide the latency of each other's loads.
    tile = choose(
        launch.DOTS,
        precision,
        anchors[0].element_size(),
        device,
        lambda t: tiles(t) * max(1, sum(widths) // 512),
    )
    slots_wanted = max(1, 2 * multiprocessors // tiles(tile))
    split = triton.cdiv(triton.cdiv(sum(widths), slots_wanted), tile.d) * tile.d
    num_slots = tuple(triton.cdiv(width, split) for width in widths)
    first_slot = tuple(accumulate((0, *num_slots[:-1])))
    slots = sum(num_slots)
    products, a_squares, k_squares = empty(slots, m, n), empty(slots, m), empty(slots, n)
    a_counts, k_counts = empty(m, dtype=torch.int32), empty(n, dtype=torch.int32)
    dots_kernel[(tiles(tile), slots)](
        tuple(anchors), tuple(keys), widths, first_slot, anchor_labels, key_labels,
        products, a_squares, k_squares, a_counts, k_counts, m, n, split,
        L=layers, PRECISION=dot_precision(precision), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_D=tile.d,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip

    a_lse2, k_lse2, means = (
        (empty(0), empty(0), empty(0)) if nce else (empty(layers, m), empty(layers, n), empty(2))
    )
    if not nce:
        own, other = SUMS_TILE
        programs = triton.cdiv(m, own) + (triton.cdiv(n, own) if objective.symmetric else 0)
        sums_kernel[(programs, layers)](
            products, a_squares, k_squares, a_counts, k_counts, scales, first_slot, num_slots,
            a_lse2, k_lse2, means, m, n, L=layers, OWN=own, OTHER=other,
        )  # fmt: skip

    block_m, block_n = PAIRS_TILE
    tiles_m, tiles_n = triton.cdiv(m, block_m), triton.cdiv(n, block_n)
    slopes, sums = empty(layers, m, n), empty(layers, tiles_m * tiles_n, 3)
    a_along, k_along = empty(layers, tiles_n, m), empty(layers, tiles_m, n)
    a_inverse, k_inverse = empty(layers, m), empty(layers, n)
    pairs_kernel[(tiles_m * tiles_n, layers)](
        products, a_squares, k_squares, a_counts, k_counts, a_lse2, k_lse2, means, scales,
        anchor_labels, key_labels, first_slot, num_slots,
        slopes, a_along, k_along, a_inverse, k_inverse, sums, m, n, float(objective.negatives or 0),
        L=layers, NCE=nce, SYMMETRIC=objective.symmetric, ALL_NEGATIVES=objective.negatives is None,
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip

    _, want_anchors, want_keys = wanted
    losses, by_scales = empty(layers), empty(2, layers)
    by_anchors = [empty(m, width if want_anchors else 0, dtype=saved_dtype(dtype)) for width in widths]
    by_keys = [empty(n, width if want_keys else 0, dtype=saved_dtype(dtype)) for width in widths]
    sizes = [size for size, want in ((m, want_anchors), (n, want_keys)) if want]

    def gradient_tiles(tile: Tile, rows: int) -> list[int]:
        return [triton.cdiv(rows, tile.m) * triton.cdiv(width, tile.d) for width in widths]

    tile = choose(
        launch.PRODUCT,
        precision,
        anchors[0].element_size(),
        device,
        lambda t: sum(sum(gradient_tiles(t, s)) for s in sizes),
    )
    a_tiles = gradient_tiles(tile, m) if want_anchors else [0] * layers
    k_tiles = gradient_tiles(tile, n) if want_keys else [0] * layers
    *first_tile, programs = accumulate((layers, *a_tiles, *k_tiles))
    finish_kernel[(programs,)](
        tuple(anchors), tuple(keys), tuple(by_anchors), tuple(by_keys), widths,
        tuple(first_tile[:layers]), tuple(first_tile[layers:]),
        slopes, a_along, k_along, a_inverse, k_inverse, sums, scales, losses, by_scales,
        m, n, tiles_m * tiles_n, tiles_n, tiles_m,
        L=layers, BY_ANCHORS=want_anchors, BY_KEYS=want_keys, PRECISION=dot_precision(precision),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_D=tile.d, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return [losses, by_scales, *by_anchors, *by_keys]
