"""Trajectory matching: its experts and the objective. The distance alone is in test_distances.py."""

import dataclasses
import json
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import close, digits_problem, prepared_match
from torch.func import functional_call

from mim4dd import augment, experts, networks, run, stacked
from mim4dd.errors import InputError
from mim4dd.experts import Experts
from mim4dd.networks.flat import flatten, load, unflatten
from mim4dd.networks.memory import per_image
from mim4dd.objectives import TrajectoryMatching, student, train_experts
from mim4dd.objectives.trajectory import open_experts, recipe
from mim4dd.seeding import generator


@pytest.fixture
def problem(tmp_path):
    problem, _ = digits_problem(ipc=2)
    return with_options(problem, experts=tmp_path / "experts")


def with_options(problem, **options):
    return dataclasses.replace(problem, trajectory=dataclasses.replace(problem.trajectory, **options))


def weights(problem, expert, snapshot):
    return open_experts(recipe(problem)).weights(expert, snapshot, torch.device("cpu"))


def test_experts_are_networks_trained_by_plain_sgd(problem):
    assert [done for done, _ in train_experts(problem)] == [0, 1, 2, 3, 3, 4, 5, 6]
    real, network, random = problem.real, problem.network(), generator(0, "expert/1")
    networks.initialise(network.requires_grad_(), random)
    close(flatten(network.parameters()), weights(problem, 1, 0), 0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    order = torch.randperm(len(real), generator=random)
    for k in range(6):
        index = order[256 * k : 256 * (k + 1)]
        params = augment.sample(problem.augmentation, len(index), (8, 8), generator=random)
        optimizer.zero_grad()
        F.cross_entropy(network(augment.apply(real.batch(index), params)), real.labels[index]).backward()
        optimizer.step()
        if k % 2:
            close(flatten(network.parameters()), weights(problem, 1, (k + 1) // 2), 1e-5)


def test_experts_of_an_epoch(problem):
    problem = with_options(problem, num_experts=1, expert_batches=0, expert_snapshots=2)
    problem = with_options(problem, max_start=1)
    for _ in train_experts(problem):
        pass
    assert recipe(problem).interval == 6, "1438 images in batches of 256"
    assert not torch.equal(weights(problem, 0, 1), weights(problem, 0, 2))


def test_experts_trained_together_are_those_trained_alone(problem, tmp_path, monkeypatch):
    alone = with_options(problem, experts=tmp_path / "alone")
    for _ in train_experts(alone):
        pass
    monkeypatch.setitem(stacked.AT_ONCE, "cpu", 2)
    assert [done for done, _ in train_experts(problem)] == [0, 2, 4, 6]
    for expert in range(2):
        close(weights(problem, expert, 3), weights(alone, expert, 3), 1e-5)


def test_experts_are_found_again_and_training_goes_on_where_it_was_cut_off(problem, tmp_path):
    whole = with_options(problem, experts=tmp_path / "whole")
    for _ in train_experts(whole):
        pass
    assert list(train_experts(whole)) == [], "they are there"
    for done, _ in train_experts(problem):
        if done == 4:
            break  # in the middle of the second expert
    assert not recipe(problem).path().exists(), "half a file is never taken for a whole one"
    assert next(iter(train_experts(problem)))[0] == 3, "the first expert is kept"
    assert list(train_experts(problem))[-1] == (6, 6)
    for expert in range(2):
        assert torch.equal(weights(problem, expert, 3), weights(whole, expert, 3))
    other_seed = dataclasses.replace(problem, seed=5)
    assert list(train_experts(other_seed)) == [], "runs of every seed share them"
    other_width = dataclasses.replace(problem, width=4)
    assert list(train_experts(other_width)), "another network has its own"
    rounded = dataclasses.replace(problem, precision="bf16")
    assert recipe(rounded).path() != recipe(problem).path(), "and so has another precision"


def test_an_expert_whose_last_snapshot_is_half_written_is_trained_anew(problem):
    for done, _ in train_experts(problem):
        if done == 4:
            break
    partial = recipe(problem).path().with_suffix(".partial")
    with partial.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\1\1\1")  # of the last snapshot of the second expert
    assert next(iter(train_experts(problem)))[0] == 3
    assert list(train_experts(problem))[-1] == (6, 6)
    assert not partial.with_suffix(".finished").exists()


def test_a_note_of_finished_experts_counts_for_its_own_file_only(problem):
    finished = recipe(problem).path().with_suffix(".finished")
    finished.parent.mkdir(parents=True)
    finished.write_text("2")  # of a run that was killed as it ended, whose experts were removed since
    assert next(iter(train_experts(problem)))[0] == 0
    assert list(train_experts(problem))[-1] == (6, 6)
    assert weights(problem, 1, 3).any()


def test_a_full_disk_is_told(problem, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(InputError, match=r"has no room for 0\.0 GiB of experts \(No space left on device\)"):
        next(iter(train_experts(problem)))
    assert not list(recipe(problem).path().parent.glob("*.partial"))


@pytest.mark.parametrize(
    "change",
    [
        {"augmentation": "crop"},
        {"width": 4},
        {"architecture": "mlp"},
        {"precision": "bf16"},
        {"num_experts": 1},
        {"expert_snapshots": 4},
        {"expert_batches": 3},
        {"expert_seed": 1},
    ],
    ids=str,
)
def test_experts_trained_otherwise_are_others(problem, change):
    ((name, _),) = change.items()
    own = hasattr(problem.trajectory, name)
    other = with_options(problem, **change) if own else dataclasses.replace(problem, **change)
    assert recipe(other).path() != recipe(problem).path()


def test_experts_of_another_seed_start_from_other_weights(problem):
    other = with_options(problem, expert_seed=1)
    for one in (problem, other):
        for _ in train_experts(one):
            pass
    assert not torch.equal(weights(problem, 0, 0), weights(other, 0, 0))


def test_two_runs_train_their_experts_once(problem):
    """The second waits for the first, and then finds them."""
    first, found = train_experts(problem), []
    next(first)
    second = threading.Thread(target=lambda: found.append([*train_experts(problem)]))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert list(first)[-1] == (6, 6)
    second.join()
    assert found == [[]]


def test_an_experts_file_that_does_not_fit_is_refused(problem, tmp_path):
    for _ in train_experts(problem):
        pass
    named = with_options(problem, experts=recipe(problem).path())
    assert list(train_experts(named)) == []
    with pytest.raises(InputError, match="is of another width: 8, but this run has 4; name another file"):
        train_experts(dataclasses.replace(named, width=4))
    with pytest.raises(InputError, match="is of another data"):
        train_experts(
            dataclasses.replace(
                named, real=dataclasses.replace(problem.real, labels=problem.real.labels.flip(0))
            )
        )
    with pytest.raises(InputError, match="is of another architecture: convnet"):
        train_experts(dataclasses.replace(named, architecture="mlp"))
    longer = with_options(named, max_start=4, expert_snapshots=9)
    with pytest.raises(InputError, match="holds 3 snapshots, but --max-start 4 with --span 2 needs 5"):
        train_experts(longer)
    with pytest.raises(InputError, match="--expert-snapshots is 3, but --max-start 3 with --span 2 needs 4"):
        train_experts(with_options(problem, max_start=3, expert_seed=5))
    shorter = with_options(named, max_start=2, expert_snapshots=1)
    assert list(train_experts(shorter)) == [], "what the file holds is what counts"
    one_class = dataclasses.replace(problem.real, class_names=("all",))
    with pytest.raises(InputError, match="there is only one class"):
        train_experts(dataclasses.replace(problem, real=one_class))
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"bad.safetensors cannot be read"):
        train_experts(with_options(problem, experts=tmp_path / "bad.safetensors"))
    with pytest.raises(InputError, match=r"none.safetensors: no such file; name a folder"):
        train_experts(with_options(problem, experts=tmp_path / "none.safetensors"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be"):
        train_experts(with_options(problem, experts=tmp_path / "file" / "below"))


def test_a_future_version_of_the_file_is_refused(problem, monkeypatch):
    for _ in train_experts(problem):
        pass
    path = recipe(problem).path()
    monkeypatch.setattr(experts, "FORMAT", "mim4dd-experts-3")
    with pytest.raises(InputError, match="is of another format: mim4dd-experts-2"):
        Experts(path, recipe(problem))


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
        before = objective.training.get_state()
        losses.append(prepared_match(objective, images, problem.labels).loss)
        assert torch.equal(objective.training.get_state(), before) is not bool(ordered)
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
    for other in (dataclasses.replace(problem, trajectory=None), with_options(problem, **{missing: None})):
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
