"""Triton kernels of the contrastive losses, and of the ConvNet's blocks.

They take tensors and know nothing of distillation. `contrast` is the entry point of the losses; `skinny`,
`narrow` and `wide` are its implementations, chosen by the number of pairs and of features. `first_block`,
`normalisation` and `grad_weight` are what `mim4dd.networks` runs on a GPU.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from mim4dd.losses.form import LossForm, saved_dtype

from . import narrow, skinny, wide
from .autotune import tuned
from .launch import on_device_of, precision_of

__all__ = ["contrast"]

# Up to here the logits of a layer are scratch of at most 16 MiB, which stays in the L2 of a large GPU.
SKINNY_PAIRS = 1 << 22


def contrast(
    form: LossForm,
    scales: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    anchors: Sequence[Tensor],
    keys: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The losses [L] of L layers, then gradients for scales, anchors and keys, empty where not `wanted`.

    Args:
        form: which loss.
        scales: float32 [2, L], temperature and noise ratio of each layer.
        anchor_labels: int32 or int64 [M].
        key_labels: int32 or int64 [N].
        anchors: L tensors [M, D_l], float32, bfloat16 or float16.
        keys: L tensors [N, D_l] of that dtype.
        wanted: of which of scales, anchors and keys the gradients are wanted.
    """
    layers, m, n = len(anchors), len(anchors[0]), len(keys[0])
    features = [*anchors, *keys]
    if m and n:
        aligned = [_aligned(value) for value in features]
        labels = anchor_labels.contiguous(), key_labels.contiguous()
        call = partial(_contrast, form, scales, *labels, aligned[:layers], aligned[layers:], wanted)
        unchanged = torch.autocast(scales.device.type, enabled=False)
        with on_device_of(scales), unchanged, _tuned(form, aligned, m, n, wanted, call):
            results = call()
    else:
        results = [scales.new_zeros(layers), torch.zeros_like(scales)]
        results += [torch.zeros_like(value, dtype=saved_dtype(value.dtype)) for value in features]
    losses, grad_scales, *grad_features = results
    return [
        losses,
        grad_scales if wanted[0] else grad_scales.new_empty(0),
        *(
            grad_feature[:, : feature.shape[1]].contiguous()
            if wanted[1 + index // layers]
            else feature.new_empty(0, dtype=saved_dtype(feature.dtype))
            for index, (feature, grad_feature) in enumerate(zip(features, grad_features, strict=True))
        ),
    ]


def _contrast(
    form: LossForm,
    scales: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    anchors: Sequence[Tensor],
    keys: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """`contrast` of aligned features, through the path for their number of pairs."""
    labels = anchor_labels, key_labels
    if len(anchors[0]) * len(keys[0]) <= SKINNY_PAIRS:
        return skinny.contrast(form, scales.contiguous(), *labels, anchors, keys, wanted)
    single = [
        _way(a).contrast(form, scales[:, layer : layer + 1].contiguous(), *labels, a, k, wanted)
        for layer, (a, k) in enumerate(zip(anchors, keys, strict=True))
    ]
    losses, grad_scales, grad_anchors, grad_keys = ([*column] for column in zip(*single, strict=True))
    return [torch.cat(losses), torch.cat(grad_scales, 1), *grad_anchors, *grad_keys]


def _way(features: Tensor) -> ModuleType:
    """The module that goes through a layer's many pairs.

    Without tensor cores the library's products are several times faster than those of a kernel, so float32
    that must stay float32 leaves as few as possible to the kernels.
    """
    few = features.shape[1] <= narrow.WIDEST and precision_of(features.dtype) != "ieee"
    return narrow if few else wide


def _tuned(
    form: LossForm,
    features: Sequence[Tensor],
    m: int,
    n: int,
    wanted: Sequence[bool],
    call: Callable[[], object],
) -> AbstractContextManager[None]:
    """Search launch configurations if asked to; sizes within a power of two share theirs."""
    if os.environ.get("MIM4DD_AUTOTUNE") != "1":
        return nullcontext()
    widths = {value.shape[1] for value in features}
    if m * n <= SKINNY_PAIRS:
        tables = ["DOTS", "PRODUCT"]
    else:
        names = {_way(value).table_name(form, wanted, value.shape[1]) for value in features}
        tables = [*([] if form.name == "nce" else ["SUMS"]), *sorted(names)]
    sizes = [str((size - 1).bit_length()) for size in (m, n, *sorted(widths))]
    asked = "".join(str(int(each)) for each in (form.symmetric, *wanted))  # other work for the same table
    kind = "-".join([*tables, form.name, asked, precision_of(features[0].dtype), *sizes])
    return tuned(kind, tables, features[0], call)


def _aligned(features: Tensor) -> Tensor:
    """Contiguous rows at multiples of 16 features: otherwise loads are neither wide nor pipelined."""
    if features.shape[1] % 16 or not features.shape[1]:
        return F.pad(features, (0, 16 - features.shape[1] % 16))
    features = features.contiguous()
    return features if features.data_ptr() % 16 == 0 else features.clone()
