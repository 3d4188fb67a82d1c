import math

import pytest
import torch

from mim4dd.objectives import mutual_information_estimate


def coded(labels, noise=0.0, width=16, generator=None):
    """Rows that are their label as a unit vector, and noise."""
    return torch.eye(width)[labels] + noise * torch.randn(len(labels), width, generator=generator)


LABELS = torch.arange(40) % 8
REAL_LABELS = torch.arange(800) % 8


def test_unrelated_features_tell_nothing(generator):
    synthetic, real = (torch.randn(n, 16, generator=generator) for n in (40, 800))
    estimate = mutual_information_estimate(synthetic, real, LABELS, REAL_LABELS)
    assert -0.05 < estimate < 0.02


def test_features_that_are_their_label_tell_all_of_it():
    estimate = mutual_information_estimate(coded(LABELS), coded(REAL_LABELS), LABELS, REAL_LABELS)
    assert math.log(8) - 0.01 < estimate <= math.log(8) + 1e-9


def test_more_noise_tells_less(generator):
    estimates = [
        mutual_information_estimate(
            coded(LABELS), coded(REAL_LABELS, noise, generator=generator), LABELS, REAL_LABELS
        )
        for noise in (0.0, 0.2, 0.5, 2.0)
    ]
    assert estimates == sorted(estimates, reverse=True)
    assert estimates[0] - estimates[-1] > 1


def test_a_known_information_is_not_exceeded_and_nearly_reached(generator):
    """Real rows carry the label rightly with probability p, else any: a symmetric channel."""
    p, n = 0.7, 8
    labels = torch.arange(20_000) % n
    seen = torch.where(
        torch.rand(len(labels), generator=generator) < p,
        labels,
        torch.randint(n, (len(labels),), generator=generator),
    )
    right = p + (1 - p) / n
    wrong = (1 - p) / n
    information = math.log(n) + right * math.log(right) + (n - 1) * wrong * math.log(wrong)
    estimate = mutual_information_estimate(coded(torch.arange(n)), coded(seen), torch.arange(n), labels)
    assert information - 0.1 < estimate < information + 0.02


@pytest.mark.parametrize("seed", range(8))
def test_never_more_than_the_entropy_of_the_labels(seed):
    """Whatever the features and however uneven the labels, even on the rows it was chosen on."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (30,), generator=g)
    real_labels = torch.cat([torch.arange(5).repeat(2), torch.randint(5, (50,), generator=g) ** 2 // 4])
    shares = labels.bincount() / len(labels)
    entropy = -(shares * shares.clamp_min(1e-9).log()).sum().item()
    for scale in (0.0, 0.3, 3.0):
        estimate = mutual_information_estimate(
            coded(labels, scale, generator=g), coded(real_labels, scale, generator=g), labels, real_labels
        )
        assert estimate <= entropy + 1e-6


def test_is_the_formula(generator, monkeypatch):
    """Against a loop over pairs with exact probabilities, at one number of negatives.

    Of two temperatures each half prefers another: what counts is the one that the other half prefers.
    """
    from mim4dd.objectives import estimate

    monkeypatch.setattr(estimate, "TEMPERATURES", [2.0, 8.0])
    monkeypatch.setattr(estimate, "NEGATIVES", [3.0])
    labels, real_labels = torch.tensor([0, 0, 1, 4]), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    generator.manual_seed(4)  # one where they do
    synthetic, real = (coded(of, 0.3, 5, generator).double() for of in (labels, real_labels))
    halves = [[0, 2, 4, 6], [1, 3, 5, 7]]  # every other row of a label

    def pairs(half):
        """(cosine, probability as a positive, probability as a negative); label 4 has no real row."""
        rows = []
        for i in range(3):
            mates = [[j for j in half if real_labels[j] == labels[k]] for k in range(3)]
            for j in half:
                cosine = torch.cosine_similarity(synthetic[i], real[j], 0).item()
                drawn = [(j in mates[k]) / len(mates[k]) / 3 for k in range(3)]
                rows.append((cosine, drawn[i], sum(drawn) / 3))
        return rows

    def bound(chosen_on, measured_on, temperature):
        ratio = 3 * sum(q * math.exp(c / temperature) for c, _, q in pairs(chosen_on))
        total = 4 * math.log(4) - 3 * math.log(3)
        for c, p, q in pairs(measured_on):
            h = math.exp(c / temperature) / (math.exp(c / temperature) + ratio)
            total += p * math.log(h) + 3 * q * math.log(1 - h)
        return total

    best = [max((0.2, 0.8), key=lambda t: bound(half, half, t)) for half in halves]
    assert best[0] != best[1]
    bounds = [bound(halves[0], halves[1], best[0]), bound(halves[1], halves[0], best[1])]
    actual = mutual_information_estimate(synthetic, real, labels, real_labels)
    assert actual == pytest.approx(sum(bounds) / 2)


def test_maps_and_scales_do_not_matter(generator):
    labels, real_labels = torch.arange(8), torch.arange(80) % 8
    synthetic = coded(labels, 0.5, generator=generator)
    real = coded(real_labels, 0.5, generator=generator)
    expected = mutual_information_estimate(synthetic, real, labels, real_labels)
    as_maps = synthetic.view(8, 4, 2, 2) * 7, real.view(80, 4, 2, 2)
    assert mutual_information_estimate(*as_maps, labels, real_labels) == pytest.approx(expected, abs=1e-5)


def test_too_few_rows_give_no_estimate():
    rows, labels = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    assert mutual_information_estimate(rows, rows, labels, labels) is None
    assert mutual_information_estimate(rows, rows[:0], labels, labels[:0]) is None
    assert mutual_information_estimate(rows, rows.repeat(2, 1), labels, labels.repeat(2)) is not None


def test_names_bad_input():
    rows, labels = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"real_labels is \[2\], expected \[3\]"):
        mutual_information_estimate(rows, rows, labels, labels[:2])
    with pytest.raises(ValueError, match=r"synthetic_features is \[3, 4\] and real_features is \[3, 3\]"):
        mutual_information_estimate(rows, rows[:, 1:], labels, labels)
    with pytest.raises(ValueError, match="temperature is 0"):
        mutual_information_estimate(rows, rows, labels, labels, temperature=0)
