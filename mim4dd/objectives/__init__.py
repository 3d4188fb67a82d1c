"""The base methods by name, and the mutual-information add-on that goes with any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..config import TrajectoryConfig
from . import footprint
from .base import Matched, Objective, Problem
from .characteristic import CharacteristicMatching, characteristic_distance
from .distribution import DistributionMatching, distribution_distance
from .estimate import mutual_information_estimate
from .gradient import GradientMatching, gradient_distance, loops
from .mutual_information import MutualInformation
from .term_networks import TermNetworks, ThroughTermNetworks, TrainedOnReal, TrainedOnSynthetic
from .trajectory import TrajectoryMatching, train_experts, trajectory_distance

__all__ = [
    "METHODS",
    "CharacteristicMatching",
    "DistributionMatching",
    "GradientMatching",
    "Matched",
    "Method",
    "MutualInformation",
    "Objective",
    "Problem",
    "TermNetworks",
    "ThroughTermNetworks",
    "TrainedOnReal",
    "TrainedOnSynthetic",
    "TrajectoryConfig",
    "TrajectoryMatching",
    "characteristic_distance",
    "distribution_distance",
    "gradient_distance",
    "mutual_information_estimate",
    "trajectory_distance",
]


@dataclass(frozen=True)
class Method:
    """A base method and its default settings.

    Attributes:
        objective: what it minimises.
        image_lr: learning rate of the images, from each IPC on; `--preset paper` takes the first.
        augmented: whether it augments them.
        learns_targets: whether its loss depends on the images' targets, so that soft labels can be learned.
        iterations: updates of the images at an IPC, in the published protocol.
        mim_weights: default weight of the mutual-information term, by its loss, from each IPC on.
        footprint: about how many bytes an update takes beside the weights and the data.
        prepare: does what takes long before the first match, if anything does and it is not done already;
            yields (steps done, steps in all).
    """

    objective: Callable[[Problem], Objective]
    image_lr: Mapping[int, float]
    augmented: bool
    learns_targets: bool
    iterations: Callable[[int], int]
    mim_weights: Mapping[str, Mapping[int, float]]
    footprint: Callable[[Problem], int]
    prepare: Callable[[Problem], Iterator[tuple[int, int]]] = lambda _: iter(())


# Weights were chosen on validation splits (docs/experiments.md), 0 where none was seen to help. "nce" pulls
# the images of a class together, which does harm where there are several.
METHODS = {
    "dm": Method(
        DistributionMatching,
        image_lr={1: 1.0, 50: 5.0},
        augmented=True,
        learns_targets=False,
        iterations=lambda _: 20_000,
        mim_weights={"info-nce": {1: 300.0, 10: 100.0, 50: 30.0}, "nce": {1: 100.0, 10: 1.0}},
        footprint=footprint.of_features,
    ),
    "dc": Method(
        GradientMatching,
        image_lr={1: 0.1},
        augmented=False,
        learns_targets=True,
        iterations=lambda ipc: 1000 * loops(ipc)[0],  # 1,000 networks
        mim_weights={"info-nce": {1: 1000.0}, "nce": {1: 0.0}},
        footprint=footprint.of_gradients,
    ),
    "dsa": Method(
        GradientMatching,
        image_lr={1: 0.1, 50: 0.5},
        augmented=True,
        learns_targets=True,
        iterations=lambda ipc: 1000 * loops(ipc)[0],
        mim_weights={"info-nce": {1: 1000.0, 50: 300.0}, "nce": {1: 100.0, 2: 0.0}},
        footprint=footprint.of_gradients,
    ),
    "mtt": Method(
        TrajectoryMatching,
        image_lr={1: 100.0},
        augmented=True,
        learns_targets=True,
        iterations=lambda _: 5000,
        mim_weights={"info-nce": {1: 0.1, 2: 0.0}, "nce": {1: 0.0}},
        footprint=footprint.of_trajectory,
        prepare=train_experts,
    ),
    "ncfm": Method(
        CharacteristicMatching,
        image_lr={1: 0.1, 50: 0.5},
        augmented=True,
        learns_targets=False,
        iterations=lambda _: 20_000,
        mim_weights={"info-nce": {1: 1000.0, 50: 300.0}, "nce": {1: 0.0}},
        footprint=footprint.of_characteristic_functions,
    ),
}
