"""Contrastive losses over pairs of feature rows: NCE (the mutual-information bound) and InfoNCE.

With c_ij the cosine of anchor i and key j, both losses look at every pair once; labels say which pairs are
positive (same label) and which negative. Rows are normalised inside; a zero row has no direction, so its
cosines and its gradient are 0; a row whose squares leave float32 counts as one. No large M x N matrix is held
in memory. Under autocast nothing changes: the features are used in the dtype they come in, sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .calibration import calibrated_noise_ratio
from .checks import (
    check_features,
    check_labels,
    check_layers,
    check_negatives,
    check_positives,
    check_self,
)
from .contrastive import contrastive_losses
from .form import LossForm
from .scales import one_dtype, scales_of

__all__ = ["calibrated_noise_ratio", "info_nce_loss", "info_nce_losses", "nce_loss", "nce_losses"]


def nce_loss(
    anchors: Tensor,
    keys: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    noise_ratio: float | Tensor = 1.0,
    negatives: float | None = None,
    symmetric: bool = False,
    exclude_self: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Noise-contrastive loss over all pairs of anchors and keys (MIM4DD, NeurIPS 2023).

    The critic of a pair is h = sigmoid(x) with x = cosine / temperature - log(noise_ratio). Anchor i has P_i
    keys of its own label and Q_i of other labels, and pays

        mean over its positives of softplus(-x)  +  negatives * mean over its negatives of softplus(x);

    a missing side costs nothing. The loss is the mean over anchors.

    Args:
        anchors: float [M, D].
        keys: float [N, D].
        anchor_labels: int32 or int64 [M].
        key_labels: int32 or int64 [N].
        temperature: positive; a 0-d tensor gets its gradient.
        noise_ratio: positive; a 0-d tensor likewise.
        negatives: negatives drawn per positive; None: Q_i, the plain sum over the negatives.
        symmetric: add the same loss with the roles of anchors and keys exchanged.
        exclude_self: leave out the pairs (i, i), where anchors and keys are the same rows.
        backend: "reference", "fused", or None for the best that runs here.

    Returns:
        A scalar, float32 (float64 for float64 features); 0 if there are no anchors.

    Raises:
        ValueError: shapes, dtypes, labels or hyper-parameters do not fit; the message names the argument.
        RuntimeError: `backend="fused"` where the fused kernels cannot run; or, on a GPU or under
            `torch.compile`, a tensor that is not positive (on a GPU by a device-side assertion, so later).
    """
    return _losses(
        "nce_loss",
        [anchors],
        [keys],
        anchor_labels,
        key_labels,
        temperature,
        [noise_ratio],
        LossForm("nce", negatives, symmetric, exclude_self),
        backend,
    )[0]


def nce_losses(
    anchors: Sequence[Tensor],
    keys: Sequence[Tensor],
    anchor_labels: Tensor,
    key_labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    noise_ratio: float | Tensor | Sequence[float | Tensor] = 1.0,
    negatives: float | None = None,
    symmetric: bool = False,
    exclude_self: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`nce_loss` of each of L layers: feature maps of the same images, so the labels are shared.

    On the fused path the layers share their launches.

    Args:
        anchors: L tensors, float [M, D_l]; the widths may differ.
        keys: L tensors, float [N, D_l].
        anchor_labels: int32 or int64 [M].
        key_labels: int32 or int64 [N].
        temperature: one for all layers, as in `nce_loss`.
        noise_ratio: one for all layers or one for each, as in `nce_loss`.
        negatives: as in `nce_loss`.
        symmetric: as in `nce_loss`.
        exclude_self: as in `nce_loss`.
        backend: as in `nce_loss`.

    Returns:
        [L], float32 (float64 for float64 features).

    Raises:
        ValueError: as in `nce_loss`; or there is no layer, or the numbers of layers differ.
        RuntimeError: as in `nce_loss`.
    """
    check_layers("nce_losses", anchors, keys)
    given: Any = noise_ratio  # what is neither number nor tensor, a string too, is refused by name
    several = isinstance(given, Sequence) and not isinstance(given, str)
    ratios = [*given] if several else [given] * len(anchors)
    return _losses(
        "nce_losses",
        anchors,
        keys,
        anchor_labels,
        key_labels,
        temperature,
        ratios,
        LossForm("nce", negatives, symmetric, exclude_self),
        backend,
    )


def info_nce_loss(
    anchors: Tensor,
    keys: Tensor,
    anchor_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    positives: str = "each",
    symmetric: bool = False,
    exclude_self: bool = False,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE; with labels, the supervised contrastive loss (SupCon, NeurIPS 2020).

    With z = cosine / temperature, anchor i pays the mean over its positives j of logsumexp_k z_ik - z_ij; or,
    with `positives="any"`, logsumexp_k z_ik - logsumexp_j z_ij, which one near positive is enough to make
    small: minus the logarithm of the probability that anchor i finds its label among the keys (neighbourhood
    components analysis, NeurIPS 2004; L_in of the SupCon paper, up to a constant). The loss is the mean
    over the anchors that have a positive.

    Args:
        anchors: float [M, D].
        keys: float [N, D].
        anchor_labels: int32 or int64 [M]; None: the positive of anchor i is key i, and M = N.
        key_labels: int32 or int64 [N]; None exactly when `anchor_labels` is.
        temperature: positive; a 0-d tensor gets its gradient, as in `nce_loss`.
        positives: "each" or "any".
        symmetric: add the same loss with the roles of anchors and keys exchanged.
        exclude_self: leave out the pairs (i, i), where anchors and keys are the same rows; takes labels.
        backend: "reference", "fused", or None for the best that runs here.

    Returns:
        A scalar, float32 (float64 for float64 features); 0 if no anchor has a positive.

    Raises:
        ValueError: shapes, dtypes, labels or hyper-parameters do not fit; the message names the argument.
        RuntimeError: `backend="fused"` where the fused kernels cannot run; or, on a GPU or under
            `torch.compile`, a tensor that is not positive (on a GPU by a device-side assertion, so later).
    """
    options = (temperature, positives, symmetric, exclude_self, backend)
    return _info_nce_losses("info_nce_loss", [anchors], [keys], anchor_labels, key_labels, *options)[0]


def info_nce_losses(
    anchors: Sequence[Tensor],
    keys: Sequence[Tensor],
    anchor_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    positives: str = "each",
    symmetric: bool = False,
    exclude_self: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`info_nce_loss` of each of L layers that share their labels, like `nce_losses`.

    Args:
        anchors: L tensors, float [M, D_l]; the widths may differ.
        keys: L tensors, float [N, D_l].
        anchor_labels: int32 or int64 [M], or None, as in `info_nce_loss`.
        key_labels: int32 or int64 [N], or None, as in `info_nce_loss`.
        temperature: one for all layers, as in `info_nce_loss`.
        positives: as in `info_nce_loss`.
        symmetric: as in `info_nce_loss`.
        exclude_self: as in `info_nce_loss`.
        backend: as in `info_nce_loss`.

    Returns:
        [L], float32 (float64 for float64 features).

    Raises:
        ValueError: as in `info_nce_loss`; or there is no layer, or the numbers of layers differ.
        RuntimeError: as in `info_nce_loss`.
    """
    check_layers("info_nce_losses", anchors, keys)
    options = (temperature, positives, symmetric, exclude_self, backend)
    return _info_nce_losses("info_nce_losses", anchors, keys, anchor_labels, key_labels, *options)


def _info_nce_losses(
    function: str,
    anchors: Sequence[Tensor],
    keys: Sequence[Tensor],
    anchor_labels: Tensor | None,
    key_labels: Tensor | None,
    temperature: float | Tensor,
    positives: str,
    symmetric: bool,
    exclude_self: bool,
    backend: str | None,
) -> Tensor:
    check_positives(function, positives)
    if anchor_labels is None and key_labels is None:
        if exclude_self:
            raise ValueError(
                f"mim4dd.{function}: exclude_self is {exclude_self}, but without labels the only positive of "
                "anchor i is key i, which it leaves out; give labels"
            )
        first, other = anchors[0], keys[0]
        check_features(function, first, other)
        rows = first.shape[0]  # in `torch.export` a `len` would be a constant
        if rows != other.shape[0]:
            raise ValueError(
                f"mim4dd.{function}: without labels the positive of anchor i is key i, but anchors is "
                f"{list(first.shape)}, keys is {list(other.shape)}; give labels or as many keys as anchors"
            )
        anchor_labels = key_labels = torch.arange(rows, device=first.device, dtype=torch.int32)
    name = "info_nce_any" if positives == "any" else "info_nce"
    form = LossForm(name, None, symmetric, exclude_self)
    ratios = [1.0] * len(anchors)
    return _losses(function, anchors, keys, anchor_labels, key_labels, temperature, ratios, form, backend)


def _losses(
    function: str,
    anchors: Sequence[Tensor],
    keys: Sequence[Tensor],
    anchor_labels: Tensor | None,
    key_labels: Tensor | None,
    temperature: float | Tensor,
    noise_ratios: Sequence[float | Tensor],
    form: LossForm,
    backend: str | None,
) -> Tensor:
    """The losses [L] of L layers, after all checks."""
    if len(noise_ratios) != len(anchors):
        raise ValueError(
            f"mim4dd.{function}: noise_ratio has {len(noise_ratios)} numbers, expected one or "
            f"{len(anchors)}, one per layer"
        )
    check_negatives(function, form.negatives)
    for a, k in zip(anchors, keys, strict=True):
        check_features(function, a, k)
        labels = check_labels(function, a, k, anchor_labels, key_labels)
        check_self(function, form.exclude_self, a, k)
    features = one_dtype(*anchors, *keys)
    dtype, device = features[0].dtype, features[0].device
    if backend is None and device.type == "cpu":  # also where Triton interprets kernels, which is slow
        backend = "reference"
    return contrastive_losses(
        form,
        backends.resolve(function, backend, backends.kernel_obstacle(dtype, device)),
        scales_of(function, features[0], temperature, noise_ratios),
        *labels,
        features[: len(anchors)],
        features[len(anchors) :],
    )
