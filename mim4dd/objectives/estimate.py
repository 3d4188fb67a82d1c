"""How much synthetic images tell about real ones: a lower bound of their mutual information, for reports."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses.checks import check_features, check_labels, check_positive
from ..losses.reference import unit_rows

TEMPERATURES = [2.0**k for k in range(-5, 7)]  # multiples of the given one that are tried
NEGATIVES = [10.0**k for k in range(5)]  # negatives per positive that are tried


@torch.no_grad()
def mutual_information_estimate(
    synthetic_features: Tensor,
    real_features: Tensor,
    synthetic_labels: Tensor,
    real_labels: Tensor,
    *,
    temperature: float = 0.1,
) -> float | None:
    """Return a lower bound, in nats, of the mutual information between a synthetic and a real feature.

    A pair is a synthetic row and a real row of its label, both drawn at random; its negatives come from the
    product of the marginals: any synthetic row with any real row, same label included. For every critic h,
    and any number v of negatives per positive,

        I >= E_pos[log h] + v E_neg[log(1 - h)] + (1 + v) log(1 + v) - v log v,

    0 for unrelated rows. (The form with log v in place of the last two terms is looser, by between 1 nat, for
    many negatives, and infinity: it never shows more than I - 1.) The critic is that of the term,
    h = sigmoid(cosine / temperature - log(v * mean_neg exp(cosine / temperature))), calibrated. Temperature
    and v are those which make the bound highest on one half of the real rows, and the bound is taken on the
    other half; then the halves change places, and the mean of the two is returned. So it holds for real
    rows that had no part in the choice; give rows that had none in the distillation either.

    A pair shares nothing but its label, so the estimate can never exceed the entropy of the labels, whatever
    the features: log C for C labels with equally many synthetic rows. It may be far below the information
    there is, since the critic knows but cosines. Below 0 it says nothing. It is None if no label has a
    synthetic row and two real ones, one for each half.

    Args:
        synthetic_features: float [M, ...], flattened to rows.
        real_features: float [N, ...], flattened to rows; rows of one label count as if drawn evenly over
            the labels' synthetic rows. Synthetic rows without a real row of their label are left out.
        synthetic_labels: int32 or int64 [M].
        real_labels: int32 or int64 [N].
        temperature: around which the critic's is looked for, positive.

    Raises:
        ValueError: shapes, dtypes or labels do not fit.
    """
    function = "mutual_information_estimate"
    synthetic, real = synthetic_features.flatten(1), real_features.flatten(1)
    check_features(function, synthetic, real, names=("synthetic_features", "real_features"))
    check_positive(function, "temperature", temperature)
    names = "synthetic_labels", "real_labels"
    labels, real_labels = check_labels(function, synthetic, real, synthetic_labels, real_labels, names=names)
    cosine = (unit_rows(synthetic) @ unit_rows(real).T).double()
    halves = [_Pairs(cosine[:, half], labels, real_labels[half]) for half in _halves(real_labels)]
    if not all(len(half.cosine) for half in halves):
        return None
    bounds = []
    for chosen_on, measured_on in (halves, halves[::-1]):
        critics = [chosen_on.critic(temperature * t, v) for t in TEMPERATURES for v in NEGATIVES]
        bounds.append(measured_on.bound(max(critics, key=chosen_on.bound)))
    return sum(bounds) / 2


def _halves(labels: Tensor) -> Iterator[Tensor]:
    """Indices of every other row of each label, and of the rest."""
    rows = [(labels == label).nonzero().squeeze(1) for label in labels.unique()] or [labels.long()]
    for first in (0, 1):
        yield torch.cat([of_label[first::2] for of_label in rows])


class _Critic(NamedTuple):
    temperature: float
    negatives: float
    log_noise_ratio: float


class _Pairs:
    """Cosines [M, N] of the pairs, and with what weights they count as positives and as negatives."""

    def __init__(self, cosine: Tensor, labels: Tensor, real_labels: Tensor) -> None:
        kept = torch.isin(labels, real_labels)
        self.cosine = cosine[kept]
        positive = (labels[kept][:, None] == real_labels).to(cosine)
        # A synthetic row at random, then a real one of its label at random; marginals are what that gives.
        self.positive = positive / positive.sum(1, keepdim=True) / len(positive)
        self.negative = self.positive.sum(0) / max(1, len(positive))  # [N], the same for every synthetic row

    def critic(self, temperature: float, negatives: float) -> _Critic:
        """The critic with the noise ratio v * E_neg[exp(cosine / temperature)]."""
        weighted = self.cosine / temperature + self.negative.log()
        return _Critic(temperature, negatives, math.log(negatives) + float(weighted.flatten().logsumexp(0)))

    def bound(self, critic: _Critic) -> float:
        v = critic.negatives
        x = self.cosine / critic.temperature - critic.log_noise_ratio
        log_h, log_not_h = -F.softplus(-x), -F.softplus(x)
        expected = (log_h * self.positive).sum() + v * (log_not_h * self.negative).sum()
        return float(expected) + (1 + v) * math.log1p(v) - v * math.log(v)
