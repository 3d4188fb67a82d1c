"""The contrastive losses in plain PyTorch: each formula once, and its evaluation in chunks of rows.

`plain` is the formula over all pairs at once: any device, any dtype, differentiable any number of times, and
what every other path is compared with. `chunked` gives the same loss and its first gradients without ever
holding an M x N matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import at_least_float32
from .form import LossForm, saved_dtype

# Pairs looked at together: 1 MiB a float32 temporary, of which several stay in the cache of a CPU.
CHUNK_PAIRS = 1 << 18


def inverse_norms(features: Tensor) -> Tensor:
    """Return 1 / length of each row, [rows, 1], 0 for a zero row; features at least float32."""
    squared = features.square().sum(1, keepdim=True)
    zero = squared == 0
    return torch.where(zero, 1, squared).rsqrt().masked_fill(zero, 0)


def unit_rows(features: Tensor) -> Tensor:
    """Return rows of length 1, at least in float32; a zero row stays zero and passes no gradient."""
    features = at_least_float32(features)
    return features * inverse_norms(features)


# Of rows of logits: the loss of each, how many of them count in the mean, and a function that returns the
# gradient of the summed losses with respect to the logits.
Terms = tuple[Tensor, Tensor, Callable[[], Tensor]]


def terms(form: LossForm, x: Tensor, positive: Tensor) -> Terms:
    """The loss of each row of logits x [rows, N], the lowest for a pair left out.

    positive: [rows, N], 1 for a positive pair, else 0; in the dtype of x, whose arithmetic is many times
    faster than a choice between two numbers.
    """
    if form.name == "nce":
        return _nce(form, x, positive)
    return (_info_nce if form.name == "info_nce" else _info_nce_any)(x, positive)


def _nce(form: LossForm, x: Tensor, positive: Tensor) -> Terms:
    negative = 1 - positive
    num_positives = positive.sum(1, keepdim=True)
    wrong = x * (negative - positive)
    if form.negatives is not None:
        num_negatives = x.shape[1] - form.exclude_self - num_positives
        negative = negative * (form.negatives / num_negatives.clamp_min(1))
    weight = negative - positive / num_positives.clamp_min(1)  # below 0 on positives
    losses = (F.softplus(wrong) * weight.abs()).sum(1)
    # Not sigmoid(x) - 1 on positives: that cancels where the critic is sure.
    return losses, losses.new_full((), len(losses)), lambda: wrong.sigmoid_().mul_(weight)


def _info_nce(x: Tensor, positive: Tensor) -> Terms:
    num_positives = positive.sum(1, keepdim=True)
    counts = num_positives.clamp_max(1)
    share = positive / num_positives.clamp_min(1)
    losses = -(x.log_softmax(1) * share).sum(1)
    return losses, counts.sum(), lambda: x.softmax(1).sub_(share).mul_(counts)


def _info_nce_any(x: Tensor, positive: Tensor) -> Terms:
    counts = positive.sum(1, keepdim=True).clamp_max(1)
    log_p = x.log_softmax(1)
    log_mine = log_p + (counts - positive) * _lowest(x)  # of the positives; a row without one stays
    losses = -log_mine.logsumexp(1) * counts[:, 0] if x.shape[1] else x.sum(1)
    return losses, counts.sum(), lambda: x.softmax(1).sub_(log_mine.softmax(1)).mul_(counts)


def _positives(
    form: LossForm, x: Tensor, row_labels: Tensor, column_labels: Tensor, start: int = 0
) -> Tensor:
    """Which pairs are positive, as `terms` takes them; marks in x, rows from `start` on, those left out."""
    same = row_labels[:, None] == column_labels
    positive = same.to(torch.uint8).to(x.dtype)  # straight from a bool it takes much longer
    if form.exclude_self:
        positive.diagonal(start).fill_(0)
        x.diagonal(start).fill_(_lowest(x))
    return positive


def _lowest(x: Tensor) -> float:
    """Return the lowest number: it stands for -inf, which makes NaN of a row of nothing else."""
    return torch.finfo(x.dtype).min


def plain(
    form: LossForm,
    scales: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    anchors: Tensor,
    keys: Tensor,
) -> Tensor:
    """The loss, a scalar, by its formula.

    Args:
        form: which loss.
        scales: [2], the temperature and the noise ratio (1 for InfoNCE, which has none).
        anchor_labels: int [M].
        key_labels: int [N].
        anchors: float [M, D].
        keys: float [N, D].
    """
    units, labels = (unit_rows(anchors), unit_rows(keys)), (anchor_labels, key_labels)
    loss = scales.new_zeros(())
    for row, column in ((0, 1), (1, 0)) if form.symmetric else ((0, 1),):
        x = units[row] @ units[column].T / scales[0] - scales[1].log()
        losses, count, _ = terms(form, x, _positives(form, x, labels[row], labels[column]))
        loss = loss + losses.sum() / count.clamp_min(1)
    return loss


def chunked(
    form: LossForm,
    scales: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    anchors: Tensor,
    keys: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The loss of `plain`, then its gradients for scales, anchors and keys, empty where not `wanted`.

    Memory beside the inputs: their unit rows and gradients, and a few temporaries of CHUNK_PAIRS.
    """
    want_scales, want_anchors, want_keys = wanted
    temperature, noise_ratio = scales.unbind()
    sides, labels = [at_least_float32(anchors), at_least_float32(keys)], (anchor_labels, key_labels)
    # Anchors of length 1 / temperature and keys of length 1: their products are the logits, and those of the
    # slopes with one side the gradients for the other.
    inverses = inverse_norms(sides[0]) / temperature, inverse_norms(sides[1])
    rows = [side * inverse for side, inverse in zip(sides, inverses, strict=True)]
    wants = want_scales, want_scales or want_anchors, want_keys
    shift = noise_ratio.log()
    loss, grad_shift, *grad_rows = _one_way(form, shift, labels, rows, wants)
    if form.symmetric:
        other, grad_other, *grad_turned = _one_way(
            form, shift, labels[::-1], rows[::-1], (wants[0], wants[2], wants[1])
        )
        loss, grad_shift = loss + other, grad_shift + grad_other
        grad_rows = [a + b for a, b in zip(grad_rows, reversed(grad_turned), strict=True)]
    grad_scales = scales.new_empty(0)
    if want_scales:
        grad_temperature = -torch.vdot(rows[0].flatten(), grad_rows[0].flatten()) / temperature
        grad_scales = torch.stack([grad_temperature, grad_shift / noise_ratio])
    grad_anchors, grad_keys = anchors.new_empty(0), keys.new_empty(0)
    if want_anchors:
        grad_anchors = _across(rows[0], grad_rows[0], inverses[0], temperature)
    if want_keys:
        grad_keys = _across(rows[1], grad_rows[1], inverses[1], None)
    dtype = saved_dtype(anchors.dtype)  # the keys have the same
    return [loss, grad_scales, grad_anchors.to(dtype), grad_keys.to(dtype)]


def _one_way(
    form: LossForm, shift: Tensor, labels: Sequence[Tensor], units: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """The mean loss of the first units, rows, among the others, columns; and its gradients.

    They are for `shift`, which is subtracted from the products of units, and for either units.
    """
    rows, columns = units
    want_shift, want_rows, want_columns = wanted
    loss, count, grad_shift = (torch.zeros_like(shift) for _ in range(3))
    grad_rows, grad_columns = (
        unit.new_zeros(unit.shape if want else 0) for unit, want in zip(units, wanted[1:], strict=True)
    )
    step = max(1, CHUNK_PAIRS // max(1, len(columns)))
    for start in range(0, len(rows), step):
        chunk = slice(start, start + step)
        own = rows[chunk]
        x = (own @ columns.T).sub_(shift)
        positive = _positives(form, x, labels[0][chunk], labels[1], start)
        losses, counted, slopes = terms(form, x, positive)
        loss += losses.sum()
        count += counted
        if any(wanted):
            grad_x = slopes()
            if want_shift:
                grad_shift -= grad_x.sum()
            if want_rows:
                torch.mm(grad_x, columns, out=grad_rows[chunk])
            if want_columns:
                grad_columns.addmm_(grad_x.T, own)
    count.clamp_min_(1)
    totals = zip((loss, grad_shift, grad_rows, grad_columns), (True, *wanted), strict=True)
    return [total.div_(count) if want else total for total, want in totals]


def _across(rows: Tensor, grad_rows: Tensor, inverses: Tensor, temperature: Tensor | None) -> Tensor:
    """Turn the gradient for rows of length 1 / temperature (None: 1) into that for their features."""
    along = (rows * grad_rows).sum(1, keepdim=True)
    if temperature is not None:
        along = along * temperature * temperature
    return grad_rows.addcmul_(rows, along, value=-1).mul_(inverses)
