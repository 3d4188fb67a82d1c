"""Computing in at least float32."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32, or as it is if its dtype is a wider one."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
