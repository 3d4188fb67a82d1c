"""What the formulas and the kernels agree on: a leaf, so that both can import it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossForm:
    """Which loss: `name` is "nce", "info_nce" (over each positive) or "info_nce_any" (over any of them);
    `negatives` per positive (None: all; NCE only), `symmetric` adds the exchanged roles, `exclude_self`
    leaves out the pairs (i, i)."""

    name: str
    negatives: float | None = None
    symmetric: bool = False
    exclude_self: bool = False


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a feature's gradient waits for the backward.

    float32 for float16: a loss scale arrives with the backward, too late for what underflowed before.
    """
    return torch.float32 if dtype == torch.float16 else dtype
