"""Noise ratios that are measured, and kept with the module they belong to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_features, check_labels, check_negatives, check_positive, check_self
from .reference import CHUNK_PAIRS, unit_rows
from .scales import one_dtype, without_autocast


def calibrated_noise_ratio(
    anchors: Tensor,
    keys: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    negatives: float | None = None,
    exclude_self: bool = False,
) -> Tensor:
    """The noise ratio at which the critic starts at its prior 1 / (1 + negatives).

    It is negatives * mean_ij exp(cosine_ij / temperature) over these features.

    Args:
        anchors: float [M, D].
        keys: float [N, D].
        anchor_labels: int32 or int64 [M].
        key_labels: int32 or int64 [N].
        temperature: as in `nce_loss`; it gets no gradient.
        negatives: as in `nce_loss`; None: the mean number of other-label keys per anchor, at least 1.
        exclude_self: as in `nce_loss`.

    Returns:
        A scalar, float32 (float64 for float64 features), detached.

    Raises:
        ValueError: as in `nce_loss`; or, on the CPU, the ratio is not finite: of empty sides, or at too low a
            temperature.
        RuntimeError: inside a transform of `torch.func`.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "mim4dd.calibrated_noise_ratio: a ratio measured inside a transform of torch.func cannot be kept "
            "after it; call the loss on a first batch outside"
        )
    function = "calibrated_noise_ratio"
    check_features(function, anchors, keys)
    anchor_labels, key_labels = check_labels(function, anchors, keys, anchor_labels, key_labels)
    check_self(function, exclude_self, anchors, keys)
    anchors, keys = one_dtype(anchors, keys)
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    check_positive(function, "temperature", temperature, dtype)
    check_negatives(function, negatives)
    m, n = len(anchors), len(keys)
    with torch.no_grad(), without_autocast(anchors):
        units, other_units = unit_rows(anchors), unit_rows(keys)
        total, num_negatives = units.new_zeros(()), units.new_zeros(())
        step = max(1, CHUNK_PAIRS // max(1, n))
        for start in range(0, m, step):
            chunk = slice(start, start + step)
            critic = (units[chunk] @ other_units.T / temperature).exp_()
            negative = anchor_labels[chunk, None] != key_labels[None, :]
            if exclude_self:
                critic.diagonal(start).fill_(0)
                negative.diagonal(start).fill_(False)
            total += critic.sum()
            num_negatives += negative.sum()
        mean = total / (m * (n - exclude_self))
        ratio = mean * ((num_negatives / m).clamp_min(1) if negatives is None else negatives)
    # Empty sides have no mean, and at a temperature below about 1/88 that of like features has no float32.
    try:
        check_positive(function, "ratio", ratio, dtype)
    except ValueError as error:
        raise ValueError(
            f"mim4dd.calibrated_noise_ratio: it is {float(ratio)} on these features; expected finite "
            "features, at least one row on either side, and a temperature that is not too low"
        ) from error
    return ratio


class Calibrated(nn.Module):
    """A module that keeps what it has measured, in float32 even under `half()`: a ratio may be e^20."""

    def register_calibration(self, name: str) -> None:
        """Make a buffer for what will be measured: empty, float32 [0], until something is assigned.

        Its shape tells whether it has been measured, without a look at the device. Loading a state dict
        restores either state.
        """
        self.register_buffer(name, torch.empty(0, dtype=torch.float32))
        self.register_load_state_dict_pre_hook(partial(_take_shape, name))

    def keep(self, name: str, measured: Tensor) -> None:
        """Assign what has been measured, from now on a constant."""
        if not torch.compiler.is_compiling() and measured.is_inference():
            with torch.inference_mode(False):  # training may come after it
                measured = measured.clone()
        setattr(self, name, measured)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, ratio in before.items():
            moved = self._buffers[name]
            if ratio is not None and moved is not None and moved.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = ratio.to(moved.device)
        return self


def _take_shape(name: str, module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    stored = state.get(prefix + name)
    if stored is not None:
        setattr(module, name, getattr(module, name).new_empty(stored.shape))
