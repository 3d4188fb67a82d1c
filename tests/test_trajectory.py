"""The objective of trajectory matching. The distance alone is in test_distances.py."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
import trajectories
from conftest import close, digits_problem, prepared_match
from torch.func import functional_call
from trajectories import weights, with_options

from mim4dd import augment, run, stacked
from mim4dd.networks.flat import load, unflatten
from mim4dd.networks.memory import per_image
from mim4dd.objectives import TrajectoryConfig, TrajectoryMatching, student, train_experts
from mim4dd.seeding import generator

problem = trajectories.problem  # a fixture


def test_the_objective_is_the_distance_after_steps_on_minibatches(problem):
    """Against plain unrolled steps with the same draws: by images, soft labels and the learned step size."""
    _, start = digits_problem(ipc=2)
    objective = TrajectoryMatching(problem)
    images = start.images.clone().requires_grad_()
    logits = torch.randn(20, 10, generator=generator(0, "logits")).requires_grad_()
    matched = prepared_match(objective, images, logits.softmax(1))
    found = torch.autograd.grad(matched.loss, [images, logits, objective.log_lr])

    matches, training = generator(0, "mtt/match"), generator(0, "mtt/training")
    expert, snapshot = (int(torch.randint(2, (), generator=matches)) for _ in range(2))
    first, target = weights(problem, expert, snapshot), weights(problem, expert, snapshot + 2)
    order = torch.randperm(20, generator=training)
    lr = torch.tensor(0.01).log().requires_grad_()
    student = {name: w.clone().requires_grad_() for name, w in unflatten(first, problem.network()).items()}
    for k in range(3):
        index = order[6 * k : 6 * k + 6]
        params = augment.sample(problem.augmentation, 6, (8, 8), generator=training)
        out = functional_call(problem.network(), student, (augment.apply(images[index], params),))
        loss = F.cross_entropy(out, logits.softmax(1)[index])
        gradient = torch.autograd.grad(loss, [*student.values()], create_graph=True)
        student = {n: w - lr.exp() * g for (n, w), g in zip(student.items(), gradient, strict=True)}
    aim = unflatten(target, problem.network())
    left = torch.stack([(student[name] - weight).square().sum() for name, weight in aim.items()]).sum()
    expected = left / (first - target).square().sum()
    close(matched.loss, expected)
    for one, other in zip(found, torch.autograd.grad(expected, [images, logits, lr]), strict=True):
        close(one, other)
    assert objective.network_lr == pytest.approx(0.01)
    (trained,) = objective.trained
    assert trained["params"][0] is objective.log_lr
    assert trained["lr"] == 0.1
    assert found[0][order[18:]].abs().max() == 0, "two images were not in the first three batches"


def test_the_size_of_the_steps_starts_and_is_learned_as_the_settings_say(problem):
    objective = TrajectoryMatching(with_options(problem, student_lr=0.03, student_lr_rate=0.7))
    assert objective.network_lr == pytest.approx(0.03)
    assert objective.trained[0]["lr"] == 0.7


def test_a_match_starts_anywhere_and_ends_a_span_later(problem):
    objective = TrajectoryMatching(problem)
    known = {(e, k): weights(problem, e, k) for e in range(2) for k in range(4)}
    seen = set()
    for _ in range(20):
        objective.prepare(torch.zeros(20, 1, 8, 8), problem.labels)
        (start,) = [key for key, value in known.items() if torch.equal(value, objective.start)]
        assert torch.equal(objective.target, known[start[0], start[1] + 2])
        seen.add(start)
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize("ordered", [{"cpu"}, set()])
def test_every_round_of_the_images_is_in_a_new_order(problem, ordered, monkeypatch):
    """On a GPU as well, where a single batch would need none."""
    monkeypatch.setattr(stacked, "ORDERED", ordered)
    objective = TrajectoryMatching(with_options(problem, student_steps=10))
    steps = [*objective._indices(20)]
    assert [len(index) for index in steps] == [6] * 10
    first, second, third = torch.cat(steps).split(20)
    for order in (first, second, third):
        assert order.sort().values.tolist() == [*range(20)]
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_a_step_is_on_all_images_at_most(problem):
    objective = TrajectoryMatching(with_options(problem, student_batch=50))
    assert prepared_match(objective, torch.rand(20, 1, 8, 8), problem.labels).loss.isfinite()
    assert [len(index) for index in objective._indices(20)] == [20] * 3


def test_steps_on_all_images_are_in_no_order_on_a_gpu(problem, monkeypatch):
    """Which changes nothing but what is drawn: without an augmentation, nothing at all."""
    problem = dataclasses.replace(with_options(problem, student_batch=None), augmentation="none")
    images = torch.rand(20, 1, 8, 8, generator=generator(0, "x"), dtype=torch.float64)
    losses = []
    for ordered in ({"cpu"}, set()):
        monkeypatch.setattr(stacked, "ORDERED", ordered)
        objective = TrajectoryMatching(problem)
        objective.network.double()
        objective.start, objective.target = objective.start.double(), objective.target.double()
        before = objective.random["training"].get_state()
        losses.append(prepared_match(objective, images, problem.labels).loss)
        assert torch.equal(objective.random["training"].get_state(), before) is not bool(ordered)
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


def test_features_for_the_term_are_those_of_the_starting_network(problem):
    problem = dataclasses.replace(problem, layers=(1,), augmentation="none")
    _, start = digits_problem(ipc=2)
    matched = prepared_match(TrajectoryMatching(problem), start.images, problem.labels)
    matches = generator(0, "mtt/match")
    first = weights(problem, *(int(torch.randint(2, (), generator=matches)) for _ in range(2)))
    network = problem.network()
    load(network, first)
    torch.testing.assert_close(matched.synthetic_features[1], network.features(start.images)[1])
    index = problem.real.sample(problem.real_batch, generator(0, "mtt/real")).flatten()
    torch.testing.assert_close(matched.real_features[1], network.features(problem.real.batch(index))[1])
    assert torch.equal(matched.real_labels, problem.real.labels[index])


def test_the_learned_step_size_is_kept_and_used(tmp_path, capsys):
    options = ["--quick", "--method", "mtt", "--iterations", "3", "--num-eval", "1", "--eval-epochs", "2"]
    out = tmp_path / "a"
    assert run.main([*options, "--experts", str(tmp_path / "e"), "--out", str(out)]) == 0
    assert "prepare mtt 6/6" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert result["network_lr"] != 0.01
    assert 0.005 < result["network_lr"] < 0.1
    assert run.main([*options, "--experts", str(tmp_path / "e"), "--out", str(tmp_path / "b")]) == 0
    assert "prepare mtt" not in capsys.readouterr().out, "experts are reused"
    bad = [*options, "--max-start", "9", "--experts", str(tmp_path / "d"), "--out", str(tmp_path / "c")]
    assert run.main(bad) == 2
    assert "--expert-snapshots is 6, but --max-start 9" in capsys.readouterr().err
    assert not (tmp_path / "c").exists(), "before any work"


@pytest.mark.parametrize("missing", ["max_start", "student_steps"])
def test_a_problem_without_settings_is_refused(problem, missing):
    unset = dataclasses.replace(problem, trajectory=TrajectoryConfig())
    for other in (unset, with_options(problem, **{missing: None})):
        with pytest.raises(ValueError, match=r"Problem\(trajectory=TrajectoryConfig\(max_start="):
            TrajectoryMatching(other)


@pytest.mark.parametrize("missing", ["num_experts", "expert_snapshots"])
def test_experts_without_a_number_are_refused(problem, missing):
    with pytest.raises(
        ValueError, match=r"TrajectoryConfig\(num_experts=\.\.\., expert_snapshots=\.\.\.\) is needed"
    ):
        TrajectoryMatching(with_options(problem, **{missing: None}))


def test_graphs_are_kept_as_far_as_half_of_the_memory_goes(problem, monkeypatch):
    """Six images a step; on a CPU, which has no budget, none are."""
    for _ in train_experts(problem):
        pass
    network = problem.network()
    maps = 6 * per_image(network, (1, 8, 8), gradients=True, transformed=True)
    one = maps + 4 * 4 * sum(weight.numel() for weight in network.parameters())
    made, graph = [], student._graph
    monkeypatch.setattr(student, "_graph", lambda *given: made.append(1) or graph(*given))
    outcomes = []
    for memory, kept in ((None, 0), (2 * one - 1, 0), (4 * one, 2), (10**9, 10**9 // 2 // one)):
        objective = TrajectoryMatching(dataclasses.replace(problem, memory=memory))
        assert objective.kept == kept
        images = torch.rand(20, 1, 8, 8, generator=generator(0, "x"), requires_grad=True)
        made.clear()
        loss = prepared_match(objective, images, problem.labels).loss
        assert len(made) == min(kept, 3), "of so many steps"
        outcomes.append((loss.detach(), *torch.autograd.grad(loss, [images, objective.log_lr])))
    for other in outcomes[1:]:
        assert all(torch.equal(one, wanted) for one, wanted in zip(other, outcomes[0], strict=True))
