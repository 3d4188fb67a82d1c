import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import digits_problem

from mim4dd.distill import DivergenceError, distill
from mim4dd.objectives import (
    METHODS,
    DistributionMatching,
    GradientMatching,
    Matched,
    MutualInformation,
    Objective,
)
from mim4dd.seeding import generator
from mim4dd.synthetic import SyntheticSet, decode


def run(iterations=12, weight=None, seed=0, **options):
    problem, start = digits_problem()
    problem = dataclasses.replace(problem, seed=seed, layers=(0, 1))
    looks = []
    result = distill(
        DistributionMatching(problem),
        start,
        iterations=iterations,
        lr=1.0,
        momentum=0.5,
        mutual_information=MutualInformation(weight=weight, layers="all", **options) if weight else None,
        on_progress=looks.append,
    )
    return result, looks, start


@pytest.mark.parametrize("weight", [None, 10.0])
def test_same_seed_same_images(weight):
    first, second, other = (run(weight=weight, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.images, other.images)


def test_the_term_changes_the_images_and_is_reported():
    with_term, looks, start = run(weight=10.0)
    without, plain_looks, _ = run()
    assert not torch.equal(with_term.images, without.images)
    assert list(looks[0].terms) == ["base", "mim"]
    assert list(plain_looks[0].terms) == ["base"]
    assert [look.iteration for look in looks] == [10, 12]
    assert torch.equal(looks[-1].synthetic.images, with_term.images)
    assert not torch.equal(start.images, with_term.images), "the start is a copy"


def test_distribution_distance_falls():
    _, looks, _ = run(iterations=60)
    assert looks[-1].terms["base"] < 0.8 * looks[0].terms["base"]


def test_no_iterations_return_the_start():
    result, looks, start = run(iterations=0)
    assert torch.equal(result.images, start.images)
    assert looks == []


def test_a_trained_projection_is_trained():
    options = {"projection": "trained", "projection_size": 4, "feature_sizes": (128, 32)}
    problem, start = digits_problem()
    term = MutualInformation(layers="all", generator=generator(0, "projection"), **options)
    before = [p.clone() for p in term.parameters()]
    distill(
        DistributionMatching(dataclasses.replace(problem, layers=(0, 1))),
        start,
        iterations=2,
        lr=1.0,
        momentum=0.5,
        mutual_information=term,
    )
    assert all(not torch.equal(a, b) for a, b in zip(before, term.parameters(), strict=True))


def plain(images):
    """A set of these images, each a class of its own."""
    names = tuple("abc")
    return SyntheticSet(images, torch.arange(3), names, torch.zeros(1), torch.ones(1))


class Breaking(Objective):
    """An objective whose loss or gradient breaks in iteration 14."""

    def __init__(self, gradient_only=False):
        self.calls = 0
        self.gradient_only = gradient_only

    def match(self, images, targets):
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
            MutualInformation(weight=1e39),
            r"the mim term became inf in iteration 1; lower --mim-weight",
        ),
    ],
)
def test_divergence_names_the_term_and_leaves_the_last_good_images(objective, term, message):
    looks = []
    with pytest.raises(DivergenceError, match=message):
        distill(
            objective,
            plain(torch.rand(3, 1, 8, 8, generator=generator(0, "x"))),
            iterations=20,
            lr=0.01,
            momentum=0.0,
            mutual_information=term,
            on_progress=looks.append,
        )
    assert all(look.synthetic.images.isfinite().all() for look in looks)
    assert [look.iteration for look in looks] == ([10] if term is None else [])


def test_what_a_method_trains_along_may_be_what_is_to_be_lowered():
    objective = Breaking()
    objective.remedy = "--student-lr"
    with pytest.raises(DivergenceError, match="lower --student-lr$"):
        distill(objective, plain(torch.ones(3, 1, 8, 8)), iterations=20, lr=0.01, momentum=0.0)
    assert "--student-lr" in METHODS["mtt"].objective.remedy


def test_a_last_step_that_breaks_the_images_is_noticed():
    with pytest.raises(DivergenceError, match="the images are not finite after iteration 14"):
        distill(
            Breaking(gradient_only=True),
            plain(torch.ones(3, 1, 8, 8)),
            iterations=14,
            lr=0.01,
            momentum=0.0,
        )


def test_images_move_by_plain_sgd_with_momentum():
    """Down the sum of squares, whose gradient is 2x."""
    start = plain(torch.rand(3, 1, 8, 8, generator=generator(0, "x")))
    result = distill(Breaking(), start, iterations=3, lr=0.1, momentum=0.25)
    images, velocity = start.images.clone(), torch.zeros(3, 1, 8, 8)
    for _ in range(3):
        velocity = 0.25 * velocity + 2 * images
        images = images - 0.1 * velocity
    torch.testing.assert_close(result.images, images)


def test_every_run_trains_what_the_objective_has_by_its_own_momentum():
    class Learning(Breaking):
        def __init__(self):
            super().__init__()
            self.scale = torch.ones((), requires_grad=True)
            self.trained = [{"params": [self.scale], "lr": 0.1}]

        def match(self, images, targets):
            matched = super().match(images, targets)
            return dataclasses.replace(matched, loss=matched.loss + self.scale.square() / 2)

    objective, start = Learning(), plain(torch.rand(3, 1, 8, 8, generator=generator(0, "x")))
    distill(objective, start, iterations=1, lr=0.1, momentum=0.9)
    distill(objective, start, iterations=3, lr=0.1, momentum=0.0)
    assert objective.scale.item() == pytest.approx(0.9**4)


@pytest.mark.parametrize("objective", [DistributionMatching, GradientMatching])
def test_small_images_are_decoded_for_the_objective_and_learn_from_it(objective):
    problem, start = digits_problem(ipc=2, factor=2)
    seen = []

    class Spy(objective):
        def match(self, images, targets):
            seen.append((images.detach().clone(), targets))
            return super().match(images, targets)

    result = distill(Spy(problem), start, iterations=1, lr=1.0, momentum=0.0)
    images, targets = seen[0]
    assert torch.equal(images, decode(start.images, 2))
    assert torch.equal(targets, torch.arange(10).repeat_interleave(8))
    assert result.images.shape == start.images.shape
    assert result.factor == 2
    moved = (result.images != start.images).flatten(1).float().mean(1)
    assert moved.min() > 0.5, "every image has a gradient in most of its pixels"


def test_soft_labels_are_learned_where_the_loss_depends_on_them():
    problem, start = digits_problem(ipc=2)
    soft = torch.full((20, 10), 0.02)
    soft[torch.arange(20), problem.labels] = 0.82
    start = dataclasses.replace(start, soft_labels=soft)
    for objective, learned in ((GradientMatching, True), (DistributionMatching, False)):
        result = distill(objective(problem), start, iterations=3, lr=0.1, momentum=0.0)
        torch.testing.assert_close(result.soft_labels.sum(1), torch.ones(20))
        assert ((result.soft_labels - soft).abs().max() > 1e-3) == learned


def test_a_class_that_a_label_starts_without_can_come_in():
    problem, start = digits_problem()
    start = dataclasses.replace(start, soft_labels=F.one_hot(problem.labels, 10).float())
    result = distill(GradientMatching(problem), start, iterations=2, lr=0.1, momentum=0.0)
    assert result.soft_labels.min() > 0


def test_soft_labels_move_a_hundredth_a_step_and_a_projection_a_thousandth():
    """Adam's first step is its learning rate, up or down, for every number; whatever that of the images."""
    problem, start = digits_problem()
    soft = 0.02 + 0.8 * F.one_hot(problem.labels, 10)
    options = {"projection": "trained", "projection_size": 4, "feature_sizes": (128, 32)}
    term = MutualInformation(layers="all", generator=generator(0, "projection"), **options)
    before = [p.detach().clone() for p in term.parameters()]
    result = distill(
        GradientMatching(dataclasses.replace(problem, layers=(0, 1))),
        dataclasses.replace(start, soft_labels=soft),
        iterations=1,
        lr=0.1,
        momentum=0.0,
        mutual_information=term,
    )
    moved = result.soft_labels.log() - soft.log()
    torch.testing.assert_close(moved.amax(1) - moved.amin(1), torch.full((10,), 0.02), rtol=1e-3, atol=0)
    for old, new in zip(before, term.parameters(), strict=True):
        assert (new - old).abs().median().item() == pytest.approx(1e-3, rel=1e-2)
