"""The base methods as objectives: draws, loops, and the features they hand on."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import close, digits_problem, prepared_match

from mim4dd import augment, networks, seeding
from mim4dd.objectives import METHODS, DistributionMatching, GradientMatching, gradient_distance
from mim4dd.objectives.gradient import loops


def weights_of(network):
    return torch.cat([weight.detach().flatten() for weight in network.parameters()])


@pytest.mark.parametrize("method", METHODS)
def test_an_objective_repeats_itself_and_only_itself(method):
    problem, start = digits_problem()
    images = start.images
    draws = []
    for seed in (0, 0, 1):
        objective = METHODS[method].objective(dataclasses.replace(problem, seed=seed))
        x = images.clone().requires_grad_()
        losses = [prepared_match(objective, x, problem.labels).loss for _ in range(2)]
        draws.append((torch.stack(losses).detach(), torch.autograd.grad(losses[1], x)[0]))
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[2][0])
    assert draws[0][0][0] != draws[0][0][1], "every iteration draws anew"


def test_chunked_real_features_are_those_of_one_pass():
    problem, start = digits_problem(ipc=7)  # 70 images: two chunks of 32 and a rest
    images = start.images
    problem = dataclasses.replace(problem, layers=(0,))
    objective = DistributionMatching(problem)
    prepared_match(objective, images, problem.labels)
    first, last = problem.real_features(objective.network, images)
    whole = objective.network.features(images)
    torch.testing.assert_close(first, whole[0])
    torch.testing.assert_close(last, whole[1])
    unneeded, _ = dataclasses.replace(problem, layers=()).real_features(objective.network, images)
    assert not unneeded.numel()


def test_distribution_matching_looks_through_a_new_network_every_time():
    problem, start = digits_problem()
    objective, random = DistributionMatching(problem), seeding.generator(0, "dm/network")
    for _ in range(2):
        prepared_match(objective, start.images, problem.labels)
        network = problem.network()
        networks.initialise(network, random)
        close(weights_of(objective.network), weights_of(network), 0)


# The chunks that images of a class are taken in hold 32.
@pytest.mark.parametrize(("augmentation", "real_batch"), [("none", 8), ("color_crop", 40)])
def test_gradient_matching_sums_over_the_classes(augmentation, real_batch):
    """Against a plain loop over classes with the same draws."""
    problem, start = digits_problem(ipc=2)
    images = start.images
    problem = dataclasses.replace(problem, augmentation=augmentation, real_batch=real_batch, layers=(1,))
    x = images.clone().requires_grad_()
    objective = GradientMatching(problem)
    matched = prepared_match(objective, x, problem.labels)

    real, network = problem.real, objective.network.network
    parameters = [*network.requires_grad_().parameters()]
    index = real.sample(problem.real_batch, seeding.generator(0, "dc/real"))
    params = augment.sample(
        augmentation, 10, (8, 8), generator=seeding.generator(0, "dc/augmentation"), mode="each"
    )
    expected = 0
    for c in range(10):
        grads = []
        for batch in (x[2 * c : 2 * c + 2], real.batch(index[c])):
            labels = torch.full((len(batch),), c)
            loss = F.cross_entropy(network(augment.apply(batch, params[labels])), labels)
            grads.append(torch.autograd.grad(loss, parameters, create_graph=True))
        expected = expected + gradient_distance(*grads)
    close(matched.loss, expected)
    close(*(torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (matched.loss, expected)))
    spread = params[matched.synthetic_labels]
    close(matched.synthetic_features[1], network.features(augment.apply(images, spread))[1])
    assert not matched.synthetic_features[0].numel(), "a map that the add-on does not ask for"
    assert not matched.real_features[1].requires_grad


@pytest.mark.parametrize("labels", [torch.arange(10).repeat(2), torch.arange(20) // 2 % 9])
def test_gradient_matching_wants_images_class_by_class(labels):
    problem, _ = digits_problem(ipc=2)
    with pytest.raises(
        ValueError, match="labels are not in order of class, .* expected 2 of class 0, as many"
    ):
        GradientMatching(dataclasses.replace(problem, labels=labels))


def test_gradient_matching_loops_are_the_published_ones():
    published = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    assert {ipc: loops(ipc) for ipc in published} == published
    assert all(1 <= outer <= 50 and inner >= 10 for outer, inner in map(loops, range(2, 200)))


def test_gradient_matching_trains_its_network_as_published():
    """Against plain SGD with the same draws, two of its epochs."""
    problem, start = digits_problem(ipc=2)
    problem = dataclasses.replace(problem, augmentation="crop")
    objective = GradientMatching(problem)
    objective.inner = 2
    for _ in range(2):
        objective.prepare(start.images, problem.labels)
    network, training = problem.network().requires_grad_(), seeding.generator(0, "dc/training")
    networks.initialise(network, seeding.generator(0, "dc/network"))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(2):
        order = torch.randperm(20, generator=training)
        params = augment.sample("crop", 20, (8, 8), generator=training)
        optimizer.zero_grad()
        F.cross_entropy(network(augment.apply(start.images[order], params)), problem.labels[order]).backward()
        optimizer.step()
    close(weights_of(objective.network), weights_of(network), 1e-5)


@pytest.mark.parametrize(("ipc", "epochs", "batches"), [(2, 250, [20]), (26, 20, [256, 4])])
def test_gradient_matching_trains_for_as_many_epochs_as_published(ipc, epochs, batches):
    problem, start = digits_problem(ipc=ipc)
    objective, steps = GradientMatching(problem), []
    objective.step = lambda index, images, targets: steps.append(index[0])
    for _ in range(2):
        objective.prepare(start.images, problem.labels)
    assert [len(index) for index in steps] == batches * epochs
    assert torch.cat(steps).bincount().tolist() == [epochs] * 10 * ipc, "each image in each epoch"


def test_gradient_matching_trains_its_network_between_image_steps():
    problem, start = digits_problem(ipc=2)
    images = start.images
    objective = GradientMatching(problem)
    assert objective.outer == 2

    def loss():
        return F.cross_entropy(objective.network.network(images), problem.labels)

    prepared_match(objective, images, problem.labels)
    first, first_loss = weights_of(objective.network), loss()
    prepared_match(objective, images, problem.labels)
    assert loss() < first_loss
    prepared_match(objective, images, problem.labels)
    third = weights_of(objective.network)
    assert not torch.equal(third, first), "a new network"
    assert third.abs().max() <= first.abs().max() * 1.01, "that is not trained yet"
