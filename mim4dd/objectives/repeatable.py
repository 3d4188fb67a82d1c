"""An objective whose matches are all the same work, so that a GPU can record one and replay it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Matched, Objective


class Repeatable(Objective):
    """An objective in two parts: `prepare`, which may do anything, and `match`, the same work at every call.

    A match reads no values on the host, draws only from `generators`, and keeps in place what lasts: see
    `mim4dd.graph.replayed`.

    Attributes:
        generators: all that `match` draws from.
    """

    generators: Sequence[torch.Generator]

    def prepare(self, images: Tensor, targets: Tensor) -> None:
        """Do what comes before a match and is not always the same, such as training a network.

        Takes the images [n, C, H, W] and targets that are then matched, as constants.
        """

    @abstractmethod
    def match(self, images: Tensor, targets: Tensor) -> Matched:
        """Match synthetic images against the problem's real ones, as `__call__` without `prepare`."""

    def __call__(self, images: Tensor, targets: Tensor) -> Matched:
        """Prepare and match; see `Objective`."""
        self.prepare(images.detach(), targets.detach())
        return self.match(images, targets)
