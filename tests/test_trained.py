"""The add-on's own networks."""

import dataclasses

import pytest
import torch
from conftest import digits_problem

from mim4dd import evaluate
from mim4dd.data import load
from mim4dd.distill import distill
from mim4dd.objectives import (
    DistributionMatching,
    Matched,
    MutualInformation,
    Objective,
    TrainedNetworks,
    through_trained,
    trained,
)
from mim4dd.seeding import generator


@pytest.fixture
def problem():
    return dataclasses.replace(digits_problem()[0], width=16, layers=(0, 1))


def network_of(problem, flat):
    network = problem.network()
    trained._load(network, flat)
    return network


def test_networks_are_trained_the_later_the_longer(problem):
    weights = TrainedNetworks(problem).weights
    assert weights.shape == (trained.NETWORKS, sum(p.numel() for p in problem.network().parameters()))
    _, test = load("digits")
    first, last = (evaluate.accuracy(network_of(problem, weights[k]), test) for k in (0, -1))
    assert last > 0.8
    assert last > first > 0.1
    assert torch.equal(TrainedNetworks(problem).weights, weights), "the same seed"
    assert not torch.equal(TrainedNetworks(dataclasses.replace(problem, seed=1)).weights, weights)


def test_training_is_told_step_by_step_and_done_once(problem):
    networks = TrainedNetworks(problem)
    for _ in zip(range(30), networks.train(), strict=False):  # 10 and 20 steps: two networks
        pass
    told = [*networks.train()]
    total = sum(10 * k for k in range(1, 11))
    assert told == [(done, total) for done in range(11, total + 1)], "the second one is begun again"
    assert [*networks.train()] == []
    assert torch.equal(networks.weights, TrainedNetworks(problem).weights)


@pytest.mark.parametrize("architecture", ["convnet", "convnet-bn"])
def test_features_are_those_of_one_of_the_networks(problem, architecture):
    problem = dataclasses.replace(problem, architecture=architecture, augmentation="none")
    weights = TrainedNetworks(problem).weights
    base = DistributionMatching(problem)
    alone = DistributionMatching(problem)
    objective = through_trained(base, problem, weights)
    images = torch.randn(10, 1, 8, 8, generator=generator(0, "images"), requires_grad=True)
    networks = [network_of(problem, flat) for flat in weights]
    for network in networks:
        problem.settle(network, generator(0, "any"))
    seen = set()
    for _ in range(20):
        matched = objective(images, problem.labels)
        assert torch.equal(matched.loss, alone(images, problem.labels).loss), "the base is left as it is"
        assert len(matched.real_labels) == 10 * problem.real_batch
        if architecture == "convnet":
            expected = [network.features(images) for network in networks]
            which = [
                k for k, maps in enumerate(expected) if torch.equal(maps[-1], matched.synthetic_features[-1])
            ]
            seen |= set(which)
            assert len(which) == 1
            assert torch.equal(expected[which[0]][0], matched.synthetic_features[0])
        assert matched.synthetic_features[-1].requires_grad
        assert not matched.real_features[-1].requires_grad
    assert architecture == "convnet-bn" or len(seen) > 3


class Plain(Objective):
    """Of a user's own, and not the same work at every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, images, targets):
        self.calls += 1
        return Matched(self.calls * images.square().sum(), [images], [images], targets, targets)


def test_any_objective_can_be_seen_through_them(problem):
    _, start = digits_problem()
    base = Plain()
    objective = through_trained(base, problem, TrainedNetworks(problem).weights)
    looks = []
    distill(
        objective,
        start,
        iterations=3,
        lr=0.0,
        momentum=0.0,
        mutual_information=MutualInformation(loss="info_nce", layers="all", temperature=0.03),
        on_progress=looks.append,
    )
    assert base.calls == 3
    (look,) = looks
    assert look.terms["base"] == pytest.approx(2 * start.images.square().sum().item(), rel=1e-5)
    assert look.terms["mim"] > 0


def test_the_loss_through_them_falls(problem):
    _, start = digits_problem()
    weights = TrainedNetworks(problem).weights
    looks = []
    distill(
        through_trained(DistributionMatching(problem), problem, weights),
        start,
        iterations=60,
        lr=1.0,
        momentum=0.5,
        mutual_information=MutualInformation(weight=100, loss="info_nce", layers="all", temperature=0.03),
        on_progress=looks.append,
    )
    assert looks[-1].terms["mim"] < 0.7 * looks[0].terms["mim"]
