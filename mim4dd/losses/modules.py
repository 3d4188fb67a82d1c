"""The contrastive losses as modules; they refuse at once settings that are wrong for any features."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .. import backends
from . import calibrated_noise_ratio, info_nce_loss, nce_loss
from .calibration import Calibrated
from .checks import check_negatives, check_positive, check_positives


class NCELoss(Calibrated):
    """`nce_loss` as a module; the arguments are those of the function.

    `noise_ratio="calibrated"` measures the ratio on the first batch (`calibrated_noise_ratio`) and freezes it
    in the buffer `noise_ratio`, which is empty until then. A temperature or noise ratio given as an
    `nn.Parameter` is learned.

    Raises:
        ValueError: a setting that is wrong whatever the features; the message names it.
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
        check_positive("NCELoss", "temperature", temperature, torch.float64)
        check_negatives("NCELoss", negatives)
        backends.resolve("NCELoss", backend, None)
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
            self.register_calibration("noise_ratio")
        else:
            check_positive("NCELoss", "noise_ratio", noise_ratio, torch.float64)
            self.noise_ratio = noise_ratio

    def forward(self, anchors: Tensor, keys: Tensor, anchor_labels: Tensor, key_labels: Tensor) -> Tensor:
        """Return the loss, a scalar; arguments and errors as in `nce_loss`."""
        if isinstance(self.noise_ratio, Tensor) and not self.noise_ratio.numel():
            ratio = calibrated_noise_ratio(
                anchors,
                keys,
                anchor_labels,
                key_labels,
                temperature=self.temperature,
                negatives=self.negatives,
                exclude_self=self.exclude_self,
            )
            self.keep("noise_ratio", ratio)
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

    def extra_repr(self) -> str:
        """Return its settings, except those learned or measured."""
        return _settings(
            self, "temperature", "noise_ratio", "negatives", "symmetric", "exclude_self", "backend"
        )


class InfoNCELoss(nn.Module):
    """`info_nce_loss` as a module; a temperature given as an `nn.Parameter` is learned.

    Raises:
        ValueError: a setting that is wrong whatever the features; the message names it.
    """

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
        check_positive("InfoNCELoss", "temperature", temperature, torch.float64)
        check_positives("InfoNCELoss", positives)
        backends.resolve("InfoNCELoss", backend, None)
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

    def extra_repr(self) -> str:
        """Return its settings, except those learned."""
        return _settings(self, "temperature", "positives", "symmetric", "exclude_self", "backend")


def _settings(module: nn.Module, *names: str) -> str:
    values = {name: getattr(module, name) for name in names}
    return ", ".join(f"{name}={value!r}" for name, value in values.items() if not isinstance(value, Tensor))
