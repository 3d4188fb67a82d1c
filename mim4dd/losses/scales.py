"""What the contrastive losses compute with: features of one dtype, temperature and noise ratio as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..constants import cached
from .checks import assert_positive, check_positive


def without_autocast(value: Tensor) -> AbstractContextManager[None]:
    """Compute in the dtypes that are there; the meta device, which has no autocast, refuses its context."""
    if value.is_meta or not torch.is_autocast_enabled(value.device.type):
        return nullcontext()
    return torch.autocast(value.device.type, enabled=False)


def one_dtype(*features: Tensor) -> list[Tensor]:
    """Return the features in the widest dtype among them (autocast hands out mixtures)."""
    dtype = features[0].dtype
    for other in features[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    return [value.to(dtype) for value in features]


def scales_of(
    function: str, features: Tensor, temperature: float | Tensor, noise_ratios: Sequence[float | Tensor]
) -> Tensor:
    """Return [2, L]: the temperature and the noise ratio of each layer, on the device, at least float32."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    check_positive(function, "temperature", temperature, dtype)
    for ratio in noise_ratios:
        check_positive(function, "noise_ratio", ratio, dtype)
    values = (*[temperature] * len(noise_ratios), *noise_ratios)
    # A list: what an error has passed through torch.compile runs untraced, and there refuses a generator.
    constants = [value for value in values if not isinstance(value, Tensor)]
    numbers = _numbers(tuple(constants), dtype, features.device)
    if len(constants) == len(values):
        return numbers.view(2, -1)
    rest = iter(numbers.unbind() if constants else ())  # torch.export cannot load an unbind of nothing
    tensors = [
        value.to(features.device, dtype).reshape(()) if isinstance(value, Tensor) else next(rest)
        for value in values
    ]
    scales = torch.stack(tensors).reshape(2, -1)
    assert_positive(function, scales, temperature=[temperature], noise_ratio=noise_ratios)
    return scales


@cached(4096)  # more than any program has in use, but not every number of one that lowers its temperature
def _numbers(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if values and torch.compiler.is_compiling():  # `torch.tensor` would make numbers constants
        one = torch.ones((), dtype=dtype, device=device)
        return torch.stack([one * value for value in values])
    return torch.tensor(values, dtype=dtype, device=device)
