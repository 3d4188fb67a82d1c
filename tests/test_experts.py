"""The experts of trajectory matching: how they are trained, kept and found again."""

import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
import trajectories
from conftest import close
from trajectories import weights, with_options

from mim4dd import augment, networks, stacked
from mim4dd.errors import InputError
from mim4dd.networks.flat import flatten
from mim4dd.objectives import experts, train_experts
from mim4dd.objectives.experts import Experts
from mim4dd.objectives.trajectory import recipe
from mim4dd.seeding import generator

problem = trajectories.problem  # a fixture


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
    monkeypatch.setitem(stacked.LARGEST_STACK, "cpu", 2)
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
    with pytest.raises(InputError, match="has another width: 8, but this run has 4; name another file"):
        train_experts(dataclasses.replace(named, width=4))
    with pytest.raises(InputError, match="has another data"):
        train_experts(
            dataclasses.replace(
                named, real=dataclasses.replace(problem.real, labels=problem.real.labels.flip(0))
            )
        )
    with pytest.raises(InputError, match="has another architecture: convnet"):
        train_experts(dataclasses.replace(named, architecture="mlp"))
    longer = with_options(named, max_start=4, expert_snapshots=9)
    with pytest.raises(InputError, match="holds 3 snapshots, but --max-start 4 with --span 2 needs 5"):
        train_experts(longer)
    with pytest.raises(InputError, match="--expert-snapshots is 3, but --max-start 3 with --span 2 needs 4"):
        train_experts(with_options(problem, max_start=3, expert_seed=5))
    shorter = with_options(named, max_start=2, expert_snapshots=1)
    assert list(train_experts(shorter)) == [], "what the file holds is what counts"
    labels = torch.zeros_like(problem.real.labels)
    one_class = dataclasses.replace(problem.real, class_names=("all",), labels=labels)
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
    with pytest.raises(InputError, match="has another format: mim4dd-experts-2"):
        Experts(path, recipe(problem))
