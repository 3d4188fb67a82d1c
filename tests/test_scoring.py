"""The distilled set and the baselines are scored as the settings say, and are what they are called."""

import dataclasses

import pytest
import torch
from commands import prepare

from mim4dd.commands import runner, scoring
from mim4dd.data import load
from mim4dd.data.clusters import image_for_each, kmeans_centres, members
from mim4dd.distill import DivergenceError
from mim4dd.evaluation import Score
from mim4dd.experiment import Experiment
from mim4dd.seeding import generator


@pytest.fixture
def evaluated(monkeypatch):
    """What evaluations are asked for, none of which take place."""
    calls = []

    def evaluate(training_set, test, protocol, **options):
        calls.append((training_set, test, protocol, options))
        return Score((0.5,))

    monkeypatch.setattr(scoring, "evaluate", evaluate)
    return calls


def test_scores_follow_the_settings(evaluated):
    options = "--network mlp --eval-epochs 11 --num-eval 4 --augmentation crop"
    prepared = prepare(options)
    reported = []
    scoring.score(prepared, prepared.start, reported.append)
    scoring.score(prepared, dataclasses.replace(prepared.start, network_lr=0.03), reported.append, "lenet")
    training_set, test, protocol, asked = evaluated[0]
    images, targets = training_set(0)
    assert torch.equal(images, prepared.start.images)
    assert torch.equal(targets, torch.arange(10))
    assert test is prepared.test
    assert (protocol.architecture, protocol.epochs, protocol.width) == ("mlp", 11, 8)
    assert (protocol.augmentation, protocol.lr, protocol.precision) == (
        "crop",
        0.01,
        prepared.config.precision,
    )
    assert asked == {"num_networks": 4, "seed": 3, "on_network": reported.append}
    other = evaluated[1][2]
    assert (other.architecture, other.lr, other.epochs) == ("lenet", 0.03, 11)


def test_every_network_is_trained_on_other_random_images(evaluated):
    prepared = prepare("--ipc 2 --num-eval 3")
    scoring.baseline(prepared, "random", print)
    ((training_set, _, _, asked),) = evaluated
    assert (asked["num_networks"], asked["seed"]) == (3, 3)
    drawn = [training_set(k) for k in range(3)]
    for k, (images, labels) in enumerate(drawn):
        assert torch.equal(labels, torch.arange(10).repeat_interleave(2))
        index = prepared.train.sample(2, generator(3, f"baseline/random/{k}")).flatten()
        assert torch.equal(images, prepared.train.batch(index))
    assert not any(torch.equal(drawn[a][0], drawn[b][0]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_the_kmeans_baseline_is_nearest_to_centres(evaluated):
    prepared = prepare("--ipc 2")
    scoring.baseline(prepared, "kmeans", print)
    images, labels = evaluated[0][0](0)
    real, _ = load("digits")
    index = image_for_each(kmeans_centres(real, 2, generator(3, "baseline/kmeans")), real, members(real))
    assert torch.equal(images, prepared.train.batch(index.flatten()))
    assert torch.equal(labels, torch.arange(10).repeat_interleave(2))


@pytest.mark.parametrize(("epochs", "cut"), [(400, 20), (40, 5)])
def test_the_full_data_take_fewer_epochs_and_one_network(monkeypatch, epochs, cut):
    trained, tested = [], []
    monkeypatch.setattr(scoring, "train_on_real", lambda *arguments: trained.append(arguments))
    monkeypatch.setattr(scoring, "accuracy", lambda _, images: tested.append(images) or 0.25)
    prepared = prepare(f"--eval-epochs {epochs} --num-eval 3")
    reported = []
    assert scoring.baseline(prepared, "full", reported.append).accuracies == (0.25,)
    assert reported == [0.25]
    ((_, real, protocol, random),), (test,) = trained, tested
    assert real is prepared.train
    assert test is prepared.test
    assert protocol.epochs == cut
    assert random.initial_seed() == generator(3, "evaluation/0").initial_seed()


def test_the_base_baseline_is_a_run_without_the_term(evaluated, monkeypatch):
    monkeypatch.setattr("mim4dd.objectives.term_networks.STUDENT_EPOCHS", (3, 3))

    def distilled(options=""):
        prepared = prepare("--iterations 3" + options)
        return prepared, prepared.distill(lambda _: None)

    prepared, ours = distilled(" --baselines base")
    runner.evaluations(prepared, ours)
    (base, _), (scored, _) = (call[0](0) for call in evaluated)
    assert torch.equal(base, distilled(" --mim-weight 0")[1].images)
    assert torch.equal(scored, ours.images)
    assert not torch.equal(base, ours.images)


def test_a_base_method_that_diverges_alone_is_left_out(monkeypatch, evaluated, capsys):
    prepared = prepare("--iterations 1 --num-eval 1 --baselines random base")

    def diverges(*_, with_mim):
        raise DivergenceError("the loss is nan")

    monkeypatch.setattr(Experiment, "distill", diverges)
    score, baselines = runner.evaluations(prepared, prepared.start)
    assert score is not None
    assert [*baselines] == ["random"]
    assert "the base method alone is not evaluated: the loss is nan" in capsys.readouterr().err


def test_the_progress_counts_one_network_for_the_full_data(monkeypatch):
    totals = {}

    def counted(title, num_networks, score):
        totals[title] = num_networks
        return Score((0.5,))

    monkeypatch.setattr(runner, "with_accuracy", counted)
    prepared = prepare("--iterations 1 --num-eval 3 --baselines random full")
    runner.evaluations(prepared, prepared.start)
    assert totals == {"evaluate (random)": 3, "evaluate (full)": 1, "evaluate": 3}
