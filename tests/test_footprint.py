"""What an update is said to take, before it begins, is about what it takes."""

import dataclasses

import pytest
import torch
from allocations import allocated_at_most

from bench import problems
from mim4dd import extension
from mim4dd.distill import distill
from mim4dd.networks import precision
from mim4dd.objectives import METHODS, MutualInformation, ThroughTermNetworks, TrainedOnReal, term_networks
from mim4dd.objectives.footprint import of_term

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


def updates(objective, term=None):
    problem = objective.problem
    start = problems.synthetic_set(problem, problems.synthetic_images(problem))
    return lambda: distill(objective, start, iterations=1, lr=0.1, momentum=0.5, mutual_information=term)


def problem_of(method, device, folder, *, steps=5, **settings):
    sizes = {"width": 32, "real_batch": 40, "precision": precision.resolve("auto", torch.device(device))}
    return problems.problem(
        problems.real_images(40, device, shape=(3, 32, 32)),
        20,
        augmentation=problems.STRATEGY if METHODS[method].augmented else "none",
        trajectory=problems.trajectory(folder, student_steps=steps, student_batch=100),
        **sizes | settings,
    )


def check(objective, predicted, device, term=None):
    step = updates(objective, term)
    step()  # makes what lasts
    assert allocated_at_most(step, device) == pytest.approx(predicted, rel=0.35)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("method", METHODS)
def test_an_update_takes_what_was_predicted(method, device, tmp_path):
    problem = problem_of(method, device, tmp_path)
    objective = METHODS[method].objective(problem)
    objective.inner = 0  # of gradient matching: the network is not trained, which takes less
    check(objective, METHODS[method].footprint(problem), device)


@pytest.mark.parametrize("method", ["dm", "dc"])
def test_without_the_extension_it_takes_more(method, tmp_path, monkeypatch):
    problem = problem_of(method, "cpu", tmp_path, precision="fp32")
    compiled = METHODS[method].footprint(problem)
    monkeypatch.setattr(extension, "available", lambda *_: False)
    assert METHODS[method].footprint(problem) > 3 * compiled
    objective = METHODS[method].objective(problem)
    objective.inner = 0
    check(objective, METHODS[method].footprint(problem), "cpu")


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("method", ["dm", "dsa"])
def test_batch_normalisation_takes_its_images_at_once(method, device, tmp_path):
    settings = {"architecture": "convnet-bn", "precision": "fp32", "real_batch": 40 if method == "dm" else 4}
    problem = problem_of(method, device, tmp_path, **settings)
    objective = METHODS[method].objective(problem)
    objective.inner = 0
    check(objective, METHODS[method].footprint(problem), device)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_trajectory_s_graphs_count_as_far_as_they_are_kept(device, tmp_path):
    problem = problem_of("mtt", device, tmp_path, memory=1)
    one = METHODS["mtt"].footprint(problem)
    check(METHODS["mtt"].objective(problem), one, device)
    graph = problem.graph_bytes(100)
    for graphs in (3, 8):  # of 5 steps
        kept = dataclasses.replace(problem, memory=2 * graphs * graph)
        predicted = METHODS["mtt"].footprint(kept)
        assert predicted - one == (min(graphs, 5) - 1) * graph
        check(METHODS["mtt"].objective(kept), predicted, device)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_more_steps_of_a_trajectory_take_their_weights_and_no_more(device, tmp_path):
    """And the parameters of their augmentation, a few bytes each; one graph takes 17 MB."""
    taken = []
    for steps in (2, 12):
        problem = problem_of("mtt", device, tmp_path, steps=steps, memory=1, precision="fp32")
        step = updates(METHODS["mtt"].objective(problem))
        step()
        taken.append(allocated_at_most(step, device))
    assert taken[1] - taken[0] < 10 * problem.weight_bytes + 2**20


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_term_comes_on_top(device, tmp_path, monkeypatch):
    """With networks of its own, here hardly trained; of 64 real images a class at most."""
    monkeypatch.setattr(term_networks, "REAL_STEPS", 10)
    alone = problem_of("dm", device, tmp_path, real_batch=100)
    problem = dataclasses.replace(alone, layers=(0, 1, 2))
    objective = ThroughTermNetworks(TrainedOnReal(problem), METHODS["dm"].objective(alone), problem)
    term = MutualInformation(loss="info_nce", temperature=0.03, weight=1.0, layers="all")
    check(objective, METHODS["dm"].footprint(alone) + of_term(problem), device, term)
    assert of_term(problem) == of_term(dataclasses.replace(problem, real_batch=64))
