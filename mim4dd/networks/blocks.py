"""The modules of the networks that are not PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .convolution import conv2d
from .first_block import first_block, is_compiled
from .normalisation import instance_norm


class InstanceNorm(nn.GroupNorm):
    """Group normalisation with one group per channel; on request, the ReLU and the pooling after it."""

    def __init__(self, channels: int, *, relu: bool = False, pool: int = 1) -> None:
        super().__init__(channels, channels)
        self.relu = relu
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, H // pool, W // pool] for x [B, C, H, W]."""
        return instance_norm(x, self.weight, self.bias, self.eps, relu=self.relu, pool=self.pool)


class _Unread(torch.autograd.Function):
    """(bias, unread) -> bias: the gradient of what is never read is zero, not missing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(bias: Tensor, unread: Tensor) -> Tensor:
        return bias.view_as(bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(grad)


class OnePassBlock(nn.Sequential):
    """A convolution and the normalisation after it.

    The normalisation cancels the convolution's bias, so it is never added. Its gradient, zero, is then free:
    oneDNN takes nine times as long for the first layer's gradients of weight and bias as for that of the
    weight alone.
    """

    @property
    def parts(self) -> tuple[nn.Conv2d, tuple[int, ...], InstanceNorm]:
        """The convolution, its padding, and the normalisation."""
        convolution, norm = self
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, InstanceNorm)
        assert not isinstance(convolution.padding, str)
        return convolution, convolution.padding, norm

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for x [B, C, H, W]."""
        convolution, padding, norm = self.parts
        assert convolution.bias is not None
        weight = convolution.weight
        bias = _Unread.apply(norm.bias, convolution.bias)
        if is_compiled(x, weight, padding):
            return first_block(
                x, weight, norm.weight, bias, norm.eps, padding=padding[0], relu=norm.relu, pool=norm.pool
            )
        x = conv2d(x, weight, padding)
        return instance_norm(x, norm.weight, bias, norm.eps, relu=norm.relu, pool=norm.pool)


class Classifier(nn.Linear):
    """A linear layer on flattened maps, or on maps as they are.

    The latter, used on a GPU, take a product for each pixel, all at once: one product, of few rows and
    thousands of features, keeps only a few processors busy, for longer than many a convolution.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, outputs] for x [B, inputs], or for maps [B, C, H, W] of so many numbers."""
        if x.ndim == 2:
            return super().forward(x)
        rows = x.flatten(2).permute(2, 0, 1)
        weight = self.weight.unflatten(1, x.shape[1:]).flatten(2).permute(2, 0, 1)
        # The weight is copied once, for the product and its gradients; of maps channels come last already.
        logits = (rows.to(weight.dtype) @ weight.contiguous().mT).sum(0)
        return logits if self.bias is None else logits + self.bias


class Residual(nn.Module):
    """ResNet-18's block, with instance normalisation: two 3x3 convolutions and a skip connection."""

    def __init__(self, before: int, wide: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, wide, 3, stride, padding=1, bias=False),
            InstanceNorm(wide),
            nn.ReLU(),
            nn.Conv2d(wide, wide, 3, padding=1, bias=False),
            InstanceNorm(wide),
        )
        self.skip = (
            nn.Identity()
            if stride == 1 and before == wide
            else nn.Sequential(nn.Conv2d(before, wide, 1, stride, bias=False), InstanceNorm(wide))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, wide, H / stride, W / stride], rounded up, for x [B, before, H, W]."""
        return (self.body(x) + self.skip(x)).relu()
