"""Comparison: paired differences, the table and the picture."""

import pytest

from mim4dd.studies import compare_report
from mim4dd.studies.compare_table import Arm, rows
from mim4dd.studies.paired import paired_difference


def test_one_seed_has_no_interval():
    difference = paired_difference({0: 0.5, 1: 0.7}, {1: 0.6, 2: 0.1})
    assert (difference.count, difference.interval, difference.clear) == (1, None, False)
    assert str(difference) == "+10.00"
    assert paired_difference({0: 0.5}, {1: 0.5}) is None


def test_an_interval_without_0_is_clear():
    assert paired_difference({0: 0.6, 1: 0.71, 2: 0.82}, {0: 0.5, 1: 0.6, 2: 0.7}).clear
    assert not paired_difference({0: 0.6, 1: 0.6, 2: 0.9}, {0: 0.5, 1: 0.6, 2: 0.7}).clear
    assert not paired_difference({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6}).clear, "no difference at all"


def test_picture_shows_every_mean_at_its_place():
    arms = [Arm("random", None, 1), Arm("dm", 0.0, 1), Arm("dm", 10.0, 1), Arm("dm", 0.0, 10)]
    outcomes = {
        (a, s): {"accuracy_mean": 0.1 * (k + 1) + 0.01 * s} for k, a in enumerate(arms) for s in range(3)
    }
    outcomes[arms[2], 3] = {"failed": "it diverged"}
    left, right = compare_report.draw(rows(arms, outcomes)).axes
    means = [container.lines[0].get_xdata()[0] for container in left.containers]
    assert means == pytest.approx([11, 21, 31, 41])
    assert [tick.get_text() for tick in left.get_yticklabels()] == [str(arm) for arm in arms]
    (difference,) = right.containers
    assert difference.lines[0].get_xdata()[0] == pytest.approx(10)
    headings = [text.get_text() for text in left.texts]
    assert headings == ["1 per class", "10 per class"]


def test_the_table_says_of_how_many_pairs_a_difference_is():
    accuracies = {0: [0.5, 0.6, 0.5], 10: [0.6, 0.8, 0.7, 0.9]}
    outcomes = {
        (Arm("dm", float(weight), 1), seed): {"accuracy_mean": accuracy}
        for weight, scores in accuracies.items()
        for seed, accuracy in enumerate(scores)
    }
    arms = [Arm("dm", 0.0, 1), Arm("dm", 10.0, 1)]
    assert rows(arms, outcomes)[1].cells()[-1].endswith("] (3 of the seeds)")
    del outcomes[arms[1], 3]
    assert rows(arms, outcomes)[1].cells()[-1].endswith("]")


def written(folder, *networks, validation=0.0):
    """The table of one arm, with a seed for each of these numbers of networks."""
    arm = Arm("dm", 0.0, 1)
    settings = {"data": {"dataset": "digits", "validation": validation}, "eval": {"eval_archs": []}}
    outcomes = {(arm, k): {"accuracy_mean": 0.5, "num_networks": n} for k, n in enumerate(networks)}
    compare_report.write(folder, [arm], outcomes, len(outcomes), settings)
    return (folder / "compare.md").read_text()


@pytest.mark.parametrize(("validation", "split"), [(0.0, "test"), (0.2, "validation")])
def test_the_table_says_which_images_accuracies_are_of(tmp_path, validation, split):
    text = written(tmp_path, 5, validation=validation)
    assert f"Accuracy on the {split} set: mean" in text
    assert ("Each seed holds out a validation split" in text) == (split == "validation")


@pytest.mark.parametrize(
    ("counts", "text"), [([1], "1 network"), ([5], "5 networks"), ([1, 5], "1 or 5 networks")]
)
def test_the_table_says_how_many_networks_a_mean_is_of(tmp_path, counts, text):
    assert f"over the seeds, each the mean of {text}\n" in written(tmp_path, *counts)
