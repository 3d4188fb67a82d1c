"""The evaluation, and its command line."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import BARE, npz, parse
from conftest import close, pixels

from mim4dd import augment, networks, run, stacked
from mim4dd.commands.config_json import to_json
from mim4dd.data import load
from mim4dd.evaluate import main
from mim4dd.evaluation import Protocol, Score, accuracy, evaluate, train
from mim4dd.networks import memory
from mim4dd.seeding import generator
from mim4dd.stacked import Stack
from mim4dd.synthetic import SyntheticSet, initialise


@pytest.fixture(scope="module")
def digits():
    return load("digits")


PROTOCOL = Protocol(epochs=30, augmentation="color_crop", width=16)


def test_score():
    score = Score((0.5, 0.7))
    assert score.mean == pytest.approx(0.6)
    assert score.std == pytest.approx(0.1 * 2**0.5)
    assert str(score) == "60.0 ± 14.1 %"
    assert Score((0.25,)).std is None
    assert str(Score((0.25,))) == "25.0 %"


def test_accuracy_counts_every_test_image_once(digits):
    """Against a plain loop, on a size that is no multiple of the chunk."""
    _, test = digits
    network = networks.create("convnet", 1, 10, (8, 8), width=8)
    networks.initialise(network, generator(0, "test"))
    right = 0
    with torch.no_grad():
        for i in range(len(test)):
            index = torch.tensor([i])
            right += int(network(test.batch(index)).argmax() == test.labels[i])
    assert accuracy(network, test) == right / len(test)


def test_no_more_test_images_go_through_at_once_than_memory_allows(monkeypatch, digits):
    network = networks.create("convnet", 1, 10, 8, width=4)
    networks.initialise(network, generator(0, "network"))
    expected, seen, forward = accuracy(network, digits[1]), [], network.forward
    monkeypatch.setattr(network, "forward", lambda x: seen.append(len(x)) or forward(x))
    each = memory.per_image(network, (1, 8, 8), gradients=False)
    for free, most in ((7 * each, 7), (0, 1), (10**9, networks.CHUNK["cpu"])):
        seen.clear()
        monkeypatch.setattr(memory, "budget", lambda *_, free=free: free)
        assert accuracy(network, digits[1]) == expected
        assert max(seen) == most
        assert sum(seen) == len(digits[1])


def test_training_learns_and_repeats(digits):
    real, test = digits
    start = initialise(real, 5, "real", generator(0, "init"))

    def score(seed):
        return evaluate(
            lambda _: (start.images, start.labels), test, PROTOCOL, num_networks=2, seed=seed
        ).accuracies

    first = score(0)
    assert first == score(0)
    assert first != score(1)
    assert first[0] != first[1], "every network starts anew"
    assert min(first) > 0.5


def test_training_set_may_change_with_the_network(digits):
    real, test = digits
    start = initialise(real, 1, "real", generator(0, "init"))
    seen = []

    def training_set(k):
        seen.append(k)
        return start.images, start.labels

    reported = []
    score = evaluate(
        training_set,
        test,
        dataclasses.replace(PROTOCOL, epochs=1),
        num_networks=3,
        seed=0,
        on_network=reported.append,
    )
    assert seen == [0, 1, 2]
    assert tuple(reported) == score.accuracies


@pytest.mark.parametrize("fused", [set(), {"cpu"}], ids=["on a CPU", "as on a GPU"])
def test_networks_are_trained_by_plain_sgd(digits, fused, monkeypatch):
    """Three epochs of 300 images in batches of 256: momentum, weight decay and augmentation by hand."""
    monkeypatch.setattr(stacked, "FUSED", fused)
    start = initialise(digits[0], 30, "real", generator(0, "init"))
    networks_ = [networks.create("convnet", 1, 10, (8, 8), width=8) for _ in range(2)]
    for network in networks_:
        networks.initialise(network, generator(0, "test"))
    trained, network = networks_
    protocol = Protocol(epochs=3, augmentation="color_crop")
    train(Stack.of(trained, generator(0, "t")), [(start.images, start.labels)], protocol)

    random, velocity = generator(0, "t"), [0.0 for _ in network.parameters()]
    for lr in (0.01, 0.01, 0.001):
        for index in torch.randperm(300, generator=random).split(256):
            params = augment.sample("color_crop", len(index), (8, 8), generator=random)
            logits = network(augment.apply(start.images[index], params))
            gradients = torch.autograd.grad(
                F.cross_entropy(logits, start.labels[index]), [*network.parameters()]
            )
            with torch.no_grad():
                for k, (weight, gradient) in enumerate(zip(network.parameters(), gradients, strict=True)):
                    velocity[k] = 0.9 * velocity[k] + gradient + 5e-4 * weight
                    weight -= lr * velocity[k]
    for ours, expected in zip(trained.parameters(), network.parameters(), strict=True):
        close(ours.detach(), expected.detach(), 1e-5)


def test_learning_rate_falls_to_a_tenth_after_half(monkeypatch, digits):
    real, _ = digits
    start = initialise(real, 1, "real", generator(0, "init"))
    network = networks.create("mlp", 1, 10, (8, 8))
    networks.initialise(network, generator(0, "test"))
    rates = []
    step = torch.optim.SGD.step

    def recording_step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        assert self.param_groups[0]["momentum"] == 0.9
        assert self.param_groups[0]["weight_decay"] == 5e-4
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", recording_step)
    train(
        Stack.of(network, generator(0, "t")),
        [(start.images, start.labels)],
        dataclasses.replace(PROTOCOL, epochs=10),
    )
    assert rates == pytest.approx([0.01] * 6 + [0.001] * 4)


def test_batches_cover_every_image_once_an_epoch(monkeypatch, digits):
    real, _ = digits
    start = initialise(real, 7, "real", generator(0, "init"))
    network = networks.create("mlp", 1, 10, (8, 8))
    networks.initialise(network, generator(0, "test"))
    sizes = []
    cross_entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        "torch.nn.functional.cross_entropy",
        lambda logits, labels: sizes.append(labels.bincount(minlength=10)) or cross_entropy(logits, labels),
    )
    protocol = dataclasses.replace(PROTOCOL, epochs=1, batch=32)
    train(Stack.of(network, generator(0, "t")), [(start.images, start.labels)], protocol)
    assert [int(s.sum()) for s in sizes] == [32, 32, 6]
    assert sum(sizes).tolist() == [7] * 10


def test_evaluate_scores_a_saved_set(finished, capsys):
    folder, _ = finished
    path = str(folder / "synthetic.safetensors")
    assert main([path, "--num-eval", "1", "--eval-archs", "convnet,mlp"]) == 0
    out = capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text())
    assert f"convnet │ {100 * result['accuracies'][0]:.1f}" in out, "the same seed gives the same accuracy"
    assert "mlp" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-eval", "0"], "--num-eval is 0, expected at least 1"),
        (["--num-eval", "9" * 20], "--num-eval is 99999999999999999999, expected at least 1 and below"),
        (["--out", "x" * 300], "File name too long"),
        (["--out", "~nobody-at-all/x"], "~nobody-at-all/x: there is no such user"),
        (["--data-dir", "~nobody-at-all"], "~nobody-at-all: there is no such user"),
        (["--eval-archs", "mpl"], "unknown architecture in --eval-archs: 'mpl', did you mean mlp"),
        (["--device", "toaster"], "--device toaster is not available here"),
    ],
)
def test_evaluate_refuses_bad_input(finished, capsys, arguments, message):
    folder, _ = finished
    assert main([str(folder / "synthetic.safetensors"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_evaluate_refuses_files_and_data_that_do_not_fit(finished, tmp_path, capsys):
    folder, _ = finished
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    assert main([str(tmp_path / "bad.safetensors")]) == 2
    assert "not a readable synthetic set" in capsys.readouterr().err
    assert main(["~nobody-at-all/out"]) == 2
    assert "there is no such user" in capsys.readouterr().err
    other = npz(tmp_path / "other.npz")
    assert main([str(folder / "synthetic.safetensors"), "--dataset", other]) == 2
    assert "give --dataset the data it was made from" in capsys.readouterr().err


@pytest.mark.parametrize(("classes", "size"), [(10, 9), (9, 8)])
def test_data_of_the_same_classes_or_the_same_size_alone_do_not_fit(
    finished, tmp_path, capsys, classes, size
):
    folder, _ = finished
    images, labels = pixels(40, size, size), np.arange(40) % classes
    other = npz(tmp_path / "other.npz", x_train=images, x_test=images, y_train=labels, y_test=labels)
    assert main([str(folder), "--dataset", other, "--num-eval", "1", "--eval-epochs", "1"]) == 2
    assert "give --dataset the data it was made from" in capsys.readouterr().err


def test_a_set_of_resized_images_is_tested_on_images_of_that_size(tmp_path):
    assert run.main([*BARE, "--image-size", "12", "--out", str(tmp_path / "out")]) == 0
    assert main([str(tmp_path / "out"), "--num-eval", "1", "--eval-epochs", "1"]) == 0


def test_a_saved_set_is_scored_by_its_own_settings_and_those_given(digits, tmp_path, monkeypatch):
    """Its learning rate, its normalisation; and what the run said, unless the command line says other."""
    calls, loads = [], []

    def recorded(training_set, test, protocol, **options):
        calls.append((*training_set(0), test, protocol, options))
        return Score((0.5,))

    monkeypatch.setattr("mim4dd.evaluate.evaluate", recorded)
    monkeypatch.setattr("mim4dd.evaluate.load", lambda *source: loads.append(source) or digits)
    monkeypatch.setattr("mim4dd.evaluate.resolve", lambda precision, _: f"picked for {precision}")
    settings = "--eval-epochs 12 --augmentation crop --width 9 --network mlp --seed 5 --data-dir there"
    own = {"mean": torch.tensor([0.25]), "std": torch.tensor([0.5]), "network_lr": 0.03}
    metadata = {"config": to_json(parse(settings.split()))}
    start = initialise(digits[0], 2, "real", generator(0, "init"), factor=2)
    saved = dataclasses.replace(start, **own, metadata=metadata)
    saved.save(tmp_path / "synthetic.safetensors")
    assert main([str(tmp_path), "--device", "cpu"]) == 0
    given = "--eval-epochs 7 --seed 4 --num-eval 2 --precision bf16 --data-dir here --eval-archs lenet"
    assert main([str(tmp_path), "--device", "cpu", *given.split()]) == 0

    assert loads == [("digits", Path("there"), None), ("digits", Path("here"), None)]
    assert main([str(tmp_path), "--device", "cpu", "--dataset", "elsewhere"]) == 0
    assert loads[2] == ("elsewhere", None, None), "the run's folder is that of another data set"
    calls.pop()
    for images, labels, test, *_ in calls:
        assert torch.equal(images, saved.decoded)
        assert torch.equal(labels, torch.arange(10).repeat_interleave(8))
        assert torch.equal(test.images, digits[1].images)
        assert (test.mean.item(), test.std.item()) == (0.25, 0.5)
    (*_, by_run, options), (*_, by_hand, others) = calls
    assert (by_run.epochs, by_run.architecture, by_run.precision) == (12, "mlp", "picked for auto")
    assert (by_hand.epochs, by_hand.architecture, by_hand.precision) == (7, "lenet", "picked for bf16")
    for protocol in (by_run, by_hand):
        assert (protocol.lr, protocol.augmentation, protocol.width) == (0.03, "crop", 9)
    assert [(o["seed"], o["num_networks"]) for o in (options, others)] == [(0, 5), (4, 2)]


def test_scores_go_into_a_file_too(finished, tmp_path, capsys):
    folder, _ = finished
    out = tmp_path / "scores.json"
    arguments = [str(folder), "--num-eval", "2", "--eval-epochs", "1", "--eval-archs", "mlp,lenet"]
    assert main([*arguments, "--out", str(out)]) == 0
    scores, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert [*scores] == ["mlp", "lenet"]
    for score in scores.values():
        assert score["num_networks"] == len(score["accuracies"]) == 2
        assert str(Score(tuple(score["accuracies"]))) in printed
    assert main([*arguments, "--out", str(tmp_path / "nowhere" / "scores.json")]) == 2
    assert main([*arguments, "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert f"nowhere/scores.json: there is no folder {tmp_path / 'nowhere'}" in printed.err
    assert f"--out {out} exists already" in printed.err
    assert printed.out == "", "before any work"


def test_a_set_that_was_cut_off_before_its_soft_labels_says_so(digits, tmp_path, capsys):
    start = initialise(digits[0], 1, "real", generator(0, "init"))
    metadata = {"config": to_json(parse(["--quick", "--soft-labels"]))}
    dataclasses.replace(start, metadata=metadata).save(tmp_path / "synthetic.safetensors")
    assert main([str(tmp_path), "--num-eval", "1", "--eval-epochs", "1"]) == 0
    assert "was interrupted before its soft labels were made" in capsys.readouterr().err


def test_a_run_is_found_by_its_folder_and_a_set_without_settings_refused(finished, tmp_path, capsys):
    folder, _ = finished
    assert main([str(folder), "--num-eval", "1", "--eval-epochs", "1"]) == 0
    bare = dataclasses.replace(SyntheticSet.load(folder / "synthetic.safetensors"), metadata={})
    bare.save(tmp_path / "bare.safetensors")
    assert main([str(tmp_path / "bare.safetensors")]) == 2
    assert "holds no settings to evaluate with" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "synthetic.safetensors: no such file" in capsys.readouterr().err


def test_the_data_of_a_run_may_move_but_not_change(tmp_path, monkeypatch, capsys):
    for name in ("there", "elsewhere"):
        (tmp_path / name).mkdir()
    path, brief = tmp_path / "there" / "data.npz", ["--num-eval", "1", "--eval-epochs", "1"]
    npz(path)
    monkeypatch.chdir(tmp_path / "there")
    assert run.main([*BARE, "--dataset", "data.npz", "--out", "out"]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["../there/out", *brief]) == 2
    told = (
        "no such file or folder; check the path; if it moved, or the run was started in another folder, name"
    )
    assert told in capsys.readouterr().err
    assert main(["../there/out", *brief, "--dataset", "../there/data.npz"]) == 0
    monkeypatch.chdir(tmp_path / "there")
    assert main(["out", *brief]) == 0
    npz(path, x_train=np.full((40, 12, 12, 3), 7, np.uint8))
    assert main(["out", *brief]) == 2
    assert "data.npz has other images now than when out/synthetic" in capsys.readouterr().err
    assert main(["out", *brief, "--dataset", "data.npz"]) == 0, "whoever names the data means them"
