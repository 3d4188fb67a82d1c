import dataclasses

import pytest
import torch
from conftest import digits_problem, prepared_match

from mim4dd.data import ImageSet, load
from mim4dd.data.clusters import cluster_labels, image_for_each, kmeans_centres, members
from mim4dd.errors import InputError
from mim4dd.objectives import METHODS
from mim4dd.seeding import generator
from mim4dd.synthetic import initialise


@pytest.fixture(scope="module")
def digits():
    return load("digits")[0]


@pytest.fixture
def blobs():
    """Two classes of three tight groups of images each, shuffled, and the group of every image."""
    g = torch.Generator().manual_seed(0)
    groups = torch.arange(60)[torch.randperm(60, generator=g)] % 6
    grey = torch.tensor([0.0, 0.4, 0.9, 0.1, 0.5, 1.0])[groups]
    images = grey[:, None, None, None] + 0.01 * torch.rand(60, 1, 8, 8, generator=g)
    return ImageSet(images, groups // 3, ("a", "b"), torch.zeros(1), torch.ones(1)), groups


def test_clusters_are_the_groups_there_are(blobs):
    images, groups = blobs
    centres = kmeans_centres(images, 3, generator(0, "x"))
    assert centres.shape == (2, 3, 64)
    labels = cluster_labels(images, centres)
    assert torch.equal(labels // 3, images.labels)
    pairs = {*zip(groups.tolist(), labels.tolist(), strict=True)}
    assert len(pairs) == 6, "one cluster for each group"
    means = torch.stack([images.images[labels == k].mean(0).flatten() for k in range(6)])
    torch.testing.assert_close(centres.flatten(0, 1), means)


def test_a_class_may_be_missing_where_labels_are_given(blobs):
    images, _ = blobs
    centres = kmeans_centres(images, 3, generator(0, "x"))
    one = dataclasses.replace(images, images=images.images[:1], labels=images.labels[:1])
    assert torch.equal(cluster_labels(one, centres), cluster_labels(images, centres)[:1])


def test_every_centre_takes_an_image_of_its_own_at_the_smallest_sum(blobs):
    images, _ = blobs
    index = torch.stack([own[:3] for own in members(images)])
    pixels = images.batch(index).flatten(2)
    # The second centre lies between the first two images, both its nearest; the first centre is the first.
    centres = torch.stack([pixels[:, 0], (pixels[:, 0] + pixels[:, 1]) / 2, pixels[:, 2]], 1)
    assert torch.equal(image_for_each(centres, images, index.flip(1)), index)


def test_more_clusters_than_images_are_refused(blobs):
    with pytest.raises(InputError, match=r"'[ab]' has \d+ training images, fewer than the 40 asked for"):
        kmeans_centres(blobs[0], 40, generator(0, "x"))


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("how", ["real", "kmeans"])
def test_images_start_in_the_order_of_their_clusters(digits, how, factor):
    centres = kmeans_centres(digits, 3 * factor**2, generator(0, "init"))
    start = initialise(digits, 3, how, generator(0, "init"), factor=factor, centres=centres)
    distance = torch.cdist(start.decoded.flatten(1).unflatten(0, centres.shape[:2]), centres)
    own = distance.diagonal(dim1=1, dim2=2).sum(1)
    for shift in range(1, centres.shape[1]):
        others = distance.roll(shift, 2).diagonal(dim1=1, dim2=2).sum(1)
        assert (own < others).all()


def test_kmeans_start_is_the_same_with_and_without_clusters(digits):
    centres = kmeans_centres(digits, 4, generator(0, "init"))
    paired = initialise(digits, 4, "kmeans", generator(0, "init"), centres=centres)
    assert torch.equal(paired.images, initialise(digits, 4, "kmeans", generator(0, "init")).images)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_pairs_by_cluster(method):
    """A real image's pair label is its own image's partner: told by marking each real image in its labels."""
    problem, start = digits_problem(ipc=2)
    problem, real = dataclasses.replace(problem, layers=(1,)), problem.real
    by_class = prepared_match(METHODS[method].objective(problem), start.decoded, start.targets)
    assert torch.equal(by_class.synthetic_labels, start.labels)
    assert torch.equal(by_class.real_labels.bincount(), torch.full((10,), problem.real_batch))
    partners = 2 * real.labels + torch.arange(len(real)) % 2
    problem = dataclasses.replace(problem, partners=partners)
    by_cluster = prepared_match(METHODS[method].objective(problem), start.decoded, start.targets)
    assert torch.equal(by_cluster.loss, by_class.loss), "the base loss does not see the pairs"
    assert torch.equal(by_cluster.synthetic_labels, torch.arange(20))
    assert torch.equal(by_cluster.real_labels // 2, by_class.real_labels), "clusters lie in their class"
    # The same images drawn again, with every image its own partner, name those images.
    named = dataclasses.replace(problem, partners=torch.arange(len(real)))
    drawn = prepared_match(METHODS[method].objective(named), start.decoded, start.targets).real_labels
    assert torch.equal(by_cluster.real_labels, partners[drawn])
    assert len(drawn.unique()) == len(drawn)
