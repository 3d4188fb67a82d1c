"""The add-on's own networks, and a base method with the add-on looking through them."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import close, digits_problem, prepared_match

from mim4dd import augment, evaluation
from mim4dd.data import load
from mim4dd.distill import distill
from mim4dd.networks import initialise
from mim4dd.networks.flat import flatten
from mim4dd.networks.flat import load as load_weights
from mim4dd.objectives import (
    DistributionMatching,
    Matched,
    MutualInformation,
    Objective,
    ThroughTermNetworks,
    TrainedOnReal,
    TrainedOnSynthetic,
    TrajectoryMatching,
    term_networks,
)
from mim4dd.seeding import generator


@pytest.fixture
def problem():
    return dataclasses.replace(digits_problem()[0], width=16, layers=(0, 1))


def network_of(problem, flat):
    network = problem.network()
    load_weights(network, flat)
    return network


def weights_of(networks, problem):
    """The weights after what comes before a match; of networks on real images, so that no others matter."""
    networks.renew(torch.zeros(10, 1, 8, 8), problem.labels)
    return networks.weights


def test_networks_on_real_images_are_trained_the_later_the_longer(problem, monkeypatch):
    weights = weights_of(TrainedOnReal(problem), problem)
    assert weights.shape == (
        term_networks.REAL_NETWORKS,
        sum(p.numel() for p in problem.network().parameters()),
    )
    _, test = load("digits")
    first, last = (evaluation.accuracy(network_of(problem, weights[k]), test) for k in (0, -1))
    assert last > 0.8
    assert last > first > 0.1
    monkeypatch.setattr(term_networks, "REAL_STEPS", 10)
    weights = weights_of(TrainedOnReal(problem), problem)
    assert torch.equal(weights_of(TrainedOnReal(problem), problem), weights), "the same seed"
    other = dataclasses.replace(problem, seed=1)
    assert not torch.equal(weights_of(TrainedOnReal(other), other), weights)


def trained_by_hand(problem, random, images, labels, batches):
    """The weights after steps of plain SGD on augmented images at the batches, which are drawn in turn."""
    network = problem.network().requires_grad_()
    initialise(network, random)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for index in batches:
        params = augment.sample(problem.augmentation, len(index), (8, 8), generator=random)
        optimizer.zero_grad()
        F.cross_entropy(network(augment.apply(images[index], params)), labels[index]).backward()
        optimizer.step()
    return flatten(network.parameters())


def test_training_on_real_images_is_plain_sgd(problem, monkeypatch):
    monkeypatch.setattr(term_networks, "REAL_NETWORKS", 1)
    monkeypatch.setattr(term_networks, "REAL_STEPS", 3)
    real, random = problem.real, generator(0, "mim/network/0")
    images = real.batch(torch.arange(len(real)))
    batches = (torch.randint(len(real), (128,), generator=random) for _ in range(3))
    expected = trained_by_hand(problem, random, images, real.labels, batches)
    close(weights_of(TrainedOnReal(problem), problem)[0], expected, 1e-5)


def test_training_a_student_is_plain_sgd(monkeypatch):
    """Through all images in every epoch, no more than 256 a step."""
    monkeypatch.setattr(term_networks, "STUDENT_EPOCHS", (2, 2))
    problem, start = digits_problem(ipc=26)
    random = generator(0, "mim/student")
    epochs = (torch.randperm(260, generator=random) for _ in range(2))
    batches = (batch for order in epochs for batch in order.split(256))
    expected = trained_by_hand(problem, random, start.images, problem.labels, batches)
    networks = TrainedOnSynthetic(problem)
    networks.renew(start.images, problem.labels)
    close(networks.weights[0], expected, 1e-5)


def test_every_network_starts_from_weights_of_its_own(problem, monkeypatch):
    monkeypatch.setattr(term_networks, "REAL_STEPS", 0)
    weights = weights_of(TrainedOnReal(problem), problem)
    assert len(weights.unique(dim=0)) == 10


def test_every_twentieth_match_trains_a_student_for_100_to_400_epochs(problem):
    networks, lengths = TrainedOnSynthetic(problem), generator(0, "mim/student/steps")
    steps, counts = [], []
    networks._training.step = lambda *_: steps.append(None)
    for _ in range(60):
        networks.renew(torch.zeros(10, 1, 8, 8), problem.labels)
        counts.append(len(steps))
        steps.clear()
    expected = [int(torch.randint(100, 401, (), generator=lengths)) for _ in range(3)]
    assert counts[::20] == expected
    assert sum(counts) == sum(expected), "and not in between"


def test_training_on_real_images_is_told_step_by_step_and_done_once(problem, monkeypatch):
    monkeypatch.setattr(term_networks, "REAL_STEPS", 20)
    networks = TrainedOnReal(problem)
    for _ in zip(range(6), networks.train(), strict=False):  # 2 and 4 steps: two networks
        pass
    told = [*networks.train()]
    total = sum(2 * k for k in range(1, 11))
    assert told == [(done, total) for done in range(3, total + 1)], "the second one is begun again"
    assert [*networks.train()] == []
    assert torch.equal(networks.weights, weights_of(TrainedOnReal(problem), problem))


@pytest.mark.parametrize(("architecture", "soft"), [("convnet", False), ("convnet-bn", True)])
def test_a_student_learns_the_synthetic_images_and_makes_room_for_the_next(problem, architecture, soft):
    problem = dataclasses.replace(problem, architecture=architecture)
    _, start = digits_problem()
    images = start.images
    targets = problem.labels
    if soft:
        targets = F.one_hot(targets, 10) * 0.9 + 0.01
    networks = TrainedOnSynthetic(problem)
    students = []
    for _ in range(2 * term_networks.STUDENT_EVERY + 1):
        networks.renew(images, targets)
        students.append(networks.weights[0].clone())
    every = term_networks.STUDENT_EVERY
    first, second, third = (students[k * every] for k in range(3))
    assert all(torch.equal(student, first) for student in students[:every])
    assert all(torch.equal(student, second) for student in students[every : 2 * every])
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    for student in (first, second, third):
        network = network_of(problem, student)
        problem.set_batch_norm_statistics(network, generator(0, "any"))
        assert (network(images).argmax(1) == problem.labels).float().mean() > 0.9
    again = TrainedOnSynthetic(problem)
    again.renew(images, targets)
    assert torch.equal(again.weights[0], first), "the same seed"


def test_a_student_starts_from_nothing(problem, monkeypatch):
    """Neither weights nor momentum of the one before are left in it."""
    _, start = digits_problem()
    monkeypatch.setattr(term_networks, "STUDENT_EVERY", 1)
    monkeypatch.setattr(term_networks, "STUDENT_EPOCHS", (1, 1))
    problem = dataclasses.replace(problem, augmentation="none")
    networks = TrainedOnSynthetic(problem)
    networks.renew(start.images, problem.labels)
    state = networks._random.get_state()
    networks.renew(start.images, problem.labels)
    network = problem.network()
    random = torch.Generator()
    random.set_state(state)
    initialise(network, random)
    network.requires_grad_()
    F.cross_entropy(network(start.images), problem.labels).backward()
    expected = flatten(p - term_networks.LR * p.grad for p in network.parameters())
    torch.testing.assert_close(networks.weights[0], expected)


@pytest.mark.parametrize("architecture", ["convnet", "convnet-bn"])
def test_features_are_those_of_one_of_the_networks(problem, architecture, monkeypatch):
    monkeypatch.setattr(term_networks, "REAL_STEPS", 0)
    problem = dataclasses.replace(problem, architecture=architecture, augmentation="none")
    networks = TrainedOnReal(problem)
    weights = weights_of(networks, problem)
    alone = DistributionMatching(problem)
    objective = ThroughTermNetworks(networks, DistributionMatching(problem), problem)
    images = torch.randn(10, 1, 8, 8, generator=generator(0, "images"), requires_grad=True)
    choice, statistics = generator(0, "mim/choice"), generator(0, "mim/statistics")
    seen = set()
    for _ in range(20):
        matched = prepared_match(objective, images, problem.labels)
        assert torch.equal(matched.loss, prepared_match(alone, images, problem.labels).loss), (
            "the base is left as it is"
        )
        assert len(matched.real_labels) == 10 * problem.real_batch
        chosen = int(torch.randint(10, (1,), generator=choice))
        seen.add(chosen)
        network = network_of(problem, weights[chosen])
        problem.set_batch_norm_statistics(network, statistics)
        for found, expected in zip(matched.synthetic_features, network.features(images), strict=True):
            assert torch.equal(found, expected)
        assert matched.synthetic_features[-1].requires_grad
        assert not matched.real_features[-1].requires_grad
    assert len(seen) > 3


class Plain(Objective):
    """Of a user's own, and not the same work at every call."""

    def __init__(self):
        self.calls = 0

    def match(self, images, targets):
        self.calls += 1
        return Matched(self.calls * images.square().sum(), [images], [images], targets, targets)


def test_no_more_than_64_real_images_a_class_are_compared(problem, monkeypatch):
    monkeypatch.setattr(term_networks, "REAL_STEPS", 0)
    problem = dataclasses.replace(problem, real_batch=100)
    objective = ThroughTermNetworks(TrainedOnReal(problem), Plain(), problem)
    matched = prepared_match(objective, torch.zeros(10, 1, 8, 8), problem.labels)
    assert matched.real_labels.bincount().tolist() == [64] * 10
    assert len(matched.real_features[-1]) == 640


def test_what_the_base_learns_is_learned_through_them(problem, monkeypatch, tmp_path):
    monkeypatch.setattr(term_networks, "REAL_STEPS", 0)
    _, start = digits_problem()
    problem = dataclasses.replace(
        problem, trajectory=dataclasses.replace(problem.trajectory, experts=tmp_path / "experts")
    )
    base = TrajectoryMatching(problem)
    objective = ThroughTermNetworks(TrainedOnReal(problem), base, problem)
    assert objective.network_lr == pytest.approx(0.01)
    distilled = distill(objective, start, iterations=2, lr=0.0, momentum=0.0)
    assert abs(base.network_lr - 0.01) > 1e-5
    assert distilled.network_lr == objective.network_lr == base.network_lr


@pytest.mark.parametrize("kind", [TrainedOnReal, TrainedOnSynthetic])
def test_any_objective_can_be_seen_through_them(problem, kind, monkeypatch):
    monkeypatch.setattr(term_networks, "REAL_STEPS", 10)
    monkeypatch.setattr(term_networks, "STUDENT_EPOCHS", (10, 10))
    _, start = digits_problem()
    base = Plain()
    objective = ThroughTermNetworks(kind(problem), base, problem)
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


@pytest.mark.parametrize("kind", [TrainedOnReal, TrainedOnSynthetic])
def test_the_loss_through_them_falls(problem, kind):
    _, start = digits_problem()
    looks = []
    distill(
        ThroughTermNetworks(kind(problem), DistributionMatching(problem), problem),
        start,
        iterations=60,
        lr=1.0,
        momentum=0.5,
        mutual_information=MutualInformation(weight=100, loss="info_nce", layers="all", temperature=0.03),
        on_progress=looks.append,
    )
    assert looks[-1].terms["mim"] < 0.7 * looks[0].terms["mim"]
