"""What a program sets as torch's default dtype and device changes no result."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from conftest import digits_problem

from mim4dd import augment, data
from mim4dd.distill import distill
from mim4dd.evaluation import Protocol, evaluate
from mim4dd.objectives import METHODS, MutualInformation, ThroughTermNetworks, TrainedOnSynthetic
from mim4dd.seeding import generator
from mim4dd.synthetic import initialise


@contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = [
    pytest.param(float64_by_default, id="float64"),
    pytest.param(lambda: torch.device("meta"), id="meta"),  # in place of a GPU: no values can come from it
]


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("method", METHODS)
def test_distilling_and_evaluating(method, default):
    problem, start = digits_problem()
    problem = dataclasses.replace(problem, layers=(0, 1))

    def results():
        base = METHODS[method].objective(problem)
        objective = (
            ThroughTermNetworks(TrainedOnSynthetic(problem), base, problem) if method == "dm" else base
        )
        term = MutualInformation(
            layers="all",
            projection="trained",
            feature_sizes=problem.network().feature_sizes,
            generator=generator(0, "projection"),
        )
        made = distill(objective, start, iterations=2, lr=0.1, momentum=0.5, mutual_information=term)
        protocol = Protocol(2, problem.augmentation, width=8)
        score = evaluate(
            lambda _: (made.decoded, made.targets), problem.real, protocol, num_networks=2, seed=0
        )
        return made.images, score.accuracies

    images, accuracies = results()
    with default():
        ours, our_accuracies = results()
    assert torch.equal(ours, images)
    assert our_accuracies == accuracies


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("mode", ["single", "each", "all"])
def test_drawing_an_augmentation(mode, default):
    def drawn():
        return augment.sample(augment.DSA, 8, 16, generator=generator(0, "test"), mode=mode).fields()

    expected = drawn()
    with default():
        actual = drawn()
    assert all(torch.equal(field, expected[name]) for name, field in actual.items())


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("how", ["real", "kmeans", "noise"])
def test_loading_and_starting(how, default):
    def started():
        return initialise(data.load("digits")[0], 2, how, generator(0, "test"))

    expected = started()
    with default():
        actual = started()
    for name in ("images", "labels", "mean", "std"):
        assert torch.equal(getattr(actual, name), getattr(expected, name))
