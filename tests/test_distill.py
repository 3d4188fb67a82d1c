import dataclasses

import pytest
import torch
from conftest import digits_problem

from mim4dd.distill import DivergenceError, distill
from mim4dd.objectives import DistributionMatching, Matched, MutualInformation
from mim4dd.seeding import generator


def run(iterations=12, weight=None, seed=0, **options):
    problem, images = digits_problem()
    problem = dataclasses.replace(problem, seed=seed, layers=(0, 1))
    looks = []
    result = distill(
        DistributionMatching(problem),
        images,
        iterations=iterations,
        lr=1.0,
        momentum=0.5,
        mutual_information=MutualInformation(weight=weight, layers="all", **options) if weight else None,
        on_progress=looks.append,
    )
    return result, looks, images


@pytest.mark.parametrize("weight", [None, 10.0])
def test_same_seed_same_images(weight):
    first, second, other = (run(weight=weight, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_term_changes_the_images_and_is_reported():
    with_term, looks, start = run(weight=10.0)
    without, plain_looks, _ = run()
    assert not torch.equal(with_term, without)
    assert list(looks[0].terms) == ["base", "mim"]
    assert list(plain_looks[0].terms) == ["base"]
    assert [look.iteration for look in looks] == [10, 12]
    assert torch.equal(looks[-1].images, with_term)
    assert not torch.equal(start, with_term), "the start is a copy"


def test_distribution_distance_falls():
    _, looks, _ = run(iterations=60)
    assert looks[-1].terms["base"] < 0.8 * looks[0].terms["base"]


def test_no_iterations_return_the_start():
    result, looks, start = run(iterations=0)
    assert torch.equal(result, start)
    assert looks == []


def test_a_trained_projection_is_trained():
    options = {"projection": "trained", "projection_size": 4, "feature_sizes": (128, 32)}
    problem, images = digits_problem()
    term = MutualInformation(layers="all", generator=generator(0, "projection"), **options)
    before = [p.clone() for p in term.parameters()]
    distill(
        DistributionMatching(dataclasses.replace(problem, layers=(0, 1))),
        images,
        iterations=2,
        lr=1.0,
        momentum=0.5,
        mutual_information=term,
    )
    assert all(not torch.equal(a, b) for a, b in zip(before, term.parameters(), strict=True))


class Breaking:
    """An objective whose loss or gradient breaks in iteration 14."""

    def __init__(self, gradient_only=False):
        self.calls = 0
        self.gradient_only = gradient_only

    def __call__(self, images):
        self.calls += 1
        loss = images.square().sum()
        if self.calls == 14:
            loss = (images * 0).sqrt().sum() if self.gradient_only else loss * float("nan")
        rows, labels = images.flatten(1), torch.arange(len(images))
        return Matched(loss, [rows], [rows.detach()], labels, labels)


@pytest.mark.parametrize(
    ("objective", "term", "message"),
    [
        (Breaking(), None, r"the base term became nan in iteration 14; lower --image-lr"),
        (Breaking(gradient_only=True), None, r"the base term became nan in iteration 15"),
        (
            Breaking(gradient_only=True),
            MutualInformation(weight=float("inf")),
            r"the mim term became inf in iteration 1; lower --mim-weight",
        ),
    ],
)
def test_divergence_names_the_term_and_leaves_the_last_good_images(objective, term, message):
    looks = []
    images = torch.rand(3, 1, 8, 8, generator=generator(0, "x"))
    with pytest.raises(DivergenceError, match=message):
        distill(
            objective,
            images,
            iterations=20,
            lr=0.01,
            momentum=0.0,
            mutual_information=term,
            on_progress=looks.append,
        )
    assert all(look.images.isfinite().all() for look in looks)
    assert [look.iteration for look in looks] == ([10] if term is None else [])


def test_a_last_step_that_breaks_the_images_is_noticed():
    with pytest.raises(DivergenceError, match="the images are not finite after iteration 14"):
        distill(
            Breaking(gradient_only=True),
            torch.ones(3, 1, 8, 8),
            iterations=14,
            lr=0.01,
            momentum=0.0,
        )
