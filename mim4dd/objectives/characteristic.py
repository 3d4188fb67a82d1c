"""Characteristic function matching (NCFM, CVPR 2025): equal distributions of a random network's features."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses.reference import unit_rows
from ..seeding import generators
from .base import Problem
from .distribution import DistributionMatching, check_labels, class_means

NUM_FREQUENCIES = 1024  # published: 4096, on CPU a third slower and in short runs no more accurate
SCALE = 300.0  # of the loss, as published
SMALLEST = 1e-12  # what a smaller squared distance counts as: a root has no slope at 0


def characteristic_distance(
    real_features: Tensor,
    synthetic_features: Tensor,
    real_labels: Tensor,
    synthetic_labels: Tensor,
    frequencies: Tensor,
    *,
    amplitude: float = 0.5,
    phase: float = 0.5,
    num_classes: int | None = None,
) -> Tensor:
    """Return the sum over classes of the distance between characteristic functions of features, a scalar.

    It is the distance of NCFM (CVPR 2025). Features are normalised to length 1. With R(t) the mean of
    exp(i <t, x>) over the real features x of a class, and S(t) likewise over the synthetic ones, a class pays
    the mean over the frequencies t of

        sqrt(amplitude * (|R| - |S|)^2 + phase * 2 (|R| |S| - Re(R conj S)));

    with both weights at 0.5 that is the mean of |R - S| / sqrt(2). A class that one of the sides lacks
    contributes nothing.

    Args:
        real_features: float [N, ...], flattened to rows of width D.
        synthetic_features: float [M, ...], flattened to rows of width D.
        real_labels: int64 [N].
        synthetic_labels: int64 [M].
        frequencies: float [K, D], shared by the classes; published: standard normal.
        amplitude: weight of the part that asks for equal spread (diversity).
        phase: weight of the part that asks for equal location (realism).
        num_classes: one more than the largest label; None looks, which on a GPU waits for it.

    Raises:
        ValueError: one integer label per row is expected, and equal widths.
    """
    real, synthetic = real_features.flatten(1), synthetic_features.flatten(1)
    widths = real.shape[1], synthetic.shape[1], *frequencies.shape[1:]
    if len(widths) != 3 or len({*widths}) > 1:
        raise ValueError(
            f"mim4dd.characteristic_distance: real_features have width {widths[0]}, synthetic_features "
            f"{widths[1]} and frequencies is {list(frequencies.shape)}; expected one width for all three"
        )
    real_labels, synthetic_labels = check_labels(
        "characteristic_distance", real, synthetic, real_labels, synthetic_labels
    )
    if not len(real) or not len(synthetic):
        return synthetic.sum() * 0
    if num_classes is None:
        num_classes = int(torch.cat([real_labels, synthetic_labels]).max()) + 1
    present = torch.ones(num_classes, dtype=torch.bool, device=real.device)
    parts = []
    for rows, labels in ((real, real_labels), (synthetic, synthetic_labels)):
        angles = unit_rows(rows) @ frequencies.T
        means, known = class_means(torch.cat([angles.cos(), angles.sin()], 1), labels, num_classes)
        cos, sin = means.chunk(2, 1)
        # A class that is not there has a function of 0, where |.| has no slope: any other will do.
        parts.append((cos + ~known[:, None], sin))
        present = present & known
    (real_cos, real_sin), (cos, sin) = parts
    real_length, length = (real_cos.square() + real_sin.square()).sqrt(), (cos.square() + sin.square()).sqrt()
    by_amplitude = (real_length - length).square()
    by_phase = 2 * (real_length * length - real_cos * cos - real_sin * sin)
    distances = (amplitude * by_amplitude + phase * by_phase).clamp_min(SMALLEST).sqrt().mean(1)
    return torch.where(present, distances, 0).sum()


class CharacteristicMatching(DistributionMatching):
    """Distribution matching with `characteristic_distance`; new networks and frequencies every iteration.

    The published method also trains a network that proposes the frequencies, matches networks between random
    and trained, adds the loss of a trained one, and stores several images in one. This is only
    its distance, at standard normal frequencies, in random networks.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.random |= generators(problem.seed, "ncfm", ("frequencies",), problem.real.images.device)
        self.generators = tuple(self.random.values())

    def distance(self, real: Tensor, synthetic: Tensor) -> Tensor:
        """Return the distance between real and synthetic features [N, ...] and [n, ...]."""
        shape = NUM_FREQUENCIES, real[0].numel()
        return SCALE * characteristic_distance(
            real,
            synthetic,
            self.real_labels,
            self.problem.labels,
            torch.randn(shape, generator=self.random["frequencies"], device=real.device, dtype=torch.float32),
            num_classes=self.problem.real.num_classes,
        )
