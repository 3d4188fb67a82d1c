"""The contrastive losses as modules."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from . import calibrated_noise_ratio, info_nce_loss, nce_loss
from .calibration import register_calibration


class NCELoss(nn.Module):
    """`nce_loss` as a module; the arguments are those of the function.

    `noise_ratio="calibrated"` measures the ratio on the first batch (`calibrated_noise_ratio`) and freezes it
    in the buffer `noise_ratio`, which is empty until then. A temperature or noise ratio given as an
    `nn.Parameter` is learned.
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.1,
        noise_ratio: float | Tensor | Literal["calibrated"] = 1.0,
        negatives: float | None = None,
        symmetric: bool = False,
        exclude_self: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.negatives = negatives
        self.symmetric = symmetric
        self.exclude_self = exclude_self
        self.backend = backend
        self.noise_ratio: float | Tensor
        if isinstance(noise_ratio, str):
            if noise_ratio != "calibrated":
                raise ValueError(
                    f"mim4dd.NCELoss: noise_ratio is {noise_ratio!r}, expected a number or 'calibrated'"
                )
            register_calibration(self, "noise_ratio")
        else:
            self.noise_ratio = noise_ratio

    def forward(self, anchors: Tensor, keys: Tensor, anchor_labels: Tensor, key_labels: Tensor) -> Tensor:
        """Return the loss, a scalar; arguments and errors as in `nce_loss`."""
        if isinstance(self.noise_ratio, Tensor) and not self.noise_ratio.numel():
            self.noise_ratio = calibrated_noise_ratio(
                anchors,
                keys,
                anchor_labels,
                key_labels,
                temperature=self.temperature,
                negatives=self.negatives,
                exclude_self=self.exclude_self,
            )
        return nce_loss(
            anchors,
            keys,
            anchor_labels,
            key_labels,
            temperature=self.temperature,
            noise_ratio=self.noise_ratio,
            negatives=self.negatives,
            symmetric=self.symmetric,
            exclude_self=self.exclude_self,
            backend=self.backend,
        )


class InfoNCELoss(nn.Module):
    """`info_nce_loss` as a module; a temperature given as an `nn.Parameter` is learned."""

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.1,
        positives: str = "each",
        symmetric: bool = False,
        exclude_self: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.positives = positives
        self.symmetric = symmetric
        self.exclude_self = exclude_self
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
            positives=self.positives,
            symmetric=self.symmetric,
            exclude_self=self.exclude_self,
            backend=self.backend,
        )
