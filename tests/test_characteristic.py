import math

import pytest
import torch
from conftest import digits_problem, prepared_match

from mim4dd.objectives import CharacteristicMatching, characteristic_distance
from mim4dd.seeding import generator as seeded


def naive(real, synthetic, real_labels, synthetic_labels, frequencies, amplitude=0.5, phase=0.5):
    """One class, one frequency at a time, with complex numbers and angles."""
    real, synthetic = (x / x.norm(dim=1, keepdim=True) for x in (real, synthetic))
    total = 0
    for c in {*real_labels.tolist()} & {*synthetic_labels.tolist()}:
        values = []
        for t in frequencies:
            r, s = (
                torch.exp(1j * (x[labels == c] @ t)).mean()
                for x, labels in ((real, real_labels), (synthetic, synthetic_labels))
            )
            by_phase = 2 * r.abs() * s.abs() * (1 - torch.cos(r.angle() - s.angle()))
            values.append((amplitude * (r.abs() - s.abs()) ** 2 + phase * by_phase).sqrt())
        total = total + torch.stack(values).mean()
    return total


def drawn(generator, real_labels, synthetic_labels, width=6, frequencies=9):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    labels = torch.tensor(real_labels), torch.tensor(synthetic_labels)
    return (
        draw(len(real_labels), width),
        draw(len(synthetic_labels), width).requires_grad_(),
        *labels,
        draw(frequencies, width),
    )


@pytest.mark.parametrize(
    ("real_labels", "synthetic_labels"),
    [
        ([0, 0, 1, 1, 1, 2], [0, 1, 1, 2, 2]),
        ([0, 1, 2], [2, 0, 1]),  # one image a class, in another order
        ([0, 0, 1], [0, 2, 2]),  # class 1 has no synthetic image, class 2 no real one
        ([0], [0, 0]),
    ],
)
@pytest.mark.parametrize("weights", [{}, {"amplitude": 0.9, "phase": 0.1}])
def test_equals_the_formula(generator, real_labels, synthetic_labels, weights):
    inputs = drawn(generator, real_labels, synthetic_labels)
    distance, expected = characteristic_distance(*inputs, **weights), naive(*inputs, **weights)
    torch.testing.assert_close(distance, expected)
    by_distance, by_expected = (torch.autograd.grad(d, inputs[1])[0] for d in (distance, expected))
    torch.testing.assert_close(by_distance, by_expected)


def test_by_hand():
    """Two points of the unit circle at one frequency along the first axis."""
    real, synthetic = torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 0.1], [-3.0, 0.0]])
    labels, frequencies = torch.tensor([0]), torch.tensor([[math.pi / 2, 0.0]])
    # R = exp(i pi / 2) = i; S is of one image exp(0) = 1, of both (1 - i) / 2.
    one = characteristic_distance(real, synthetic[:1], labels, labels, frequencies)
    assert one.item() == pytest.approx(abs(1j - 1) / math.sqrt(2))
    two = characteristic_distance(real, synthetic, labels, torch.tensor([0, 0]), frequencies)
    assert two.item() == pytest.approx(abs(1j - (1 - 1j) / 2) / math.sqrt(2))
    only_length = characteristic_distance(
        real, synthetic, labels, torch.tensor([0, 0]), frequencies, amplitude=1, phase=0
    )
    assert only_length.item() == pytest.approx(1 - math.sqrt(0.5))


def test_equal_sides_are_at_rest(generator):
    """No distance and no gradient, rather than the infinite slope of a root; nor from rows of zeros."""
    rows = torch.randn(6, 5, generator=generator)
    rows[3] = 0
    labels, frequencies = torch.arange(6) % 2, torch.randn(50, 5, generator=generator)
    for weights in ({}, {"amplitude": 1.0, "phase": 0.0}, {"amplitude": 0.0, "phase": 1.0}):
        synthetic = rows.clone().requires_grad_()
        distance = characteristic_distance(rows, synthetic, labels, labels, frequencies, **weights)
        (gradient,) = torch.autograd.grad(distance, synthetic)
        assert distance < 2e-3
        assert gradient.isfinite().all()
    empty = torch.zeros(0, 5, requires_grad=True)
    distance = characteristic_distance(rows, empty, labels, labels[:0], frequencies)
    assert distance == 0
    assert torch.autograd.grad(distance, empty)[0].shape == (0, 5)


def test_tells_spread_from_location(generator):
    """Equal means are not enough: a class of one repeated image is far from a class of two."""
    a, b = torch.eye(4)[:2]
    real, labels = torch.stack([a, b]), torch.tensor([0, 0])
    frequencies = torch.randn(500, 4, generator=generator)
    mean = characteristic_distance(real, (a + b).repeat(2, 1), labels, labels, frequencies)
    swapped = characteristic_distance(real, torch.stack([b, a]), labels, labels, frequencies)
    assert mean > 0.1
    assert swapped < 1e-3


def test_gradcheck(generator):
    real, synthetic, *others = drawn(generator, [0, 1, 1, 0, 2], [1, 0, 2, 1])
    assert torch.autograd.gradcheck(lambda s: characteristic_distance(real, s, *others), synthetic)


def test_maps_are_flattened_and_other_dtypes_kept(generator):
    real, synthetic, *others, frequencies = drawn(generator, [0, 1, 1], [0, 1], width=8)
    flat = characteristic_distance(real, synthetic, *others, frequencies, num_classes=4)
    maps = characteristic_distance(
        real.view(3, 2, 2, 2), synthetic.view(2, 2, 2, 2), *others, frequencies, num_classes=2
    )
    torch.testing.assert_close(maps, flat)
    single = characteristic_distance(real.float(), synthetic.float(), *others, frequencies.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), flat, rtol=1e-5, atol=0)


def test_names_bad_input():
    rows, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"width 3, synthetic_features 4 and frequencies is \[5, 3\]"):
        characteristic_distance(rows, torch.zeros(2, 4), labels, labels, torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"frequencies is \[3\]; expected one width"):
        characteristic_distance(rows, rows, labels, labels, torch.zeros(3))
    with pytest.raises(ValueError, match=r"synthetic_labels is \[1\], expected \[2\]"):
        characteristic_distance(rows, rows, labels, labels[:1], torch.zeros(5, 3))


def test_the_loss_is_the_distance_at_new_frequencies_every_time():
    problem, start = digits_problem(ipc=2)
    objective, random = CharacteristicMatching(problem), seeded(0, "ncfm/frequencies")
    for _ in range(2):
        matched = prepared_match(objective, start.images, problem.labels)
        real, synthetic = matched.real_features[-1], matched.synthetic_features[-1]
        frequencies = torch.randn(1024, real[0].numel(), generator=random)
        labels = matched.real_labels, matched.synthetic_labels
        torch.testing.assert_close(
            matched.loss, 300 * characteristic_distance(real, synthetic, *labels, frequencies)
        )


def test_matching_brings_the_distance_down():
    """On one network and one set of frequencies, descent on the objective's own gradient lowers its loss."""
    problem, start = digits_problem(ipc=2)

    def loss(x):
        return prepared_match(CharacteristicMatching(problem), x, problem.labels).loss  # the same draws

    x = start.images.clone().requires_grad_()
    for _ in range(10):
        (gradient,) = torch.autograd.grad(loss(x), x)
        x = (x - 0.1 * gradient).detach().requires_grad_()
    assert loss(x) < 0.8 * loss(start.images)
