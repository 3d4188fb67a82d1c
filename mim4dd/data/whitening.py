"""ZCA whitening: pixels made uncorrelated, as is common in trajectory matching."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .pixels import chunks, unit

EPSILON = 0.1  # added to the variances, as published


@dataclass(frozen=True)
class Whitening:
    """The map x -> (x - mean) @ matrix of flattened pixels in [0, 1], D = C * H * W of them.

    Attributes:
        mean: float32 [D].
        matrix: float32 [D, D], symmetric: (covariance + 0.1)^-1/2.
    """

    mean: Tensor
    matrix: Tensor

    def to(self, device: torch.device | str) -> Whitening:
        """The same map on another device."""
        return Whitening(self.mean.to(device), self.matrix.to(device))

    @classmethod
    def fit(cls, images: Tensor) -> Whitening:
        """Return the whitening of images [N, C, H, W], uint8 or float32 in [0, 1]."""
        size = images[0].numel()
        total = torch.zeros(size, dtype=torch.float64, device=images.device)
        square = torch.zeros(size, size, dtype=torch.float64, device=images.device)
        for chunk in chunks(images):
            # Around middle grey, so that the difference below does not cancel digits of float32 products.
            pixels = unit(chunk).flatten(1) - 0.5
            total += pixels.sum(0, dtype=torch.float64)
            square += pixels.T @ pixels
        mean = total / len(images)
        covariance = (square - len(images) * mean.outer(mean)) / max(len(images) - 1, 1)
        variances, directions = torch.linalg.eigh(covariance)
        matrix = directions * (variances.clamp_min(0) + EPSILON).rsqrt() @ directions.T
        return cls((mean + 0.5).float(), matrix.float())

    def apply(self, images: Tensor) -> Tensor:
        """Whiten images [n, C, H, W], uint8 or float32 in [0, 1]: float32 of the same shape."""
        whitened = [(unit(chunk).flatten(1) - self.mean) @ self.matrix for chunk in chunks(images)]
        return torch.cat(whitened).view(images.shape)

    def invert(self, images: Tensor) -> Tensor:
        """Return the pixels float32 [n, C, H, W] whose whitening is `images`."""
        return (
            torch.linalg.solve(self.matrix, images.flatten(1), left=False).add(self.mean).view(images.shape)
        )
