"""Drawing all parameters at once, as on a GPU, where every operator is a launch.

A uniform number is drawn for everything that there is to draw, wanted or not; what they become is one pass,
compiled where the extension is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, extension
from ..constants import cached
from ..sizes import Size
from .params import AugmentParams
from .strategy import Range, box_of, ranges

# The order of csrc/draw/draw.h: numbers, then whole ones.
NUMBERS = ("brightness", "saturation", "contrast", "scale_x", "scale_y", "degrees")
COLUMNS = (*NUMBERS, "flip", "shift_y", "shift_x", "cut_y", "cut_x")
FIRST_WHOLE = len(NUMBERS)
IDENTITY = {"saturation": 1.0, "contrast": 1.0, "scale_x": 1.0, "scale_y": 1.0, "cut_y": -1.0, "cut_x": -1.0}

CPU = torch.device("cpu")


def draw(
    parts: tuple[str, ...], batch: int, size: Size, generators: Sequence[torch.Generator], mode: str
) -> AugmentParams:
    """Draw `batch` rows from each generator; the arguments are those of `sample_each`."""
    device = generators[0].device
    shape = (len(COLUMNS) + 1, batch)
    blocks = [torch.rand(shape, generator=r, dtype=torch.float32, device=device) for r in generators]
    uniform = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
    together = {"single": batch, "each": 1, "all": 0}[mode]
    return AugmentParams.of_packed(from_uniform(uniform, parts, size, together))


def from_uniform(
    uniform: Tensor, parts: tuple[str, ...], size: Size, together: int, *, backend: str | None = None
) -> Tensor:
    """Return what uniform numbers become.

    Args:
        uniform: float32 [12, rows], from 0 to before 1: one for each of `COLUMNS`, and one for the part.
        parts: of the strategy.
        size: (height, width) of the images.
        together: so many rows after one another have one part of the strategy; 0: every row has all of them.
        backend: see `augment.apply`.

    Returns:
        float32 [rows, 13], what `AugmentParams.of_packed` takes.

    Raises:
        RuntimeError: `backend="fused"` where the extension is not built.
    """
    if backends.resolve("augment.sample", backend, extension.obstacle(uniform.device)) == "fused":
        return _draw(uniform, _table(parts, size, CPU), len(parts), together)
    return _reference(uniform, _table(parts, size, uniform.device), len(parts), together)


@cached(None)  # never given up: recorded steps of the reference read it, and may not copy
def _table(parts: tuple[str, ...], size: Size, device: torch.device) -> Tensor:
    """Of each column [11, 6]: low, span, a box's length - 1, the last pixel, part, and value without it."""
    of_column = {of.name: (k, of) for k, part in enumerate(parts) for of in ranges(part, size)}
    boxes = dict(zip(("cut_y", "cut_x"), zip(box_of(size), size, strict=True), strict=True))
    rows = []
    for column in COLUMNS:
        identity = IDENTITY.get(column, 0.0)
        k, of = of_column.get(column, (-1, Range(column, identity, identity)))
        box, side = boxes.get(column, (1, 1))
        rows.append((of.low, of.high - of.low, box - 1, side - 1, k, identity))
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _reference(uniform: Tensor, table: Tensor, parts: int, together: int) -> Tensor:
    low, span, extent, last, part, identity = table.t()[:, :, None]
    *_, choice = uniform
    values = uniform[:-1] * span
    values[FIRST_WHOLE:].floor_()  # of the product: it stays below the span, whatever is added to it
    values += low
    drawn = (part >= 0).expand_as(values)
    if together:
        chosen = (choice[::together] * parts).floor().repeat_interleave(together)
        drawn = part == chosen
    *_, bottom, right = torch.where(drawn, (values + extent).minimum(last), identity)
    values[COLUMNS.index("cut_y") :].clamp_(min=0)
    values = torch.where(drawn, values, identity)
    brightness, saturation, contrast, scale_x, scale_y, degrees, flip, shift_y, shift_x, top, left = values
    box = (top, bottom, left, right)
    fields = (brightness, saturation, contrast, shift_y, shift_x, *box, flip, scale_x, scale_y, degrees)
    return torch.stack(fields, 1)


def _register() -> None:
    def fake(uniform: Tensor, table: Tensor, parts: int, together: int) -> Tensor:
        return uniform.new_empty(uniform.shape[1], len(COLUMNS) + 2)  # a box has two ends

    torch.library.register_fake("mim4dd::draw", fake)


if extension.available():
    _register()
    _draw = torch.ops.mim4dd.draw.default  # found once: that takes as long as much else
