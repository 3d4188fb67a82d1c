"""Constant tensors that are made once: copying numbers to a device costs more than a small loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import _disable_current_modes

Make = Callable[..., Tensor]


def cached(maxsize: int | None) -> Callable[[Make], Make]:
    """Decorate a function from hashable arguments to a tensor with `lru_cache`, so that it makes each once.

    This does not hold while it is traced, or under a mode that would make a fake tensor of it.

    Args:
        maxsize: as of `lru_cache`; None if a CUDA graph may hold a tensor: the cache does not see its reads.
    """

    def decorate(make: Make) -> Make:
        @lru_cache(maxsize)
        def made_once(*arguments: Any) -> Tensor:
            # Neither of inference mode nor fake nor a wrapper of a torch.func transform: it outlives them.
            with torch.inference_mode(False), _disable_current_modes(), torch._C._DisableFuncTorch():
                return make(*arguments)

        @wraps(make)
        def made(*arguments: Any) -> Tensor:
            if torch.compiler.is_compiling() or active_fake_mode() is not None:
                return make(*arguments)
            return made_once(*arguments)

        return made

    return decorate
