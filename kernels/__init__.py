"""Triton kernels of the contrastive losses.

They take tensors and know nothing of distillation. `contrast` is the door; `skinny` and `blocks` are the two
ways through, chosen by the number of pairs.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from mim4dd.reference import Objective, saved_dtype

from . import blocks, skinny

__all__ = ["contrast"]

# Up to here the logits of a layer are scratch of at most 16 MiB, which stays in the L2 of a large GPU.
SKINNY_PAIRS = 1 << 22


def contrast(
    objective: Objective,
    scales: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    anchors: Sequence[Tensor],
    keys: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The losses [L] of L layers, then gradients by scales, anchors and keys, empty where not `wanted`.

    Args:
        objective: which loss.
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
        guard = torch.cuda.device(scales.device) if scales.is_cuda else nullcontext()
        with guard, torch.autocast(scales.device.type, enabled=False):
            if m * n <= SKINNY_PAIRS:
                results = skinny.contrast(
                    objective, scales.contiguous(), *labels, aligned[:layers], aligned[layers:], wanted
                )
            else:
                single = [
                    blocks.contrast(
                        objective,
                        scales[:, layer : layer + 1].contiguous(),
                        *labels,
                        aligned[layer],
                        aligned[layers + layer],
                        wanted,
                    )
                    for layer in range(layers)
                ]
                columns = [list(column) for column in zip(*single, strict=True)]
                results = [torch.cat(columns[0]), torch.cat(columns[1], 1), *columns[2], *columns[3]]
    else:
        results = [scales.new_zeros(layers), torch.zeros_like(scales)]
        results += [torch.zeros_like(value, dtype=saved_dtype(value.dtype)) for value in features]
    losses, by_scales, *by_features = results
    return [
        losses,
        by_scales if wanted[0] else by_scales.new_empty(0),
        *(
            by_feature[:, : feature.shape[1]].contiguous()
            if wanted[1 + index // layers]
            else by_feature.new_empty(0)
            for index, (feature, by_feature) in enumerate(zip(features, by_features, strict=True))
        ),
    ]


def _aligned(features: Tensor) -> Tensor:
    """Contiguous rows at multiples of 16 features: otherwise loads are neither wide nor pipelined."""
    if features.shape[1] % 16 or not features.shape[1]:
        return F.pad(features, (0, 16 - features.shape[1] % 16))
    features = features.contiguous()
    return features if features.data_ptr() % 16 == 0 else features.clone()
