"""The fused kernels against the plain formula in float64; without a GPU in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

from mim4dd.losses import reference
from mim4dd.losses.form import LossForm

pytest.importorskip("triton")

import numerics
import pairs
from conftest import FORMS, close
from mim4dd.kernels import launch, narrow, skinny
from pairs import DEVICE, ONE_OF_EACH, agree, check, problem

from mim4dd import kernels

path, poisoned = pairs.path, numerics.poisoned  # fixtures


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (70, 5, 16), (67, 130, 33)], ids=str)
def test_loss_and_gradients(path, form, sizes):
    m, n, width = sizes
    check(form, *problem(m, n, [width]))


@pytest.mark.parametrize(("rows", "temperature"), [(1, 0.01), (1, 0.3), (9, 0.01), (65, 0.3)])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_pairs_with_itself_left_out(path, form, rows, temperature):
    scales, *rest = problem(rows, rows, [24])
    scales[0] = temperature
    check(replace(form, exclude_self=True), scales, *rest)


@pytest.mark.parametrize("name", ["info_nce", "info_nce_any"])
def test_an_anchor_with_no_positive_but_itself_does_not_count(path, name):
    scales, _, _, (a,), (k,) = problem(6, 6, [16])
    labels = torch.tensor([0, 0, 1, 2, 2, 3], device=DEVICE)  # the third and the last are alone
    cosine = torch.cosine_similarity(a[:, None].double(), k.double(), dim=2)
    p = (cosine / scales[0]).fill_diagonal_(-torch.inf).softmax(1)
    expected = -(p[0, 1] * p[1, 0] * p[3, 4] * p[4, 3]).log() / 4
    form = LossForm(name, exclude_self=True)
    losses = kernels.contrast(form, scales, labels, labels, [a], [k], (False,) * 3)[0]
    agree(losses[0], expected, 2e-5)


@pytest.mark.parametrize("path", ["narrow"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [3, 16, 31, 64, 100, 128])
def test_every_width_of_the_narrow_path(path, dtype, width):
    check(ONE_OF_EACH[0], *problem(70, 45, [width], dtype))


def test_parts_of_the_other_side_are_made_where_rows_are_few():
    assert narrow._steps(tiles=300, steps=300, slots=264) < 300  # else a second wave is mostly idle
    assert narrow._steps(tiles=2640, steps=300, slots=264) == 300
    assert narrow._steps(tiles=2048, steps=2048, slots=264) == 2048  # not 7 gradients for 2 % of the time
    assert narrow._steps(tiles=1, steps=1000, slots=264) == 4
    assert narrow._steps(tiles=1, steps=1, slots=264) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ONE_OF_EACH, ids=str)
def test_half_precision(path, form, dtype):
    check(form, *problem(20, 75, [48], dtype))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ONE_OF_EACH, ids=str)
def test_the_default_dtype_changes_nothing(path, form, default):
    arguments = (form, *problem(6, 9, [16]), (True,) * 3)
    expected = kernels.contrast(*arguments)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        actual = kernels.contrast(*arguments)
    finally:
        torch.set_default_dtype(before)
    for ours, wish in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, wish)


@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
def test_labels_of_any_value(path, label_dtype):
    scales, anchor_labels, key_labels, *features = problem(9, 33, [16], label_dtype=label_dtype)
    far = 1 << (40 if label_dtype == torch.int64 else 30)
    check(FORMS[1], scales, anchor_labels * far - far, key_labels * far - far, *features)


def test_layers_share_their_launches():
    for form in ONE_OF_EACH:
        check(form, *problem(7, 40, [100, 16, 33]))


@pytest.mark.parametrize(
    "wanted", [(False, True, False), (False, False, True), (True, False, False), (False,) * 3]
)
def test_only_what_is_wanted_is_made(path, wanted):
    for form in (FORMS[0], *ONE_OF_EACH[1:]):
        check(form, *problem(9, 33, [16]), wanted)


def test_features_split_over_programs(monkeypatch):
    monkeypatch.setattr(launch, "device_limits", lambda device: (101_376, 32))
    check(FORMS[0], *problem(5, 20, [700, 300]))


def test_without_positives_without_negatives_and_zero_rows(path):
    scales, anchor_labels, key_labels, (a,), (k,) = problem(6, 9, [16])
    a[1], k[2] = 0, 0
    for form in FORMS:
        for others in (torch.full_like(key_labels, 7), torch.zeros_like(key_labels), key_labels):
            check(form, scales, torch.zeros_like(anchor_labels), others, [a], [k])
    for form in FORMS[2:]:
        nothing = kernels.contrast(form, scales, anchor_labels, key_labels + 7, [a], [k], (True,) * 3)
        assert not any(value.any() for value in nothing)
    _, _, grad_a, grad_k = kernels.contrast(
        FORMS[0], scales, anchor_labels, key_labels, [a], [k], (True, True, True)
    )
    assert not grad_a[1].any()
    assert not grad_k[2].any()


@pytest.mark.parametrize("temperature", [0.01, 0.03, 10.0])
def test_no_temperature_overflows(path, temperature):
    scales, *rest = problem(6, 9, [16])
    for form in FORMS:
        check(form, torch.full_like(scales, temperature), *rest)


def two_classes(sign):
    """Keys that lie where the anchors of their class do, or (-1) where those of the other class do."""
    scales, anchor_labels, key_labels, (a,), (k,) = problem(40, 70, [16], classes=2)
    centre = 2 * torch.randn(16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    places = [(1.0 - 2 * labels)[:, None] * centre for labels in (anchor_labels, key_labels)]
    return scales, anchor_labels, key_labels, [places[0] + 0.3 * a], [sign * places[1] + 0.3 * k]


@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sign", [-1, 1])
def test_any_positive_far_below_or_above_all_others(path, sign, symmetric, temperature):
    scales, *rest = two_classes(sign)
    check(LossForm("info_nce_any", symmetric=symmetric), torch.full_like(scales, temperature), *rest)


@pytest.mark.parametrize("symmetric", [False, True])
def test_any_positive_keeps_the_gradient_of_solved_rows(path, symmetric):
    form = LossForm("info_nce_any", symmetric=symmetric)
    scales, *labels, (a,), (k,) = two_classes(1)
    scales[0] = 0.1
    _, _, *actual = kernels.contrast(form, scales, *labels, [a], [k], (True, True, True))
    leaves = [value.double().requires_grad_() for value in (a, k)]
    loss = reference.plain(form, scales[:, 0].double(), *labels, *leaves)
    assert loss < 1e-7
    for value, wish in zip(actual, torch.autograd.grad(loss, leaves), strict=True):
        agree(value / wish.abs().max(), wish / wish.abs().max(), 1e-4)


def test_float16_holds_gradients_of_few_positives_and_of_unlike_norms(path):
    # One anchor of 100 has a positive, so InfoNCE weighs it 100 times; norms are large and differ by 100.
    scales, anchor_labels, key_labels, (a,), (k,) = problem(100, 20, [16], torch.float16)
    anchor_labels = torch.arange(100, device=DEVICE)
    a *= 1000
    k *= 1000
    k[::7] *= 0.01
    for form in (*FORMS, LossForm("nce", negatives=500.0)):
        check(form, scales, anchor_labels, torch.zeros_like(key_labels), [a], [k])


@pytest.mark.parametrize("form", ONE_OF_EACH, ids=str)
def test_blocks_of_many_tiles(monkeypatch, form):
    """More rows of tiles than are gone through together, and several columns: `path` has a tile a block."""
    monkeypatch.setattr(kernels, "SKINNY_PAIRS", 0)
    monkeypatch.setattr(narrow, "WIDEST", 0)
    check(form, *problem(520, 70, [16]))
    check(replace(form, exclude_self=True), *problem(130, 130, [16]))


def test_more_tiles_and_rows_than_are_added_up_at_once(monkeypatch):
    monkeypatch.setattr(skinny, "PAIRS_TILE", (4, 64))
    check(LossForm("info_nce"), *problem(1040, 5, [16]))


def test_float16_holds_the_gradients_of_very_unequal_sides(path):
    """A key of four weighs 250 times as much as an anchor of a thousand."""
    check(LossForm("nce", symmetric=True), *problem(1000, 4, [16], torch.float16))


@pytest.mark.parametrize("lengths", [(1e-19, 1e17), (1e17, 1e-19)], ids=str)
@pytest.mark.parametrize("form", ONE_OF_EACH, ids=str)
def test_the_length_of_a_row_does_not_matter(path, form, lengths):
    """Not even where its square, divided by the temperature, leaves the range of float32."""
    scales, *labels, (a,), (k,) = problem(9, 33, [16])
    scales[0] = 0.01
    expected = kernels.contrast(form, scales, *labels, [a], [k], (True,) * 3)
    found = kernels.contrast(form, scales, *labels, [a * lengths[0]], [k * lengths[1]], (True,) * 3)
    for value, wish, length in zip(found, expected, (1.0, 1.0, *lengths), strict=True):
        close(value * length, wish, 2e-5)


def test_zero_features_in_float16(path):
    scales, *labels, (a,), (k,) = problem(6, 9, [16], torch.float16)
    for form in FORMS:
        losses, *gradients = kernels.contrast(form, scales, *labels, [a * 0], [k * 0], (True, True, True))
        assert losses.isfinite().all()
        assert all(not gradient.any() for gradient in gradients[1:])


def test_empty_sides_give_zero(path):
    for form in (FORMS[0], *ONE_OF_EACH):
        for m, n in ((0, 4), (4, 0)):
            losses, *gradients = kernels.contrast(form, *problem(m, n, [8]), (True, True, True))
            assert losses.tolist() == [0]
            assert not any(gradient.any() for gradient in gradients)


def test_runs_are_identical(path):
    arguments = problem(40, 70, [48])
    for form in (FORMS[3], FORMS[5]):
        first, second = (kernels.contrast(form, *arguments, (True, True, True)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_sizes_of_use_on_a_gpu(form, dtype):
    for m, n, width in ((100, 2560, 2048), (4096, 4096, 512), (9000, 8500, 96)):
        check(form, *problem(m, n, [width], dtype, classes=50))
