"""The base methods by name, and the mutual-information add-on that goes with any of them."""

from .base import Matched, Objective, Problem
from .distribution import DistributionMatching, distribution_distance
from .gradient import gradient_distance
from .mutual_information import MutualInformation
from .trajectory import trajectory_distance

__all__ = [
    "METHODS",
    "DistributionMatching",
    "Matched",
    "MutualInformation",
    "Objective",
    "Problem",
    "distribution_distance",
    "gradient_distance",
    "trajectory_distance",
]

METHODS: dict[str, type[Objective]] = {"dm": DistributionMatching}
