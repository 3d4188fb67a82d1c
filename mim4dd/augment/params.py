"""The parameters of an augmentation, one row per image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AugmentParams:
    """One row per image; every tensor has length B. The identity values change nothing.

    Fields may share memory, so make others by `dataclasses.replace` rather than write into them.

    Attributes:
        brightness: float [B], added.
        saturation: float [B], factor about the pixel's mean over channels.
        contrast: float [B], factor about the image's mean.
        shift_y: int64 [B]; the output at row y is the input at row y + shift_y, 0 outside.
        shift_x: int64 [B], likewise for columns.
        cutout: int64 [B, 4], rows y0..y1 and columns x0..x1 inclusive become 0, where they lie in the image.
        flip: bool [B], mirror left and right.
        scale_x: float [B], the output samples the input at scale_x times its distance from the centre.
        scale_y: float [B], likewise for rows.
        degrees: float [B], rotation.
    """

    brightness: Tensor
    saturation: Tensor
    contrast: Tensor
    shift_y: Tensor
    shift_x: Tensor
    cutout: Tensor
    flip: Tensor
    scale_x: Tensor
    scale_y: Tensor
    degrees: Tensor

    @classmethod
    def identity(cls, batch: int, *, device: torch.device | str = "cpu") -> AugmentParams:
        """Return the parameters of `batch` images that leave them as they are."""
        zeros = torch.zeros(batch, dtype=torch.float32, device=device)
        ones = torch.ones(batch, dtype=torch.float32, device=device)
        none = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(
            brightness=zeros,
            saturation=ones,
            contrast=ones,
            shift_y=none,
            shift_x=none,
            cutout=torch.full((batch, 4), -1, device=device),
            flip=none.bool(),
            scale_x=ones,
            scale_y=ones,
            degrees=zeros,
        )

    def __len__(self) -> int:
        return len(self.brightness)

    def __getitem__(self, rows: Tensor) -> AugmentParams:
        """Return the parameters at the given rows: `params[labels]` spreads one row per class over images."""
        return self.map(lambda field: field[rows])

    def fields(self) -> dict[str, Tensor]:
        """Return the tensors by name, in the order of the compiled op."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def to(self, device: torch.device | str) -> AugmentParams:
        """Return the parameters on a device."""
        return self.map(lambda field: field.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> AugmentParams:
        """Return the parameters with a function applied to every tensor."""
        return AugmentParams(**{name: function(field) for name, field in self.fields().items()})
