"""Networks with batch normalisation: whose statistics are used where, by plain formulas."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import close, digits_problem, prepared_match

from mim4dd import augment, evaluation, networks, run
from mim4dd.objectives import DistributionMatching, GradientMatching, distribution_distance, gradient_distance
from mim4dd.seeding import generator
from mim4dd.stacked import Stack


def forward(network, x, statistics=None):
    """The last map of x and the statistics [(mean, unbiased variance)] of every block's normalisation.

    Normalised by the given statistics, or else by those of x.
    """
    found = []
    for k, block in enumerate(network.blocks):
        conv, norm, *rest = block
        x = conv(x)
        mean, n = x.mean((0, 2, 3)), x.numel() / x.shape[1]
        variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
        found.append((mean.detach(), variance.detach() * n / (n - 1)))
        if statistics is not None:
            mean, variance = statistics[k]
        x = (x - mean[:, None, None]) / (variance[:, None, None] + norm.eps).sqrt()
        x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
        for module in rest:
            x = module(x)
    return x, found


def bn_problem(**changes):
    problem, start = digits_problem(ipc=2)
    return dataclasses.replace(problem, architecture="convnet-bn", **changes), start.images


def test_initialisation_forgets_the_statistics():
    problem, images = bn_problem()
    network = problem.network()
    networks.initialise(network, generator(0, "w"))
    first = {name: value.clone() for name, value in network.state_dict().items()}
    assert all(first[f"blocks.{k}.1.running_var"].eq(1).all() for k in (0, 1))
    network.train()(images)
    assert not network.state_dict()["blocks.0.1.running_mean"].eq(0).any()
    networks.initialise(network, generator(0, "w"))
    assert all(torch.equal(value, first[name]) for name, value in network.state_dict().items())


def test_settled_statistics_do_not_depend_on_those_before():
    problem, images = bn_problem()
    network = problem.network()
    networks.initialise(network, generator(0, "w"))
    problem.set_batch_norm_statistics(network, generator(0, "statistics"))
    expected = network(images)
    for before in (torch.nan, torch.inf, 5.0):  # what unset memory may hold
        for k in (0, 1):
            network.blocks[k][1].running_mean.fill_(before)
            network.blocks[k][1].running_var.fill_(before)
        problem.set_batch_norm_statistics(network, generator(0, "statistics"))
        assert torch.equal(network(images), expected)


def test_settled_statistics_are_those_of_real_images():
    problem, _ = bn_problem()
    network = problem.network()
    networks.initialise(network, generator(0, "w"))
    problem.set_batch_norm_statistics(network, generator(0, "s"))
    index = problem.real.sample(16, generator(0, "s")).flatten()
    assert len(index) == 160
    _, statistics = forward(network, problem.real.batch(index))
    for block, (mean, variance) in zip(network.blocks, statistics, strict=True):
        close(block[1].running_mean, mean)
        close(block[1].running_var, variance)
    assert not network.training


@pytest.mark.parametrize("calls", [1, 2])
def test_gradient_matching_uses_one_network_for_both_sides(calls):
    """Against a loop over classes, frozen at statistics taken by hand; new and trained in between."""
    problem, images = bn_problem(augmentation="none", layers=(1,))
    x = images.clone().requires_grad_()
    objective = GradientMatching(problem)
    for _ in range(calls):
        matched = prepared_match(objective, x, problem.labels)

    real, network = problem.real, objective.network.network
    random = {purpose: generator(0, f"dc/{purpose}") for purpose in ("real", "statistics")}
    for _ in range(calls):
        index = real.sample(problem.real_batch, random["real"])
        statistics_of = real.sample(16, random["statistics"]).flatten()
    _, statistics = forward(network, real.batch(statistics_of))
    parameters = [*network.requires_grad_().parameters()]
    expected = 0
    for c in range(10):
        grads = []
        for batch in (x[2 * c : 2 * c + 2], real.batch(index[c])):
            logits = network.classifier(forward(network, batch, statistics)[0].flatten(1))
            loss = F.cross_entropy(logits, torch.full((len(batch),), c))
            grads.append(torch.autograd.grad(loss, parameters, create_graph=True))
        expected = expected + gradient_distance(*grads)
    close(matched.loss, expected)
    close(*(torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (matched.loss, expected)), 1e-3)
    close(matched.synthetic_features[1], forward(network, images, statistics)[0])


def test_inner_training_is_in_training_mode():
    problem, images = bn_problem(augmentation="none")
    objective = GradientMatching(problem)
    prepared_match(objective, images, problem.labels)
    settled = objective.network.network.blocks[0][1].running_mean.clone()
    objective.train(images, problem.labels)
    assert objective.network.training
    assert not torch.equal(objective.network.network.blocks[0][1].running_mean, settled)


def test_distribution_matching_normalises_each_side_by_itself():
    problem, images = bn_problem()
    x = images.clone().requires_grad_()
    objective = DistributionMatching(problem)
    matched = prepared_match(objective, x, problem.labels)
    real, network = problem.real, objective.network
    params = augment.sample("color_crop", 10, (8, 8), generator=generator(0, "dm/augmentation"), mode="each")
    labels = torch.arange(10).repeat_interleave(problem.real_batch)
    real_images = real.batch(real.sample(problem.real_batch, generator(0, "dm/real")).flatten())
    assert len(real_images) > networks.CHUNK["cpu"]
    real_map, _ = forward(network, augment.apply(real_images, params[labels]))
    synthetic_map, _ = forward(network, augment.apply(x, params[problem.labels]))
    expected = distribution_distance(real_map, synthetic_map, labels, problem.labels)
    close(matched.loss, expected)
    close(*(torch.autograd.grad(loss, x)[0] for loss in (matched.loss, expected)), 1e-3)


def test_accuracy_does_not_depend_on_the_other_images():
    """Tested in evaluation mode: image by image as in one batch."""
    problem, images = bn_problem()
    network = problem.network().requires_grad_()
    networks.initialise(network, generator(0, "w"))
    protocol = evaluation.Protocol(epochs=20, augmentation="none", architecture="convnet-bn", width=8)
    evaluation.train(Stack.of(network, generator(0, "t")), [(images, problem.labels)], protocol)
    test = dataclasses.replace(problem.real, images=problem.real.images[:40], labels=problem.real.labels[:40])
    accuracy = evaluation.accuracy(network, test)
    with torch.no_grad():
        right = [network(test.batch(torch.tensor([k]))).argmax(1) == test.labels[k] for k in range(40)]
    assert accuracy == pytest.approx(torch.cat(right).float().mean().item())
    assert accuracy > 0.2


@pytest.mark.parametrize("method", ["dm", "dc"])
def test_a_run_beats_random_images(tmp_path, method, capsys):
    sizes = ["--iterations", "40", "--eval-epochs", "60", "--num-eval", "3", "--init", "real"]
    arguments = ["--quick", *sizes, "--network", "convnet-bn", "--method", method, "--mim-weight", "1"]
    assert run.main([*arguments, "--out", str(tmp_path / "a")]) == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["accuracy_mean"] > result["baselines"]["random"]["accuracy_mean"] + 0.03
