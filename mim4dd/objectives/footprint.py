"""About how many bytes an update takes beside the weights and the data, by method, told before it begins.

What a library wants as workspace and what fragments of memory waste come on top.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from ..config import settled
from ..networks.memory import per_first_derivative
from .base import Problem
from .characteristic import NUM_FREQUENCIES
from .term_networks import compared
from .trajectory import student_batch

FLOAT = 4  # bytes


def of_features(problem: Problem, per_class: int | None = None) -> int:
    """Features of `per_class` real images, chunk by chunk, then of the synthetic ones with their graph."""
    real, count = problem.real.num_classes * (per_class or problem.real_batch), len(problem.labels)
    at_once = min(problem.chunk, real)
    if problem.network().batch_normalised:  # over all images together, or before that over some of each class
        at_once = max(at_once, problem.statistics_batch) if per_class else real
    passing = at_once * problem.bytes_per_image(gradients=False)
    synthetic = count * max(problem.bytes_per_image(gradients=True), _first_derivative(problem, twice=False))
    kept = real * _numbers(problem, {len(problem.network().feature_sizes) - 1, *problem.layers})
    return _images(problem, real + count) + FLOAT * kept + _compared(problem, real) + max(passing, synthetic)


def of_characteristic_functions(problem: Problem) -> int:
    """The same, and at each frequency of each image an angle, its cosine, its sine, and these two as one."""
    count = problem.real.num_classes * problem.real_batch + len(problem.labels)
    return of_features(problem) + count * NUM_FREQUENCIES * 5 * FLOAT


def of_gradients(problem: Problem) -> int:
    """Gradients of real images, some at a time, then those of all synthetic ones with their graph."""
    classes, on_gpu = problem.real.num_classes, problem.real.images.device.type != "cpu"
    real, count = classes * problem.real_batch, len(problem.labels)
    at_once = problem.classes_at_once * problem.real_batch if on_gpu else problem.chunk
    passing = min(at_once, real) * problem.bytes_per_image(gradients=True, transformed=on_gpu)
    if problem.network().batch_normalised:
        passing = max(passing, problem.statistics_batch * problem.bytes_per_image(gradients=False))
    in_graph = problem.bytes_per_image(gradients=True, transformed=True)
    synthetic = count * max(in_graph, _first_derivative(problem, twice=True))
    kept = 2 * classes * problem.weight_bytes + FLOAT * real * _numbers(problem, problem.layers)
    return _images(problem, real + count) + kept + _compared(problem, real) + max(passing, synthetic)


def of_trajectory(problem: Problem) -> int:
    """The weights of every step, the graphs of those that are kept, one at least, and the way back.

    And three times the images: a copy, the gradient of a step's, and the sum of these.
    """
    steps, batch = settled(problem.trajectory.student_steps), student_batch(problem)
    graphs = min(steps, max(1, problem.graphs_kept(batch))) * problem.graph_bytes(batch)
    back = batch * max(problem.bytes_per_image(gradients=True), _first_derivative(problem, twice=True))
    seen = of_features(problem) if problem.layers else 0
    return 3 * _images(problem, len(problem.labels)) + steps * problem.weight_bytes + graphs + back + seen


def of_term(problem: Problem) -> int:
    """What the add-on sees through networks of its own."""
    return of_features(problem, compared(problem))


def _first_derivative(problem: Problem, *, twice: bool) -> int:
    image = (problem.real.channels, *problem.real.image_size)
    return per_first_derivative(problem.network(), image, twice=twice)


def _numbers(problem: Problem, layers: Collection[int]) -> int:
    """How many numbers an image has in the maps of these layers."""
    return sum(problem.network().feature_sizes[k] for k in layers)


def _compared(problem: Problem, real: int) -> int:
    """What the add-on's loss makes of features: rows of length 1."""
    return (real + len(problem.labels)) * FLOAT * _numbers(problem, problem.layers)


def _images(problem: Problem, count: int) -> int:
    return count * FLOAT * math.prod(problem.real.images.shape[1:])
