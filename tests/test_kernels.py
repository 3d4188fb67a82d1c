"""The fused kernels against the plain formula in float64; without a GPU in Triton's interpreter."""

import time
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import mim4dd
from mim4dd.losses import reference
from mim4dd.losses.form import LossForm

pytest.importorskip("triton")

import pairs
from conftest import FORMS
from mim4dd.kernels import launch, narrow, skinny
from pairs import DEVICE, ONE_OF_EACH, agree, check, problem

from mim4dd import kernels

path = pairs.path  # a fixture: were it imported by name, each of its uses would count as a redefinition


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Uninitialised memory is NaN: a value that is read without having been written shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    @torch.no_grad()  # torch's own checkpoints make leaves this way
    def poison(value):
        return value.fill_(float("nan")) if value.is_floating_point() else value.fill_(-(1 << 20))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 70, 40), (70, 5, 16), (67, 130, 33)], ids=str)
def test_loss_and_gradients(path, form, sizes):
    m, n, width = sizes
    check(form, *problem(m, n, [width]))


@pytest.mark.parametrize("temperature", [0.01, 0.3])
@pytest.mark.parametrize("rows", [1, 65])
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
    for form in ONE_OF_EACH:
        check(form, *problem(70, 45, [width], dtype))


def test_parts_of_the_other_side_are_made_where_rows_are_few():
    assert narrow._steps(tiles=300, steps=300, slots=264) < 300  # else a second wave is mostly idle
    assert narrow._steps(tiles=2640, steps=300, slots=264) == 300
    assert narrow._steps(tiles=1, steps=1000, slots=264) == 4
    assert narrow._steps(tiles=1, steps=1, slots=264) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ONE_OF_EACH, ids=str)
def test_half_precision(path, form, dtype):
    check(form, *problem(20, 75, [48], dtype))


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
    check(form, *problem(600, 130, [16]))
    check(replace(form, exclude_self=True), *problem(150, 150, [16]))


def test_more_tiles_and_rows_than_are_added_up_at_once(monkeypatch):
    monkeypatch.setattr(skinny, "PAIRS_TILE", (4, 64))
    check(LossForm("info_nce"), *problem(1040, 5, [16]))


def test_float16_holds_the_gradients_of_very_unequal_sides(path):
    """A key of four weighs 250 times as much as an anchor of a thousand."""
    check(LossForm("nce", symmetric=True), *problem(1000, 4, [16], torch.float16))


def test_the_length_of_a_row_does_not_matter(path):
    scales, *labels, (a,), (k,) = problem(9, 33, [16])
    check(FORMS[0], scales, *labels, [a * 1e-10], [k * 1e10])


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


# ----------------------------------------------------------------------------- through the public functions


def arguments(dtype=torch.float32):
    _, anchor_labels, key_labels, (a,), (k,) = problem(6, 20, [24], dtype)
    return a.requires_grad_(), k.requires_grad_(), anchor_labels, key_labels


def test_public_functions_agree_on_both_backends():
    a, k, la, lk = arguments()
    temperature = torch.tensor(0.2, device=DEVICE, requires_grad=True)
    noise_ratio = torch.tensor(1.5, device=DEVICE, requires_grad=True)
    results = []
    for backend in ("fused", "reference"):
        nce = mim4dd.nce_loss(
            a, k, la, lk, temperature=temperature, noise_ratio=noise_ratio, symmetric=True, backend=backend
        )
        info = mim4dd.info_nce_loss(a, k, la, lk, temperature=temperature, backend=backend)
        pairs = mim4dd.info_nce_loss(a, k[:6], backend=backend)
        some = mim4dd.info_nce_loss(
            a, k, la, lk, temperature=temperature, positives="any", symmetric=True, backend=backend
        )
        total = nce * 2 + info + pairs + some
        results.append([total, *torch.autograd.grad(total, (a, k, temperature, noise_ratio))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_non_contiguous_features_and_labels():
    a, k, la, lk = arguments()
    expected = mim4dd.nce_loss(a, k, la, lk, backend="fused")
    wide = torch.stack([k, -k], 2)[..., 0]
    labels = torch.stack([lk, lk], 1)[:, 0]
    assert not wide.is_contiguous()
    torch.testing.assert_close(
        mim4dd.nce_loss(a.T.contiguous().T, wide, la, labels, backend="fused"), expected
    )


def test_second_derivative_through_the_formula():
    a, k, la, lk = arguments()
    results = []
    for backend in ("fused", "reference"):
        loss = mim4dd.nce_loss(a, k, la, lk, backend=backend)
        (gradient,) = torch.autograd.grad(loss, a, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), (a, k)))
    torch.testing.assert_close(*results)


def test_op_passes_opcheck_and_compiles(monkeypatch):
    a, k, la, lk = arguments()
    scales = torch.tensor([[0.3], [2.0]], device=DEVICE, requires_grad=True)
    op = torch.ops.mim4dd.contrastive.default
    options = ("nce", 3.0, True, False, "fused", [True, True, True])
    result = torch.library.opcheck(op, (scales, la, lk, [a, k], *options))
    assert set(result.values()) == {"SUCCESS"}

    def loss(a, k, la, lk):
        return mim4dd.nce_loss(a * 2, k, la, lk, backend="fused")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(a, k, la, lk), (a, k)) for f in (compiled, loss))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [[True] * 3, [False, True, False], [False] * 3], ids=str)
def test_fake_tensors_have_the_shapes_of_real_ones(path, dtype, wanted):
    scales, la, lk, anchors, keys = problem(6, 20, [24], dtype)
    call = (scales, la, lk, [*anchors, *keys], "nce", None, True, False, "fused", wanted)
    real = torch.ops.mim4dd.contrastive(*call)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.ops.mim4dd.contrastive(*call)
    assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]


def test_autocast_and_checkpointing(path):
    a, k, la, lk = arguments()

    def loss(a, k):
        return mim4dd.nce_loss(a * 2, k, la, lk, symmetric=True, backend="fused")

    expected = [loss(a, k), *torch.autograd.grad(loss(a, k), (a, k))]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        value = loss(a, k)
        actual = [value, *torch.autograd.grad(value, (a, k))]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for reentrant in (False, True):
        a.grad = k.grad = None
        value = checkpoint(loss, a, k, use_reentrant=reentrant)
        value.backward()
        torch.testing.assert_close([value, a.grad, k.grad], expected, rtol=0, atol=0)


def test_data_parallel(path, tmp_path):
    # One process: what is tested is that the hooks of the reducer meet the kernels' gradients.
    init = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=init, rank=0, world_size=1)
    try:
        a, k, la, lk = arguments()
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(24, 24).to(DEVICE))
        mim4dd.nce_loss(model(a.detach()), k.detach(), la, lk, backend="fused").backward()
        actual = model.module.weight.grad.clone()
        model.module.zero_grad()
        mim4dd.nce_loss(model.module(a.detach()), k.detach(), la, lk, backend="reference").backward()
        torch.testing.assert_close(actual, model.module.weight.grad, rtol=1e-4, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()
        # The group is freed with `model`, and waits, holding the GIL, for gloo's threads, which may need it
        # to free their last work: let them have it first.
        time.sleep(0.2)


def test_functional_gradient():
    a, k, la, lk = (value.detach() for value in arguments())
    leaf = a.clone().requires_grad_()
    (expected,) = torch.autograd.grad(mim4dd.nce_loss(leaf, k, la, lk, backend="fused"), leaf)
    actual = torch.func.grad(lambda x: mim4dd.nce_loss(x, k, la, lk, backend="fused"))(a)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_float64_has_no_kernel():
    a, k, la, lk = arguments()
    with pytest.raises(RuntimeError, match="the kernels have no torch.float64"):
        mim4dd.nce_loss(a.double(), k.double(), la, lk, backend="fused")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_sizes_of_use_on_a_gpu(form, dtype):
    for m, n, width in ((100, 2560, 2048), (4096, 4096, 512), (9000, 8500, 96)):
        check(form, *problem(m, n, [width], dtype, classes=50))
