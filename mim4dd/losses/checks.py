"""What the contrastive losses accept; every error names the argument, what it is and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_DTYPES = (torch.int32, torch.int64)
NUMBERS = (Real, torch.SymFloat, torch.SymInt)  # the last two where a number is traced


def check_tensor(function: str, name: str, value: object, dtypes: Sequence[torch.dtype]) -> None:
    """A tensor of one of these dtypes."""
    if isinstance(value, Tensor) and value.dtype in dtypes:
        return
    found = f"has dtype {value.dtype}" if isinstance(value, Tensor) else f"is of type {type(value).__name__}"
    expected = " or ".join([str(dtype).removeprefix("torch.") for dtype in dtypes])
    raise ValueError(f"mim4dd.{function}: {name} {found}, expected a tensor of {expected}; convert it")


def check_layers(function: str, anchors: Any, keys: Any) -> None:
    """Both a sequence of tensors, as many of them and at least one."""
    for name, layers in (("anchors", anchors), ("keys", keys)):
        if isinstance(layers, Tensor) or not isinstance(layers, Sequence):
            found = f"a tensor {list(layers.shape)}" if isinstance(layers, Tensor) else type(layers).__name__
            raise ValueError(
                f"mim4dd.{function}: {name} is {found}, expected a list, one tensor [rows, width] per layer"
            )
    if not anchors or len(anchors) != len(keys):
        raise ValueError(
            f"mim4dd.{function}: anchors has {len(anchors)} layers, keys {len(keys)}; "
            "expected the same number, at least 1"
        )


def check_features(
    function: str, anchors: Tensor, keys: Tensor, *, names: tuple[str, str] = ("anchors", "keys")
) -> None:
    """Both [rows, width], floating, of one width, on one device."""
    for name, value in zip(names, (anchors, keys), strict=True):
        check_tensor(function, name, value, FEATURE_DTYPES)
        if value.ndim != 2:
            raise ValueError(f"mim4dd.{function}: {name} is {list(value.shape)}, expected [rows, width]")
    if anchors.shape[1] != keys.shape[1]:
        raise ValueError(
            f"mim4dd.{function}: features differ in width, {names[0]} is {list(anchors.shape)} and "
            f"{names[1]} is {list(keys.shape)}"
        )
    if anchors.device != keys.device:
        raise ValueError(
            f"mim4dd.{function}: {names[0]} is on {anchors.device} and {names[1]} on {keys.device}; "
            "move one of them"
        )


def check_labels(
    function: str,
    anchors: Tensor,
    keys: Tensor,
    anchor_labels: Tensor | None,
    key_labels: Tensor | None,
    *,
    names: tuple[str, str] = ("anchor_labels", "key_labels"),
) -> tuple[Tensor, Tensor]:
    """Return the labels: one int32 or int64 for each row, on the device of the features."""
    for name, labels, rows in zip(names, (anchor_labels, key_labels), (anchors, keys), strict=True):
        if labels is None:
            raise ValueError(f"mim4dd.{function}: {name} is None, expected labels for both sides")
        check_tensor(function, name, labels, LABEL_DTYPES)
        if labels.shape != rows.shape[:1]:
            raise ValueError(
                f"mim4dd.{function}: {name} is {list(labels.shape)}, expected [{len(rows)}], one per row"
            )
        if labels.device != rows.device:
            raise ValueError(
                f"mim4dd.{function}: {name} is on {labels.device} and the features on {rows.device}; "
                "move one of them"
            )
    assert anchor_labels is not None
    assert key_labels is not None
    return anchor_labels, key_labels


def check_self(function: str, exclude_self: bool, anchors: Tensor, keys: Tensor) -> None:
    """Leaving out the pairs (i, i) takes as many keys as anchors."""
    if exclude_self and anchors.shape[0] != keys.shape[0]:  # in `torch.export` a `len` would be a constant
        raise ValueError(
            f"mim4dd.{function}: exclude_self leaves out the pair of anchor i and key i, but anchors is "
            f"{list(anchors.shape)} and keys is {list(keys.shape)}; expected as many keys as anchors"
        )


def check_positives(function: str, positives: object) -> None:
    """How the positives of an anchor count: each, or any of them."""
    if positives not in ("each", "any"):
        raise ValueError(f"mim4dd.{function}: positives is {positives!r}, expected 'each' or 'any'")


def check_negatives(function: str, negatives: object) -> None:
    """None or a positive number; not a tensor, whose gradient would be dropped."""
    if negatives is None:
        return
    if not isinstance(negatives, NUMBERS):
        value = "a tensor, which would get no gradient" if isinstance(negatives, Tensor) else repr(negatives)
        raise ValueError(
            f"mim4dd.{function}: negatives is {value}, expected a positive number or None; give a float"
        )
    check_positive(function, "negatives", negatives)


def check_positive(function: str, name: str, value: object, dtype: torch.dtype = torch.float32) -> None:
    """A positive number within the range of `dtype`, or a tensor of one, checked if it is on the CPU.

    Reading other values would wait for the device, and cannot be traced: `assert_positive` checks those.
    """
    smallest, largest = _range_of(dtype)
    if not isinstance(value, (Tensor, *NUMBERS)):
        hint = "; NCELoss and calibrated_noise_ratio measure it" if str(value) == "calibrated" else ""
        raise ValueError(
            f"mim4dd.{function}: {name} is {value!r}, expected a positive number or a tensor of one{hint}"
        )
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"mim4dd.{function}: {name} is {list(value.shape)}, expected one number")
        if not value.is_floating_point():
            raise ValueError(f"mim4dd.{function}: {name} has dtype {value.dtype}, expected a floating dtype")
        if _readable(value):
            value = value.item()
    if isinstance(value, Real) and not smallest <= float(value) <= largest:
        raise ValueError(
            f"mim4dd.{function}: {name} is {value}, expected a positive number from {smallest:.3} to "
            f"{largest:.3}, the range of {dtype}"
        )


def assert_positive(function: str, scales: Tensor, **values: Sequence[float | Tensor]) -> None:
    """Stop, without waiting for it, a device whose `scales` are not all positive; `values` made them.

    On a CPU it is a RuntimeError. On a GPU it is a device-side assertion, as for a label out of range in
    `torch.nn.functional.cross_entropy`: the message is printed and the next synchronisation raises.
    """
    unread = [
        name
        for name, given in values.items()
        if any(isinstance(value, Tensor) and not _readable(value) for value in given)
    ]
    if unread:
        smallest, largest = _range_of(scales.dtype)
        message = f"mim4dd.{function}: {' or '.join(unread)} is not a positive number"
        torch._assert_async(((scales >= smallest) & (scales <= largest)).all(), message)


def _range_of(dtype: torch.dtype) -> tuple[float, float]:
    """Return the smallest and the largest number accepted; the inverse of a smaller one may overflow."""
    info = torch.finfo(dtype)
    return info.tiny, info.max


def _readable(value: Tensor) -> bool:
    """Whether the value can be read without waiting; a fake tensor, or one that is traced, has none."""
    plain = type(value) in (Tensor, torch.nn.Parameter)
    return plain and value.device.type == "cpu" and not torch.compiler.is_compiling()
