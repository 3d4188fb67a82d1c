"""Distribution matching (DM, WACV 2023): equal class means of the features of a random network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import at_least_float32
from ..networks import initialise
from ..seeding import generators
from .base import Matched, Objective, Problem


def distribution_distance(
    real_features: Tensor,
    synthetic_features: Tensor,
    real_labels: Tensor,
    synthetic_labels: Tensor,
    *,
    num_classes: int | None = None,
) -> Tensor:
    """Return the sum over classes of the squared distance between the mean features, a scalar.

    It is the loss of DM (WACV 2023). A class that one of the sides lacks contributes nothing. Features of
    half precision are taken to float32.

    Args:
        real_features: float [N, ...], flattened to rows.
        synthetic_features: float [M, ...], flattened to rows.
        real_labels: int64 [N].
        synthetic_labels: int64 [M].
        num_classes: one more than the largest label; None finds it, which waits for a GPU.

    Raises:
        ValueError: one integer label per row is expected, and equal widths.
    """
    real, synthetic = (at_least_float32(x.flatten(1)) for x in (real_features, synthetic_features))
    if real.shape[1] != synthetic.shape[1]:
        raise ValueError(
            f"mim4dd.distribution_distance: real_features have width {real.shape[1]} and synthetic_features "
            f"{synthetic.shape[1]}; take both from the same layer"
        )
    real_labels, synthetic_labels = check_labels(
        "distribution_distance", real, synthetic, real_labels, synthetic_labels
    )
    if not len(real) or not len(synthetic):
        return synthetic.sum() * 0
    if num_classes is None:
        num_classes = int(torch.cat([real_labels, synthetic_labels]).max()) + 1
    real_means, in_real = class_means(real, real_labels, num_classes)
    means, in_synthetic = class_means(synthetic, synthetic_labels, num_classes)
    return torch.where(in_real & in_synthetic, (real_means - means).square().sum(1), 0).sum()


def class_means(rows: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the mean [num_classes, D] of each class's rows [n, D], 0 of none, and which have any."""
    # One-hot products rather than scattered sums: deterministic on every device.
    membership = F.one_hot(labels, num_classes).to(rows.dtype)
    counts = membership.sum(0)
    return membership.T @ rows / counts.clamp_min(1)[:, None], counts > 0


def check_labels(
    function: str, real: Tensor, synthetic: Tensor, real_labels: Tensor, synthetic_labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the labels as int64, if there is one per row of features.

    Raises:
        ValueError: there is not, or they are no integers; it names the public function and the argument.
    """
    for name, rows, labels in (("real", real, real_labels), ("synthetic", synthetic, synthetic_labels)):
        if labels.shape != rows.shape[:1]:
            raise ValueError(
                f"mim4dd.{function}: {name}_labels is {list(labels.shape)}, expected [{len(rows)}]"
            )
        if labels.numel() and (labels.is_floating_point() or labels.dtype == torch.bool):
            raise ValueError(f"mim4dd.{function}: {name}_labels is of {labels.dtype}, expected integers")
    return real_labels.long(), synthetic_labels.long()


class DistributionMatching(Objective):
    """A new random network every iteration; real and synthetic images share their augmentation by class.

    Batch normalisation is in training mode, as in the published code: real images of all classes are
    normalised together, and so are the synthetic ones.
    """

    generators: Sequence[torch.Generator]

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.network = problem.network()
        device = problem.real.images.device
        self.random = generators(problem.seed, "dm", ("network", "real", "augmentation"), device)
        self.generators = tuple(self.random.values())
        classes = torch.arange(problem.real.num_classes, device=device)
        self.real_labels = classes.repeat_interleave(problem.real_batch)

    def match(self, images: Tensor, targets: Tensor) -> Matched:
        """Return the distance for the synthetic images [n, C, H, W] and the features it is made of."""
        problem = self.problem
        initialise(self.network, self.random["network"])
        draws = self.random["real"], self.random["augmentation"]
        maps, real_maps, *labels = problem.siamese(self.network, images, problem.real_batch, *draws)
        return Matched(self.distance(real_maps[-1], maps[-1]), maps, real_maps, *labels)

    def distance(self, real: Tensor, synthetic: Tensor) -> Tensor:
        """Return the distance between real and synthetic features [N, ...] and [n, ...]."""
        labels, num_classes = self.problem.labels, self.problem.real.num_classes
        return distribution_distance(real, synthetic, self.real_labels, labels, num_classes=num_classes)
