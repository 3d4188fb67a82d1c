"""Differentiable siamese augmentation (DSA, ICML 2021): sample parameters, apply them to a batch of images.

Sampling and applying are apart so that one set of parameters can serve real and synthetic images alike:
draw a row per class, then `params[labels]` gives every image the row of its class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import extension
from . import op, reference

DSA = "color_crop_cutout_flip_scale_rotate"

BRIGHTNESS = 1.0
SATURATION = 2.0
CONTRAST = 0.5
CROP = 0.125  # of the side
CUTOUT = 0.5  # of the side
SCALE = 1.2
ROTATE = 15.0  # degrees


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
        zeros = torch.zeros(batch, device=device)
        ones = torch.ones(batch, device=device)
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
        return self._map(lambda field: field[rows])

    def fields(self) -> dict[str, Tensor]:
        """Return the tensors by name, in the order of the compiled op."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def _map(self, function: Callable[[Tensor], Tensor]) -> AugmentParams:
        return AugmentParams(**{name: function(field) for name, field in self.fields().items()})


def sample(
    strategy: str,
    batch: int,
    image_size: int | tuple[int, int],
    *,
    generator: torch.Generator,
    siamese: bool = False,
    mode: str = "single",
) -> AugmentParams:
    """Draw augmentation parameters on the generator's device, without a host synchronisation.

    Args:
        strategy: parts joined by "_", of color, crop, cutout, flip, scale, rotate; "" or "none" for none.
        batch: number of rows.
        image_size: height and width, or one side.
        generator: the only source of randomness.
        siamese: draw one row and repeat it.
        mode: "single" draws one part of the strategy per call, "each" one per row (what the published siamese
            augmentation does, a call per class), "all" applies every part.

    Raises:
        ValueError: an unknown part or mode.
    """
    parts = parts_of(strategy)
    if mode not in ("single", "each", "all"):
        raise ValueError(f"mim4dd.augment.sample: mode is {mode!r}, expected 'single', 'each' or 'all'")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    rows = 1 if siamese else batch
    fields = AugmentParams.identity(rows, device=generator.device).fields()
    if mode == "all" or not parts:
        for part in parts:
            fields |= _DRAW[part](rows, size, generator)
    elif mode == "single" and generator.device.type == "cpu":
        fields |= _DRAW[parts[int(torch.randint(len(parts), (), generator=generator))]](rows, size, generator)
    else:  # on a GPU, looking at the choice would wait for it
        count = (1 if mode == "single" else rows, 1)
        chosen = torch.randint(len(parts), count, generator=generator, device=generator.device)
        for k, part in enumerate(parts):
            for name, value in _DRAW[part](rows, size, generator).items():
                mask = chosen == k
                fields[name] = torch.where(mask if value.ndim > 1 else mask[:, 0], value, fields[name])
    params = AugmentParams(**fields)
    if siamese:
        params = params._map(lambda field: field.expand(batch, *field.shape[1:]))
    return params


def parts_of(strategy: str) -> list[str]:
    """Return the parts of a strategy string.

    Raises:
        ValueError: an unknown part.
    """
    parts = [] if strategy in ("", "none") else strategy.split("_")
    for part in parts:
        if part not in _DRAW:
            raise ValueError(
                f"mim4dd.augment: unknown part {part!r} of strategy {strategy!r}, expected some of {DSA}"
            )
    return parts


def pad_and_crop(batch: int, padding: int, *, generator: torch.Generator) -> AugmentParams:
    """Draw the usual random crop: pad with `padding` zeros on every side, cut the old size out anywhere.

    Raises:
        ValueError: negative padding.
    """
    if padding < 0:
        raise ValueError(f"mim4dd.augment.pad_and_crop: padding is {padding}, expected 0 or more pixels")
    identity = AugmentParams.identity(batch, device=generator.device)
    return dataclasses.replace(identity, **_draw_shifts(batch, (padding, padding), generator))


def apply(
    images: Tensor,
    params: AugmentParams,
    *,
    rows: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    align_corners: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Augment images: colour, then one resampling (shift, flip, scale, rotate composed), then cutout.

    Colour is brightness, saturation, contrast in this order; resampling is bilinear with zeros outside, and
    exact where only shifts and flips are asked for. Differentiable in the images, any number of times.

    Args:
        images: [B, C, H, W], any strides; float16, bfloat16, float32 or float64, or uint8, which is taken as
            a fraction of 255. At most 16384 channels and pixels a side. Sums are in float32 at least.
        params: B rows, or any number of them where `rows` says which image takes which.
        rows: int64 [B], the row of each image; labels, where there is a row per class.
        mean: float32 [C], subtracted from the images first, of pixels in [0, 1]. Given with `std`.
        std: float32 [C], what the images are then divided by.
        align_corners: the meaning of a normalised coordinate (the DSA paper ran with True); the two differ
            only where a non-square image is rotated.
        backend: "reference", "fused" (compiled), or None for the best that is built.

    Returns:
        A new tensor [B, C, H, W] of the images' dtype (float32 for uint8) and memory format. Where
        looking at values would wait for the device, the compiled op on CUDA makes all NaN of an image whose
        parameters are not finite or whose row is out of range; on the CPU that is an error.

    Raises:
        ValueError: wrong rank, size, dtype, device or number of rows; parameters that are not finite or rows
            out of range (CPU); an unknown backend.
        RuntimeError: `backend="fused"` where the extension is not built.
    """
    fused = extension.resolve("augment.apply", backend, images.device) == "fused"
    if not fused or torch.compiler.is_compiling():
        reference.check(images, params, rows, mean, std)
    if not fused:
        return reference.augment(images, params, rows, mean, std, align_corners)
    try:
        return op.augment(images, list(params.fields().values()), rows, mean, std, align_corners)
    except ValueError:  # the op checks for itself, and faster, but says less
        reference.check(images, params, rows, mean, std)
        raise


# ------------------------------------------------------------------------------------------------- drawing


def _uniform(low: float, high: float, rows: int, generator: torch.Generator) -> Tensor:
    return torch.empty(rows, device=generator.device).uniform_(low, high, generator=generator)


def _integers(low: int, high: int, rows: int, generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, (rows,), generator=generator, device=generator.device)


def _draw_color(rows: int, _: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "brightness": _uniform(-BRIGHTNESS / 2, BRIGHTNESS / 2, rows, generator),
        "saturation": _uniform(0, SATURATION, rows, generator),
        "contrast": _uniform(CONTRAST, CONTRAST + 1, rows, generator),
    }


def _draw_crop(rows: int, size: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    return _draw_shifts(rows, (int(size[0] * CROP + 0.5), int(size[1] * CROP + 0.5)), generator)


def _draw_shifts(rows: int, reach: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "shift_y": _integers(-reach[0], reach[0] + 1, rows, generator),
        "shift_x": _integers(-reach[1], reach[1] + 1, rows, generator),
    }


def _draw_cutout(rows: int, size: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    edges = []
    for side in size:  # the box may stick out
        box = int(side * CUTOUT + 0.5)
        start = _integers(-(box // 2), side + 1 - box % 2 - box // 2, rows, generator)
        edges += [start, start + (box - 1)]
    return {"cutout": torch.stack(edges, 1)}


def _draw_flip(rows: int, _: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    return {"flip": _integers(0, 2, rows, generator).bool()}


def _draw_scale(rows: int, _: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    return {name: _uniform(1 / SCALE, SCALE, rows, generator) for name in ("scale_x", "scale_y")}


def _draw_rotate(rows: int, _: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    return {"degrees": _uniform(-ROTATE, ROTATE, rows, generator)}


_DRAW: dict[str, Callable[[int, tuple[int, int], torch.Generator], dict[str, Tensor]]] = {
    "color": _draw_color,
    "crop": _draw_crop,
    "cutout": _draw_cutout,
    "flip": _draw_flip,
    "scale": _draw_scale,
    "rotate": _draw_rotate,
}
