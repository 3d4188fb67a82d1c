"""Contrastive losses over pairs of feature rows: NCE (the mutual-information bound) and InfoNCE.

With c_ij the cosine of anchor i and key j, both losses look at every pair once; labels say which pairs are
positive (same label) and which negative. The functions here are the *reference*: plain PyTorch, any device,
any dtype, differentiable any number of times. Rows are normalised inside; a zero row has no direction, so
its cosines are 0 and its gradient is 0.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["InfoNCELoss", "NCELoss", "calibrated_noise_ratio", "info_nce_loss", "nce_loss"]


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
        noise_ratio: positive; a 0-d tensor gets its gradient.
        negatives: negatives drawn per positive; None: Q_i, the plain sum over the negatives.
        symmetric: add the same loss with the roles of anchors and keys exchanged.
        backend: "reference", "fused", or None for the best that runs here.

    Returns:
        A scalar, float32 (float64 for float64 features); 0 if there are no anchors.

    Raises:
        ValueError: shapes, dtypes, labels or hyper-parameters do not fit; the message names the argument.
        RuntimeError: `backend="fused"` where the fused kernels cannot run.
    """
    _check_features("nce_loss", anchors, keys)
    _check_labels("nce_loss", anchors, keys, anchor_labels, key_labels)
    _check_positive("nce_loss", temperature=temperature, noise_ratio=noise_ratio, negatives=negatives)
    _check_backend("nce_loss", backend)
    x = _cosines(anchors, keys) / temperature - _log(noise_ratio)
    positive = anchor_labels[:, None] == key_labels[None, :]
    loss = _nce_rows(x, positive, negatives)
    if symmetric:
        loss = loss + _nce_rows(x.T, positive.T, negatives)
    return loss


def info_nce_loss(
    anchors: Tensor,
    keys: Tensor,
    anchor_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    symmetric: bool = False,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE; with labels, the supervised contrastive loss (SupCon, NeurIPS 2020).

    With z = cosine / temperature, anchor i pays the mean over its positives j of logsumexp_k z_ik - z_ij. The
    loss is the mean over the anchors that have a positive.

    Args:
        anchors: float [M, D].
        keys: float [N, D].
        anchor_labels: int32 or int64 [M]; None: the positive of anchor i is key i, and M = N.
        key_labels: int32 or int64 [N]; None exactly when `anchor_labels` is.
        temperature: positive; a 0-d tensor gets its gradient.
        symmetric: add the same loss with the roles of anchors and keys exchanged.
        backend: "reference", "fused", or None for the best that runs here.

    Returns:
        A scalar, float32 (float64 for float64 features); 0 if no anchor has a positive.

    Raises:
        ValueError: shapes, dtypes, labels or hyper-parameters do not fit; the message names the argument.
        RuntimeError: `backend="fused"` where the fused kernels cannot run.
    """
    _check_features("info_nce_loss", anchors, keys)
    _check_positive("info_nce_loss", temperature=temperature)
    _check_backend("info_nce_loss", backend)
    if anchor_labels is None and key_labels is None:
        if len(anchors) != len(keys):
            raise ValueError(
                "mim4dd.info_nce_loss: without labels the positive of anchor i is key i, but anchors is "
                f"{list(anchors.shape)}, keys is {list(keys.shape)}; give labels or as many keys as anchors"
            )
        anchor_labels = key_labels = torch.arange(len(anchors), device=anchors.device)
    _check_labels("info_nce_loss", anchors, keys, anchor_labels, key_labels)
    assert anchor_labels is not None
    assert key_labels is not None
    z = _cosines(anchors, keys) / temperature
    positive = anchor_labels[:, None] == key_labels[None, :]
    loss = _info_nce_rows(z, positive)
    if symmetric:
        loss = loss + _info_nce_rows(z.T, positive.T)
    return loss


def calibrated_noise_ratio(
    anchors: Tensor,
    keys: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    negatives: float | None = None,
) -> Tensor:
    """The noise ratio at which the critic starts at its prior 1 / (1 + negatives): a 0-d tensor, detached.

    It is negatives * mean_ij exp(cosine_ij / temperature) over these features; `negatives=None` takes the
    mean number of other-label keys per anchor. Shapes and errors as in `nce_loss`.
    """
    _check_features("calibrated_noise_ratio", anchors, keys)
    _check_labels("calibrated_noise_ratio", anchors, keys, anchor_labels, key_labels)
    with torch.no_grad():
        z = _cosines(anchors, keys) / temperature
        if negatives is not None:
            return z.exp().mean() * negatives
        different = anchor_labels[:, None] != key_labels[None, :]
        return z.exp().mean() * different.to(z).sum(1).mean().clamp_min(1)


class NCELoss(nn.Module):
    """`nce_loss` as a module; the arguments are those of the function.

    `noise_ratio="calibrated"` measures the ratio on the first batch (`calibrated_noise_ratio`) and freezes it
    in the buffer `noise_ratio`, which is NaN until then. A temperature or noise ratio given as an
    `nn.Parameter` is learned.
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.1,
        noise_ratio: float | Tensor | Literal["calibrated"] = 1.0,
        negatives: float | None = None,
        symmetric: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.negatives = negatives
        self.symmetric = symmetric
        self.backend = backend
        self.noise_ratio: float | Tensor
        self._uncalibrated = isinstance(noise_ratio, str)
        if isinstance(noise_ratio, str):
            if noise_ratio != "calibrated":
                raise ValueError(
                    f"mim4dd.NCELoss: noise_ratio is {noise_ratio!r}, expected a number or 'calibrated'"
                )
            self.register_buffer("noise_ratio", torch.tensor(math.nan))
            self.register_load_state_dict_post_hook(_forget_calibration)
        else:
            self.noise_ratio = noise_ratio

    def forward(self, anchors: Tensor, keys: Tensor, anchor_labels: Tensor, key_labels: Tensor) -> Tensor:
        """Return the loss, a scalar; arguments and errors as in `nce_loss`."""
        if self._uncalibrated:
            self.noise_ratio = calibrated_noise_ratio(
                anchors,
                keys,
                anchor_labels,
                key_labels,
                temperature=self.temperature,
                negatives=self.negatives,
            )
            self._uncalibrated = False
        return nce_loss(
            anchors,
            keys,
            anchor_labels,
            key_labels,
            temperature=self.temperature,
            noise_ratio=self.noise_ratio,
            negatives=self.negatives,
            symmetric=self.symmetric,
            backend=self.backend,
        )


class InfoNCELoss(nn.Module):
    """`info_nce_loss` as a module; a temperature given as an `nn.Parameter` is learned."""

    def __init__(
        self, *, temperature: float | Tensor = 0.1, symmetric: bool = False, backend: str | None = None
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.symmetric = symmetric
        self.backend = backend

    def forward(
        self,
        anchors: Tensor,
        keys: Tensor,
        anchor_labels: Tensor | None = None,
        key_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a scalar; arguments and errors as in `info_nce_loss`."""
        return info_nce_loss(
            anchors,
            keys,
            anchor_labels,
            key_labels,
            temperature=self.temperature,
            symmetric=self.symmetric,
            backend=self.backend,
        )


# ------------------------------------------------------------------------------------------ reference maths


def _unit_rows(features: Tensor) -> Tensor:
    """Return rows of length 1, at least in float32; a zero row stays zero and passes no gradient."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    squared = features.square().sum(1, keepdim=True)
    zero = squared == 0
    return features * torch.where(zero, 0, torch.where(zero, 1, squared).rsqrt())


def _cosines(anchors: Tensor, keys: Tensor) -> Tensor:
    return _unit_rows(anchors) @ _unit_rows(keys).T


def _log(value: float | Tensor) -> float | Tensor:
    return value.log() if isinstance(value, Tensor) else math.log(value)


def _nce_rows(x: Tensor, positive: Tensor, negatives: float | None) -> Tensor:
    """Mean over rows of the NCE loss of critic logits x [M, N], positive [M, N] bool."""
    if not len(x):
        return x.sum()
    num_positives = positive.sum(1)
    num_negatives = x.shape[1] - num_positives
    on_positives = torch.where(positive, F.softplus(-x), 0).sum(1) / num_positives.clamp_min(1)
    on_negatives = torch.where(positive, 0, F.softplus(x)).sum(1)
    if negatives is not None:
        on_negatives = on_negatives * negatives / num_negatives.clamp_min(1)
    return (on_positives + on_negatives).mean()


def _info_nce_rows(z: Tensor, positive: Tensor) -> Tensor:
    """Mean over rows with a positive of the InfoNCE loss of logits z [M, N], positive [M, N] bool."""
    num_positives = positive.sum(1)
    has_positive = num_positives > 0
    if not z.numel():
        return z.sum()
    mean_positive = torch.where(positive, z, 0).sum(1) / num_positives.clamp_min(1)
    row = torch.where(has_positive, z.logsumexp(1) - mean_positive, 0)
    return row.sum() / has_positive.sum().clamp_min(1)


def _forget_calibration(module: NCELoss, _: object) -> None:
    """After a state dict is loaded: a calibrated ratio in it is kept, a NaN is measured anew."""
    module._uncalibrated = bool(torch.as_tensor(module.noise_ratio).isnan())


# ------------------------------------------------------------------------------------------------- checks


def _check_features(function: str, anchors: Tensor, keys: Tensor) -> None:
    for name, value in (("anchors", anchors), ("keys", keys)):
        if value.ndim != 2:
            raise ValueError(f"mim4dd.{function}: {name} is {list(value.shape)}, expected [rows, width]")
        if not value.is_floating_point():
            raise ValueError(f"mim4dd.{function}: {name} has dtype {value.dtype}, expected a floating dtype")
    if anchors.shape[1] != keys.shape[1]:
        raise ValueError(
            f"mim4dd.{function}: features differ in width, anchors is {list(anchors.shape)} and keys is "
            f"{list(keys.shape)}"
        )
    if anchors.device != keys.device:
        raise ValueError(
            f"mim4dd.{function}: anchors is on {anchors.device} and keys on {keys.device}; move one of them"
        )


def _check_labels(
    function: str, anchors: Tensor, keys: Tensor, anchor_labels: Tensor | None, key_labels: Tensor | None
) -> None:
    for name, labels, rows in (("anchor_labels", anchor_labels, anchors), ("key_labels", key_labels, keys)):
        if labels is None:
            raise ValueError(f"mim4dd.{function}: {name} is None, but the labels of the other side are given")
        if labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"mim4dd.{function}: {name} has dtype {labels.dtype}, expected int32 or int64")
        if labels.shape != rows.shape[:1]:
            raise ValueError(
                f"mim4dd.{function}: {name} is {list(labels.shape)}, expected [{len(rows)}], one label a row"
            )


def _check_positive(function: str, **values: float | Tensor | None) -> None:
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"mim4dd.{function}: {name} is {list(value.shape)}, expected one number")
        elif value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"mim4dd.{function}: {name} is {value}, expected a positive number")


def _check_backend(function: str, backend: str | None) -> None:
    if backend not in (None, "reference", "fused"):
        raise ValueError(f"mim4dd.{function}: backend is {backend!r}, expected 'reference', 'fused' or None")
    if backend == "fused":
        raise RuntimeError(
            f"mim4dd.{function}: backend='fused' cannot run, this version has no fused kernels; use None"
        )
