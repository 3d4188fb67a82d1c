"""The kernels of `skinny` over pairs: products, sums, and the loss with its derivative by each logit."""

import triton
import triton.language as tl

from .layers import at, pick
from .pairs import (
    LEFT_OUT,
    LN2,
    LOG2E,
    any_terms,
    count_equal,
    inverse_norm,
    pair_terms,
    row_products,
    weights,
)


@triton.jit
def _count_others(OWN, OTHERS, rows, in_rows, num_others, EXCLUDE_SELF: tl.constexpr):
    labels = tl.load(OWN + rows, mask=in_rows, other=0)
    counts = count_equal(labels, OTHERS, num_others, 32)
    if EXCLUDE_SELF:
        counts -= (labels == tl.load(OTHERS + rows, mask=in_rows, other=0)).to(tl.int32)
    return counts


@triton.jit(do_not_specialize=["M", "N"])
def dots_kernel(
    anchors, keys, widths, first_slot, ANCHOR_LABELS, KEY_LABELS,
    PRODUCTS, A_SQUARES, K_SQUARES, A_COUNTS, K_COUNTS,
    M, N, split, slots,
    L: tl.constexpr, EXCLUDE_SELF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Slot s of a layer sums its features from s split to (s + 1) split: PRODUCTS [slots, M, N], *_SQUARES
    [slots, *]. The programs past the last slot count labels."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    slot = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < M
    in_columns = columns < N
    if slot == slots:
        if tile_n == 0:
            counts = _count_others(ANCHOR_LABELS, KEY_LABELS, rows, in_rows, N, EXCLUDE_SELF)
            tl.store(A_COUNTS + rows, counts, mask=in_rows)
        if tile_m == 0:
            counts = _count_others(KEY_LABELS, ANCHOR_LABELS, columns, in_columns, M, EXCLUDE_SELF)
            tl.store(K_COUNTS + columns, counts, mask=in_columns)
    else:
        width = pick(widths, first_slot, slot, L)
        low = (slot - pick(first_slot, first_slot, slot, L)) * split
        products, a_squares, k_squares = row_products(
            pick(anchors, first_slot, slot, L), pick(keys, first_slot, slot, L),
            rows, columns, in_rows, in_columns, width, low, tl.minimum(low + split, width),
            True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        pairs = rows.to(tl.int64)[:, None] * N + columns[None, :]
        base = slot.to(tl.int64) * M * N
        tl.store(PRODUCTS + base + pairs, products, mask=in_rows[:, None] & in_columns[None, :])
        if tile_n == 0:
            tl.store(A_SQUARES + slot * M + rows, a_squares, mask=in_rows)
        if tile_m == 0:
            tl.store(K_SQUARES + slot * N + columns, k_squares, mask=in_columns)


@triton.jit
def _inverse_norms(SQUARES, rows, in_rows, length, slot_low, slot_high, BLOCK: tl.constexpr):
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in range(slot_low, slot_high):
        squares += tl.load(SQUARES + slot * length + rows, mask=in_rows, other=0.0)
    return inverse_norm(squares)


@triton.jit
def _logits2(
    PRODUCTS, rows, columns, in_rows, in_columns, a_inverse, k_inverse, M, N, slot_low, slot_high,
    SCALES, layer,
    L: tl.constexpr, EXCLUDE_SELF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which pairs of a tile count, their cosines and critic logits in base 2; slots are summed in order."""
    mask = in_rows[:, None] & in_columns[None, :]
    if EXCLUDE_SELF:
        mask = mask & (rows[:, None] != columns[None, :])
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    for slot in range(slot_low, slot_high):
        products += tl.load(PRODUCTS + tl.cast(slot, tl.int64) * M * N + offsets, mask=mask, other=0.0)
    cosines = products * a_inverse[:, None] * k_inverse[None, :]
    temperature = tl.load(SCALES + layer)
    noise_ratio = tl.load(SCALES + L + layer)
    x2 = cosines * (LOG2E / temperature) - tl.log2(noise_ratio)
    return mask, cosines, tl.where(mask, x2, LEFT_OUT)


@triton.jit
def _log_sum_exp2(
    PRODUCTS, A_SQUARES, K_SQUARES, ANCHOR_LABELS, KEY_LABELS, SCALES, LSE2, tile,
    M, N, slot_low, slot_high, layer, index,
    OF_KEYS: tl.constexpr, NUM_SUMS: tl.constexpr, L: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp `index` (see `pairs.LOG_SUMS`) of OWN anchors over the keys, or OF_KEYS the other way
    round, stored to LSE2 [NUM_SUMS, L, *]."""
    num_own = N if OF_KEYS else M
    num_others = M if OF_KEYS else N
    OWN_SQUARES = K_SQUARES if OF_KEYS else A_SQUARES
    OTHER_SQUARES = A_SQUARES if OF_KEYS else K_SQUARES
    OWN_LABELS = KEY_LABELS if OF_KEYS else ANCHOR_LABELS
    OTHER_LABELS = ANCHOR_LABELS if OF_KEYS else KEY_LABELS
    own = tile * OWN + tl.arange(0, OWN)
    in_own = own < num_own
    own_labels = tl.load(OWN_LABELS + own, mask=in_own, other=0)
    own_inverse = _inverse_norms(OWN_SQUARES, own, in_own, num_own, slot_low, slot_high, OWN)
    largest = tl.full((OWN,), LEFT_OUT, dtype=tl.float32)
    total = tl.zeros((OWN,), dtype=tl.float32)
    for start in range(0, num_others, OTHER):
        other = start + tl.arange(0, OTHER)
        in_other = other < num_others
        other_inverse = _inverse_norms(OTHER_SQUARES, other, in_other, num_others, slot_low, slot_high, OTHER)
        if OF_KEYS:
            _, _, x2 = _logits2(
                PRODUCTS, other, own, in_other, in_own, other_inverse, own_inverse,
                M, N, slot_low, slot_high, SCALES, layer, L, EXCLUDE_SELF, OTHER, OWN,
            )  # fmt: skip
            x2 = tl.trans(x2)
        else:
            _, _, x2 = _logits2(
                PRODUCTS, own, other, in_own, in_other, own_inverse, other_inverse,
                M, N, slot_low, slot_high, SCALES, layer, L, EXCLUDE_SELF, OWN, OTHER,
            )  # fmt: skip
        if NUM_SUMS == 2:
            other_labels = tl.load(OTHER_LABELS + other, mask=in_other, other=0)
            positive = own_labels[:, None] == other_labels[None, :]
            x2 = tl.where(positive == (index == 1), x2, LEFT_OUT)
        larger = tl.maximum(largest, tl.max(x2, 1))
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(x2 - larger[:, None]), 1)
        largest = larger
    tl.store(LSE2 + (index * L + layer) * num_own + own, largest + tl.log2(total), mask=in_own)


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
    PRODUCTS, A_SQUARES, K_SQUARES, ANCHOR_LABELS, KEY_LABELS, A_COUNTS, K_COUNTS, SCALES,
    first_slot, num_slots, A_LSE2, K_LSE2, MEANS, M, N,
    NUM_SUMS: tl.constexpr, L: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps (base 2) of each anchor over the keys: A_LSE2 [NUM_SUMS, L, M]; with programs past those
    of the anchors also of each key over the anchors: K_LSE2 [NUM_SUMS, L, N]. The first program finds MEANS
    [2]."""
    tile = tl.program_id(0)
    layer = tl.program_id(1)
    index = tl.program_id(2)
    low = at(first_slot, layer, L)
    high = low + at(num_slots, layer, L)
    tiles_m = tl.cdiv(M, OWN)
    if (tile == 0) & (layer == 0) & (index == 0):
        tl.store(MEANS, _mean_over_positives(A_COUNTS, M))
        tl.store(MEANS + 1, _mean_over_positives(K_COUNTS, N))
    if tile < tiles_m:
        _log_sum_exp2(
            PRODUCTS, A_SQUARES, K_SQUARES, ANCHOR_LABELS, KEY_LABELS, SCALES, A_LSE2, tile,
            M, N, low, high, layer, index, False, NUM_SUMS, L, EXCLUDE_SELF, OWN, OTHER,
        )  # fmt: skip
    else:
        _log_sum_exp2(
            PRODUCTS, A_SQUARES, K_SQUARES, ANCHOR_LABELS, KEY_LABELS, SCALES, K_LSE2, tile - tiles_m,
            M, N, low, high, layer, index, True, NUM_SUMS, L, EXCLUDE_SELF, OWN, OTHER,
        )  # fmt: skip


@triton.jit
def _row_terms(
    COUNTS, LSE2, MEAN, rows, in_rows, num_rows, num_others, layer, negatives,
    LOSS: tl.constexpr, ALL_NEGATIVES: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """What `pair_terms` needs of the rows of a side, and their losses if these are known before the pairs."""
    counts = tl.load(COUNTS + rows, mask=in_rows, other=0)
    mean = 1.0 / num_rows if LOSS == "nce" else tl.load(MEAN)
    on_positive, on_other = weights(counts, num_others, mean, negatives, LOSS, ALL_NEGATIVES)
    lse2 = on_other
    pull2 = on_other
    loss2 = on_other
    if LOSS != "nce":
        lse2 = tl.load(LSE2 + layer * num_rows + rows, mask=in_rows, other=0.0)
    if LOSS == "info_nce_any":
        positives2 = tl.load(LSE2 + (L + layer) * num_rows + rows, mask=in_rows, other=0.0)
        loss2, lse2, pull2 = any_terms(lse2, positives2)
        loss2 *= on_other
    return on_positive, on_other, lse2, pull2, loss2


@triton.jit(do_not_specialize=["M", "N"])
def pairs_kernel(
    PRODUCTS, A_SQUARES, K_SQUARES, A_COUNTS, K_COUNTS, A_LSE2, K_LSE2, MEANS, SCALES,
    ANCHOR_LABELS, KEY_LABELS, first_slot, num_slots,
    SLOPES, A_ALONG, K_ALONG, A_INVERSE, K_INVERSE, SUMS, M, N, negatives,
    L: tl.constexpr, LOSS: tl.constexpr, SYMMETRIC: tl.constexpr, ALL_NEGATIVES: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """SLOPES [L, M, N] dL/dx; of each tile its sums by row A_ALONG [L, tiles, M] and column K_ALONG of slope
    times cosine, and SUMS [L, tiles, 3] of loss, slope times cosine, slope; the inverse norms."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    layer = tl.program_id(1)
    low = at(first_slot, layer, L)
    high = low + at(num_slots, layer, L)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < M
    in_columns = columns < N
    a_inverse = _inverse_norms(A_SQUARES, rows, in_rows, M, low, high, BLOCK_M)
    k_inverse = _inverse_norms(K_SQUARES, columns, in_columns, N, low, high, BLOCK_N)
    counting, cosines, x2 = _logits2(
        PRODUCTS, rows, columns, in_rows, in_columns, a_inverse, k_inverse, M, N, low, high, SCALES, layer,
        L, EXCLUDE_SELF, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    a_positive, a_other, a_lse2, a_pull2, a_loss2 = _row_terms(
        A_COUNTS, A_LSE2, MEANS, rows, in_rows, M, N - EXCLUDE_SELF, layer, negatives,
        LOSS, ALL_NEGATIVES, L,
    )  # fmt: skip
    k_positive, k_other, k_lse2, k_pull2, k_loss2 = a_positive, a_other, a_lse2, a_pull2, a_loss2
    if SYMMETRIC:
        k_positive, k_other, k_lse2, k_pull2, k_loss2 = _row_terms(
            K_COUNTS, K_LSE2, MEANS + 1, columns, in_columns, N, M - EXCLUDE_SELF, layer, negatives,
            LOSS, ALL_NEGATIVES, L,
        )  # fmt: skip
    a_labels = tl.load(ANCHOR_LABELS + rows, mask=in_rows, other=0)
    k_labels = tl.load(KEY_LABELS + columns, mask=in_columns, other=0)
    loss2, slopes = pair_terms(
        x2, (a_labels[:, None] == k_labels[None, :]) & counting,
        a_positive, a_other, a_lse2, a_pull2, k_positive, k_other, k_lse2, k_pull2, LOSS, True, SYMMETRIC,
    )  # fmt: skip
    loss2 = tl.sum(tl.sum(loss2, 1), 0)
    if LOSS == "info_nce_any":  # the losses of rows, each once
        loss2 = tl.where(tile_n == 0, tl.sum(a_loss2, 0), 0.0)
        if SYMMETRIC:
            loss2 += tl.where(tile_m == 0, tl.sum(k_loss2, 0), 0.0)
    along = slopes * cosines
    base = layer.to(tl.int64) * M * N
    tl.store(
        SLOPES + base + rows.to(tl.int64)[:, None] * N + columns[None, :], slopes,
        mask=in_rows[:, None] & in_columns[None, :],
    )  # fmt: skip
    tl.store(A_ALONG + (layer * tiles_n + tile_n) * M + rows, tl.sum(along, 1), mask=in_rows)
    tl.store(K_ALONG + (layer * tiles_m + tile_m) * N + columns, tl.sum(along, 0), mask=in_columns)
    if tile_n == 0:
        tl.store(A_INVERSE + layer * M + rows, a_inverse, mask=in_rows)
    if tile_m == 0:
        tl.store(K_INVERSE + layer * N + columns, k_inverse, mask=in_columns)
    sums = SUMS + (layer * tiles_m * tiles_n + tl.program_id(0)) * 3
    tl.store(sums, loss2 * LN2)
    tl.store(sums + 1, tl.sum(tl.sum(along, 1), 0))
    tl.store(sums + 2, tl.sum(tl.sum(slopes, 1), 0))
