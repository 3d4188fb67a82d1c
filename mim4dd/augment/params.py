"""The parameters of an augmentation, one row per image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

# The dtype of each field and where it lies in a row of packed parameters.
_FIELDS: dict[str, tuple[torch.dtype, int | slice]] = {
    "brightness": (torch.float32, 0),
    "saturation": (torch.float32, 1),
    "contrast": (torch.float32, 2),
    "shift_y": (torch.int64, 3),
    "shift_x": (torch.int64, 4),
    "cutout": (torch.int64, slice(5, 9)),
    "flip": (torch.bool, 9),
    "scale_x": (torch.float32, 10),
    "scale_y": (torch.float32, 11),
    "degrees": (torch.float32, 12),
}


@dataclass(frozen=True, eq=False)
class AugmentParams:
    """One row per image; every tensor has length B. The identity values change nothing.

    Fields that were drawn may share memory or be made on access: use `dataclasses.replace` instead of
    writing into them. Those of `identity` are each their own.

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

    # All fields in one, float32 [B, 13], where they were drawn together: the compiled op takes it as it is,
    # and a field is made when it is asked for. On a GPU a call costs the host time for each tensor in it.
    _packed: ClassVar[Tensor | None] = None

    @classmethod
    def of_packed(cls, packed: Tensor) -> AugmentParams:
        """Return the parameters whose fields are the columns of float32 [B, 13], cutout's four."""
        params = object.__new__(cls)
        object.__setattr__(params, "_packed", packed)
        return params

    def __getattr__(self, name: str) -> Tensor:
        if self._packed is None or name not in _FIELDS:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        dtype, where = _FIELDS[name]
        return self._packed[..., where].to(dtype, copy=True, memory_format=torch.contiguous_format)

    @classmethod
    def identity(cls, batch: int, *, device: torch.device | str = "cpu") -> AugmentParams:
        """Return the parameters of `batch` images that leave them as they are."""
        return cls(**unchanged(batch, device)).map(torch.clone)

    def __len__(self) -> int:
        return len(self.brightness)

    def __getitem__(self, rows: Tensor | slice) -> AugmentParams:
        """Return the parameters at the given rows: `params[labels]` spreads one row per class over images."""
        return self.map_rows(lambda field: field[rows])

    def fields(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {name: getattr(self, name) for name in _FIELDS}

    def stored(self) -> dict[str, Tensor]:
        """Return by name what the compiled op takes: the fields in their order, or all in one."""
        return self.fields() if self._packed is None else {"packed": self._packed}

    def to(self, device: torch.device | str) -> AugmentParams:
        """Return the parameters on a device."""
        return self.map_rows(lambda field: field.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> AugmentParams:
        """Return the parameters with a function applied to every tensor."""
        return AugmentParams(**{name: function(field) for name, field in self.fields().items()})

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> AugmentParams:
        """Do as `map` with a function that picks, repeats or moves rows and leaves numbers as they are."""
        return self.map(function) if self._packed is None else self.of_packed(function(self._packed))


def unchanged(batch: int, device: torch.device | str) -> dict[str, Tensor]:
    """Return the fields of `AugmentParams.identity`, some of which are one and the same tensor."""
    zeros = torch.zeros(batch, dtype=torch.float32, device=device)
    ones = torch.ones(batch, dtype=torch.float32, device=device)
    none = torch.zeros(batch, dtype=torch.int64, device=device)
    return {
        "brightness": zeros,
        "saturation": ones,
        "contrast": ones,
        "shift_y": none,
        "shift_x": none,
        "cutout": torch.full((batch, 4), -1, device=device),
        "flip": none.bool(),
        "scale_x": ones,
        "scale_y": ones,
        "degrees": zeros,
    }
