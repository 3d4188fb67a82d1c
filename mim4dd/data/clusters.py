"""Classes split into clusters of alike images, by k-means in pixel space."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from .image_set import ImageSet


def kmeans_centres(real: ImageSet, k: int, generator: torch.Generator) -> Tensor:
    """Return centres of k clusters of every class: float32 [num_classes, k, C * H * W], normalised pixels.

    Raises:
        InputError: fewer images in a class than k.
    """
    from sklearn.cluster import KMeans

    real.check_enough(k)
    seeds = torch.randint(2**31, (real.num_classes,), generator=generator, device=generator.device).tolist()
    centres = [
        KMeans(k, n_init=1, random_state=seed).fit(_pixels(real, index).cpu().numpy()).cluster_centers_
        for index, seed in zip(members(real), seeds, strict=True)
    ]
    return torch.from_numpy(np.stack(centres)).to(real.images.device)


def members(images: ImageSet) -> list[Tensor]:
    """Return the indices of the images of every class."""
    return [(images.labels == c).nonzero().squeeze(1) for c in range(images.num_classes)]


def image_for_each(centres: Tensor, real: ImageSet, candidates: Iterable[Tensor]) -> Tensor:
    """Return indices [num_classes, k] of the images that go with the centres [num_classes, k, ...].

    Each centre takes an image of its own from its class's candidates (indices, at least k), so that the sum
    of the distances is as small as it can be.
    """
    from scipy.optimize import linear_sum_assignment

    chosen = []
    for own, index in zip(centres, candidates, strict=True):
        _, rows = linear_sum_assignment(torch.cdist(own, _pixels(real, index)).cpu().numpy())
        chosen.append(index[torch.from_numpy(rows).to(index.device)])
    return torch.stack(chosen)


def cluster_labels(images: ImageSet, centres: Tensor) -> Tensor:
    """Return the cluster of each image, int64 [N]: cluster j of class c, the nearest of k, is c * k + j."""
    labels = torch.empty_like(images.labels)
    for c, (own, index) in enumerate(zip(centres, members(images), strict=True)):
        if len(index):
            labels[index] = c * len(own) + torch.cdist(_pixels(images, index), own).argmin(1)
    return labels


def _pixels(images: ImageSet, index: Tensor) -> Tensor:
    return images.batch(index).flatten(1)
