"""How much held-out real and synthetic images tell about each other, before and after a distillation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .data import ImageSet
from .data.clusters import cluster_labels
from .networks import initialise
from .objectives import Problem, mutual_information_estimate
from .seeding import generator
from .synthetic import SyntheticSet

HELD_OUT = 2000  # real images, at most
TEMPERATURE = 0.1  # of the critic, whatever the add-on's, so that runs compare


def held_out_information(
    problem: Problem,
    held_out: ImageSet,
    start: SyntheticSet,
    distilled: SyntheticSet,
    centres: Tensor | None = None,
) -> dict[str, float | None]:
    """Return `mutual_information_estimate` in nats, of held-out images and the set "before" and "after".

    "cap" is what it cannot exceed: the entropy of the labels that make the pairs, which are the add-on's, as
    far as held-out images have them; if they have only one, the estimates are None and the cap is 0. The
    features are the last map of one random network of the run's architecture, with weights of their own,
    without augmentation: no loss has seen these weights, and every set of every run with this seed is
    compared by them.

    Args:
        problem: of the run.
        held_out: what accuracies are measured on.
        start: the set before.
        distilled: the set after.
        centres: of the clusters that make the pairs, [num_classes, k, C * H * W]; None: classes make them.
    """
    device = problem.labels.device
    network = problem.network()
    initialise(network, generator(problem.seed, "information/network", device))
    random = generator(problem.seed, "information/real", device)
    problem.set_batch_norm_statistics(network, random)
    index = torch.randperm(len(held_out), generator=random, device=device)[:HELD_OUT]
    if centres is None:
        labels, real_labels = problem.labels, held_out.labels
    else:
        labels = torch.arange(len(problem.labels), device=device)
        real_labels = cluster_labels(held_out, centres)
    real = problem.real_features(network, held_out.batch(index))[-1]

    def estimate(synthetic: SyntheticSet) -> float | None:
        return mutual_information_estimate(
            problem.real_features(network, synthetic.decoded)[-1],
            real,
            labels,
            real_labels[index],
            temperature=TEMPERATURE,
        )

    seen = labels[torch.isin(labels, real_labels[index])].unique()
    if len(seen) < 2:
        return {"before": None, "after": None, "cap": 0.0}
    return {"before": estimate(start), "after": estimate(distilled), "cap": math.log(len(seen))}
