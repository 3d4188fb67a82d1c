"""What `narrow` and `wide` share: what each row brings to its pairs, and its gradient after them."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mim4dd.losses.form import LossForm, saved_dtype

from .launch import choose, dot_precision, precision_of
from .pairs import LEFT_OUT, LOG_SUMS
from .side_kernels import gradient_kernel, rows_kernel
from .wide_kernels import sums_kernel

# Rows and columns looked at by one launch where pairs are walked in blocks.
BLOCK = 8192


class Side(NamedTuple):
    """The rows of one side: each field is [rows, ...]."""

    features: Tensor
    labels: Tensor  # int32
    inverse: Tensor  # 1 / norm, 0 for a zero row
    on_positive: Tensor  # what a positive pair of the row counts in the loss of this side
    on_other: Tensor  # NCE: what a negative pair counts; InfoNCE: the whole row
    lse2: Tensor  # InfoNCE: log2 of the sum of 2^x2 over the pairs of the row
    pull2: Tensor  # InfoNCE of any positive: see `pairs.info_nce_pair`

    def of(self, rows: slice) -> "Side":
        """Some of the rows."""
        return Side(*(value[rows] for value in self))


def prepare(
    form: LossForm,
    scales: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    anchors: Tensor,
    keys: Tensor,
) -> tuple[Side, Side, Tensor, Tensor | None]:
    """Both sides, the largest weight of a pair, [1], and the loss, [1], if it is known before the pairs.

    Arguments as in `kernels.contrast`.
    """
    negatives = form.negatives
    labels = _ranks(anchor_labels, key_labels)
    counts = _counts(*labels)
    if form.exclude_self:
        itself = (labels[0] == labels[1]).int()
        counts = counts[0] - itself, counts[1] - itself
    features = anchors, keys
    sides: list[Side] = []
    # Of each side, 1 / the rows the loss is a mean over. Filled, not copied: a copy would wait.
    means = scales.new_empty(2)
    for index in (0, 1):
        rows, width = features[index].shape
        others = len(features[1 - index]) - form.exclude_self
        if form.name == "nce":
            means[index].fill_(1 / rows)
        else:
            means[index].copy_((counts[index] > 0).sum().clamp_min(1).float().reciprocal())
        inverse, on_positive, on_other = (scales.new_empty(rows) for _ in range(3))
        rows_kernel[(triton.cdiv(rows, 32),)](
            features[index], counts[index], means[index], inverse, on_positive, on_other,
            rows, others, width, float(negatives or 0),
            LOSS=form.name, ALL_NEGATIVES=negatives is None, BLOCK_M=32, BLOCK_D=128,
        )  # fmt: skip
        # A loss without log-sum-exps reads none: any vector holds their place.
        sides.append(Side(features[index], labels[index], inverse, on_positive, on_other, inverse, inverse))
    losses = []
    if LOG_SUMS[form.name]:
        for index, sums in enumerate(_log_sums2(form, scales, *sides)):
            if len(sums) == 1:
                sides[index] = sides[index]._replace(lse2=sums[0])
            else:
                sides[index], loss = _taken_together(sides[index], *sums)
                losses.append(loss)
    largest = means.sum(0, keepdim=True) if form.symmetric else means[:1]
    largest = largest * max(1.0, negatives or 0.0)
    return sides[0], sides[1], largest, torch.stack(losses).sum(0) if losses else None


def gain(dtype: torch.dtype, largest: Tensor) -> Tensor:
    """The factor, [1], that scales slopes of at most `largest` for storage in `dtype`.

    float16 has no room for 1 / M over a norm; this brings the largest to 2^13.
    """
    if dtype != torch.float16:
        return torch.ones_like(largest)
    return 2**13 / largest.clamp_min(1e-30)


def feature_gradient(parts: Tensor, side: Side, scales: Tensor, gain: Tensor) -> Tensor:
    """The gradient for the features of a side.

    Args:
        parts: float32 [parts, rows, D], which add up to the sum over the pairs of each row of slope times the
            other's unit row, over the row's own norm and times `gain`. Overwritten.
        side: whose gradient.
        scales: as in `kernels.contrast`, of one layer.
        gain: [1].
    """
    num_parts, rows, width = parts.shape
    dtype = saved_dtype(side.features.dtype)
    out = parts[0] if dtype == torch.float32 and num_parts == 1 else torch.empty_like(parts[0], dtype=dtype)
    gradient_kernel[(triton.cdiv(rows, 4),)](
        parts, side.features, side.inverse, scales, gain, out, rows, width, num_parts, BLOCK_M=4, BLOCK_D=256
    )
    return out


def scale_gradient(sums: Tensor, scales: Tensor) -> Tensor:
    """[2, 1]; sums: [3] of loss, slope times cosine, slope."""
    return -torch.stack([sums[1] / scales[0].square(), sums[2] / scales[1]])


def walk(m: int, n: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most BLOCK x BLOCK pairs, in a fixed order."""
    for row in range(0, m, BLOCK):
        for column in range(0, n, BLOCK):
            yield slice(row, row + BLOCK), slice(column, column + BLOCK)


def _ranks(anchor_labels: Tensor, key_labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels as int32 from 0, equal where they were equal; without waiting for the device.

    64-bit labels cost a tile of pairs 32 registers a thread, and it would spill.
    """
    labels = torch.cat([anchor_labels, key_labels])
    ordered, order = labels.sort()
    ranks = torch.zeros_like(labels, dtype=torch.int32)
    ranks[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    ranks = torch.empty_like(ranks).scatter_(0, order, ranks)
    # Clones, so that both begin at an aligned address.
    return ranks[: len(anchor_labels)].clone(), ranks[len(anchor_labels) :].clone()


def _counts(anchor_labels: Tensor, key_labels: Tensor) -> tuple[Tensor, Tensor]:
    """For each row, how many of the other side have its label, int32; labels are ranks."""
    labels, counts = (anchor_labels, key_labels), []
    for own, others in (labels, labels[::-1]):
        # Integers: their sum is the same in any order.
        having = others.new_zeros(len(own) + len(others)).index_add_(0, others, torch.ones_like(others))
        counts.append(having[own])
    return counts[0], counts[1]


def _taken_together(side: Side, others2: Tensor, positives2: Tensor) -> tuple[Side, Tensor]:
    """The side with what `pairs.any_terms` makes of log-sum-exps [rows], and the loss of its rows, [1]."""
    odds2, lse2 = others2 - positives2, torch.logaddexp2(others2, positives2)
    loss2 = torch.logaddexp2(odds2, torch.zeros_like(odds2))
    loss = (side.on_other * loss2).sum(0, keepdim=True) * math.log(2)
    return side._replace(lse2=lse2, pull2=lse2 - odds2), loss


def _log_sums2(form: LossForm, scales: Tensor, a: Side, k: Side) -> list[Tensor]:
    """log2 of the sums of 2^x2 (see `pairs.LOG_SUMS`) of each anchor over the keys, [sums, M], and, if
    symmetric, of each key over the anchors, [sums, N].

    One pass over the logits, which are not kept: of a block only its sums by tile.
    """
    precision, num_sums = precision_of(a.features.dtype), LOG_SUMS[form.name]
    m, n, width = len(a.features), len(k.features), a.features.shape[1]
    tile = choose(
        "SUMS",
        a.features,
        lambda t: triton.cdiv(min(m, BLOCK), t.m) * triton.cdiv(min(n, BLOCK), t.n),
    )
    lengths = (m, n) if form.symmetric else (m,)
    # What a sum of no pair stays at: above the logits left out, for one less the other must not overflow.
    least = LEFT_OUT.value / 2
    sums = [scales.new_full((num_sums, length), least) for length in lengths]
    for rows, columns in walk(m, n):
        anchors, keys = a.of(rows), k.of(columns)
        num_rows, num_columns = len(anchors.features), len(keys.features)
        tiles_m, tiles_n = triton.cdiv(num_rows, tile.m), triton.cdiv(num_columns, tile.n)
        row_parts = scales.new_empty(tiles_n, num_sums, num_rows)
        column_parts = scales.new_empty(tiles_m, num_sums, num_columns)
        sums_kernel[(tiles_m * tiles_n,)](
            anchors.features, keys.features, anchors.inverse, keys.inverse, anchors.labels, keys.labels,
            scales, row_parts, column_parts, num_rows, num_columns, width, rows.start - columns.start,
            NUM_SUMS=num_sums, SYMMETRIC=form.symmetric, EXCLUDE_SELF=form.exclude_self,
            PRECISION=dot_precision(precision), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_D=tile.d, GROUP=8,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        _add_log_sums2(sums[0][:, rows], row_parts)
        if form.symmetric:
            _add_log_sums2(sums[1][:, columns], column_parts)
    return sums


def _add_log_sums2(total: Tensor, parts: Tensor) -> None:
    """Put log2 of the sum of 2^total [..., rows] and 2^parts [tiles, ..., rows] into `total`."""
    log2 = math.log(2)
    total.copy_(torch.cat([total[None], parts]).mul_(log2).logsumexp(0).div_(log2))
