"""The 3x3 convolution with padding 1 and its gradients by torch's operators, with channels last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(x: Tensor, weight: Tensor, turned: bool, groups: int = 1) -> Tensor:
    """Return y of x, or if `turned`, grad_x of grad_y: a convolution with the weight turned round."""
    weight = turned_round(weight, groups) if turned else _channels_last(weight)
    return F.conv2d(_channels_last(x), weight, padding=1, groups=groups)


def turned_round(weight: Tensor, groups: int) -> Tensor:
    """Return the weight turned round, inputs for outputs, with channels last: by one launch."""
    taps = weight.unflatten(0, (groups, -1)).flatten(3).unbind(3)
    turned = torch.stack([tap.transpose(1, 2) for tap in reversed(taps)], 2)
    return turned.flatten(0, 1).unflatten(1, weight.shape[2:]).movedim(3, 1)


def grad_weight(grad_y: Tensor, x: Tensor, groups: int = 1) -> Tensor:
    """Return the gradient of the weight [O, I / groups, 3, 3] of grad_y [B, O, H, W] and x [B, I, H, W]."""
    shape = grad_y.shape[1], x.shape[1] // groups, 3, 3
    weight = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    one, wanted = [1, 1], (False, True, False)
    return torch.ops.aten.convolution_backward(
        _channels_last(grad_y), _channels_last(x), weight, None, one, one, one, False, [0, 0], groups, wanted
    )[1]


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)
