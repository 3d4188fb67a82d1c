"""The contrastive losses in plain PyTorch: each formula once, and its evaluation in chunks of rows.

`plain` is the formula over all pairs at once: any device, any dtype, differentiable any number of times, and
what every other path is compared with. `chunked` gives the same loss and its first gradients without ever
holding an M x N matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import at_least_float32
from .form import LossForm, saved_dtype

# Pairs looked at together: 4 MiB a float32 temporary, which stays in the cache of a CPU.
CHUNK_PAIRS = 1 << 20


def inverse_norms(features: Tensor) -> Tensor:
    """Return 1 / length of each row, [rows, 1], 0 for a zero row; features at least float32."""
    squared = features.square().sum(1, keepdim=True)
    zero = squared == 0
    return torch.where(zero, 0, torch.where(zero, 1, squared).rsqrt())


def unit_rows(features: Tensor) -> Tensor:
    """Return rows of length 1, at least in float32; a zero row stays zero and passes no gradient."""
    features = at_least_float32(features)
    return features * inverse_norms(features)


def nce_rows(form: LossForm, x: Tensor, positive: Tensor) -> Tensor:
    """NCE loss of each row of critic logits x [rows, N], -inf for a pair left out.

    positive: bool [rows, N].
    """
    on_positives, on_negatives = _nce_weights(form, x, positive)
    weight = torch.where(positive, on_positives, on_negatives)
    return (F.softplus(torch.where(positive, -x, x)) * weight).sum(1)


def nce_gradient(form: LossForm, x: Tensor, positive: Tensor) -> Tensor:
    """The derivative of the summed `nce_rows` with respect to x [rows, N]."""
    on_positives, on_negatives = _nce_weights(form, x, positive)
    # Not sigmoid(x) - 1 on positives: that cancels where the critic is sure.
    return torch.where(positive, -x, x).sigmoid_().mul_(torch.where(positive, -on_positives, on_negatives))


def info_nce_rows(z: Tensor, positive: Tensor) -> Tensor:
    """InfoNCE loss of each row of logits z [rows, N], -inf for a pair left out, 0 without a positive.

    positive: bool [rows, N].
    """
    if not z.shape[1]:
        return z.sum(1)
    num_positives = positive.sum(1)
    mean_positive = torch.where(positive, z, 0).sum(1) / num_positives.clamp_min(1)
    return torch.where(num_positives > 0, z.logsumexp(1) - mean_positive, 0)


def info_nce_gradient(z: Tensor, positive: Tensor) -> Tensor:
    """The derivative of the summed `info_nce_rows` with respect to z [rows, N]."""
    num_positives = positive.sum(1, keepdim=True).to(z)
    share = torch.where(positive, 1 / num_positives, 0)
    return z.softmax(1).sub_(share).mul_(num_positives > 0)


def info_nce_any_rows(z: Tensor, positive: Tensor) -> Tensor:
    """InfoNCE loss of each row of logits z [rows, N], its positives taken together; else `info_nce_rows`."""
    if not z.shape[1]:
        return z.sum(1)
    loss = z.logsumexp(1) - _positives(z, positive).logsumexp(1)
    return torch.where(positive.any(1), loss, 0)


def info_nce_any_gradient(z: Tensor, positive: Tensor) -> Tensor:
    """The derivative of the summed `info_nce_any_rows` with respect to z [rows, N]."""
    return z.softmax(1).sub_(_positives(z, positive).softmax(1))


def _positives(z: Tensor, positive: Tensor) -> Tensor:
    """The logits, -inf for what is not positive; a row without a positive stays, so that it cancels."""
    return z.masked_fill(positive.any(1, keepdim=True) & ~positive, -torch.inf)


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
    for row, column in _directions(form):
        positive = labels[row][:, None] == labels[column][None, :]
        x = units[row] @ units[column].T / scales[0] - scales[1].log()
        if form.exclude_self:
            positive.fill_diagonal_(False)
            x = x.fill_diagonal_(-torch.inf)
        rows = _rows(form, x, positive)
        loss = loss + rows.sum() / _num_rows(form, labels[row], labels[column])
    return loss


def chunked(
    form: LossForm,
    scales: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    anchors: Tensor,
    keys: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The loss of `plain` and its gradients for scales, anchors and keys, empty where not `wanted`.

    Memory beside the inputs: their unit rows and gradients, and a few temporaries of CHUNK_PAIRS.
    """
    want_scales, *want_side = wanted
    temperature, noise_ratio = scales
    sides, labels = (anchors, keys), (anchor_labels, key_labels)
    units = [unit_rows(side) for side in sides]
    grad_unit = [
        torch.zeros_like(unit) if want else unit[:0] for unit, want in zip(units, want_side, strict=True)
    ]
    loss, grad_scales = scales.new_zeros(()), torch.zeros_like(scales)
    for row, column in _directions(form):
        num_rows = _num_rows(form, labels[row], labels[column])
        step = max(1, CHUNK_PAIRS // max(1, len(units[column])))
        for start in range(0, len(units[row]), step):
            chunk = slice(start, start + step)
            positive = labels[row][chunk, None] == labels[column][None, :]
            cosine = units[row][chunk] @ units[column].T
            x = cosine / temperature - noise_ratio.log()
            if form.exclude_self:
                positive.diagonal(start).fill_(False)
                x.diagonal(start).fill_(-torch.inf)
            loss += _rows(form, x, positive).sum() / num_rows
            if not any(wanted):
                continue
            grad_x = _gradient(form, x, positive).div_(num_rows)
            if form.exclude_self:  # NaN where there is no other key
                grad_x.diagonal(start).fill_(0)
            if want_scales:
                grad_scales[0] -= torch.vdot(grad_x.view(-1), cosine.view(-1)) / temperature**2
                grad_scales[1] -= grad_x.sum() / noise_ratio
            grad_x /= temperature
            if want_side[row]:
                grad_unit[row][chunk].addmm_(grad_x, units[column])
            if want_side[column]:
                grad_unit[column].addmm_(grad_x.T, units[row][chunk])
    grad_side = [
        _through_unit_rows(side, unit, gradient) if want else side.new_empty(0, dtype=saved_dtype(side.dtype))
        for side, unit, gradient, want in zip(sides, units, grad_unit, want_side, strict=True)
    ]
    return loss, [grad_scales if want_scales else scales.new_empty(0), *grad_side]


def _directions(form: LossForm) -> list[tuple[int, int]]:
    """Who is row and who is column, anchors 0 and keys 1, in each term of the loss."""
    return [(0, 1), (1, 0)] if form.symmetric else [(0, 1)]


def _rows(form: LossForm, x: Tensor, positive: Tensor) -> Tensor:
    if form.name == "nce":
        return nce_rows(form, x, positive)
    return (info_nce_rows if form.name == "info_nce" else info_nce_any_rows)(x, positive)


def _gradient(form: LossForm, x: Tensor, positive: Tensor) -> Tensor:
    if form.name == "nce":
        return nce_gradient(form, x, positive)
    return (info_nce_gradient if form.name == "info_nce" else info_nce_any_gradient)(x, positive)


def _nce_weights(form: LossForm, x: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """What a positive and a negative pair of each row count, [rows, 1] each."""
    num_positives = positive.sum(1, keepdim=True).to(x)
    if form.negatives is None:
        return 1 / num_positives.clamp_min(1), torch.ones_like(num_positives)
    num_negatives = x.shape[1] - form.exclude_self - num_positives
    return 1 / num_positives.clamp_min(1), form.negatives / num_negatives.clamp_min(1)


def _num_rows(form: LossForm, row_labels: Tensor, column_labels: Tensor) -> Tensor:
    """How many rows the mean is over: all, or for InfoNCE those with a positive; at least 1."""
    if form.name == "nce":
        return torch.full((), max(1, len(row_labels)), device=row_labels.device)  # no copy to wait for
    ordered = column_labels.sort().values
    counts = torch.searchsorted(ordered, row_labels, right=True) - torch.searchsorted(ordered, row_labels)
    if form.exclude_self:
        counts -= (row_labels == column_labels).long()
    return (counts > 0).sum().clamp_min(1)


def _through_unit_rows(side: Tensor, unit: Tensor, grad_unit: Tensor) -> Tensor:
    """The gradient for the rows of `side`, given that for their unit rows: what is left across the row."""
    along = (unit * grad_unit).sum(1, keepdim=True)
    grad_side = (grad_unit - unit * along) * inverse_norms(side.to(unit))
    return grad_side.to(saved_dtype(side.dtype)).contiguous()
