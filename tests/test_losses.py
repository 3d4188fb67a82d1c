import functools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import close, labelled_features
from hypothesis import given, settings
from hypothesis import strategies as st

import mim4dd
from mim4dd import backends


@pytest.mark.parametrize("case", ["small", "wide"])
@pytest.mark.parametrize("name", ["nce", "info_nce"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_golden_file(golden, case, name, dtype):
    file = {k.removeprefix(f"{case}."): v for k, v in golden("contrastive").items() if k.startswith(case)}
    anchors, keys = (file[side].to(dtype).requires_grad_() for side in ("anchors", "keys"))
    labels = file["anchor_labels"], file["key_labels"]
    temperature = file["temperature"].item()
    if name == "nce":
        expected = {key: file[key] for key in ("loss", "grad_anchors", "grad_keys")}
        loss = mim4dd.nce_loss(
            anchors, keys, *labels, temperature=temperature, noise_ratio=file["noise_ratio"].item()
        )
    else:
        expected = {key: file[f"info_nce.{key}"] for key in ("loss", "grad_anchors", "grad_keys")}
        loss = mim4dd.info_nce_loss(anchors, keys, *labels, temperature=temperature)
    gradients = torch.autograd.grad(loss, (anchors, keys))
    for actual, wanted in zip((loss, *gradients), expected.values(), strict=True):
        close(actual, wanted)


def nce_by_hand(anchors, keys, anchor_labels, key_labels, temperature, noise_ratio, negatives=None):
    """The formula, pair by pair."""
    total = 0.0
    for a, label in zip(anchors.double(), anchor_labels, strict=True):
        on = {True: [], False: []}
        for k, other in zip(keys.double(), key_labels, strict=True):
            norm = float(a.norm() * k.norm())
            critic = math.exp((float(a @ k) / norm if norm else 0.0) / temperature)
            same = bool(label == other)
            on[same].append(-math.log((critic if same else noise_ratio) / (critic + noise_ratio)))
        total += sum(on[True]) / max(len(on[True]), 1)
        nu = len(on[False]) if negatives is None else negatives
        total += nu * sum(on[False]) / max(len(on[False]), 1)
    return total / max(len(anchors), 1)


@given(
    m=st.integers(0, 6),
    n=st.integers(0, 7),
    d=st.integers(1, 9),
    classes=st.integers(1, 3),
    negatives=st.sampled_from([None, 3.0]),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_nce_equals_the_formula(m, n, d, classes, negatives, symmetric, seed):
    a, k, la, lk = labelled_features(m, n, d, classes, seed)
    loss = mim4dd.nce_loss(
        a, k, la, lk, temperature=0.3, noise_ratio=2.5, negatives=negatives, symmetric=symmetric
    )
    expected = nce_by_hand(a, k, la, lk, 0.3, 2.5, negatives)
    if symmetric:
        expected += nce_by_hand(k, a, lk, la, 0.3, 2.5, negatives)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(m=st.integers(1, 6), n=st.integers(1, 7), classes=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_info_nce_equals_the_formula(m, n, classes, seed):
    a, k, la, lk = labelled_features(m, n, 5, classes, seed)
    log_p = ((F.normalize(a) @ F.normalize(k).T) / 0.2).log_softmax(1)
    rows = [-log_p[i, lk == la[i]].mean() for i in range(m) if (lk == la[i]).any()]
    expected = torch.stack(rows).mean() if rows else torch.tensor(0.0, dtype=torch.float64)
    torch.testing.assert_close(mim4dd.info_nce_loss(a, k, la, lk, temperature=0.2), expected)


@given(m=st.integers(0, 6), n=st.integers(0, 7), classes=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_any_positive_is_the_probability_of_the_label(m, n, classes, seed):
    a, k, la, lk = labelled_features(m, n, 5, classes, seed)
    p = ((F.normalize(a) @ F.normalize(k).T) / 0.2).softmax(1)
    rows = [-p[i, lk == la[i]].sum().log() for i in range(m) if (lk == la[i]).any()]
    expected = torch.stack(rows).mean() if rows else torch.tensor(0.0, dtype=torch.float64)
    loss = mim4dd.info_nce_loss(a, k, la, lk, temperature=0.2, positives="any")
    torch.testing.assert_close(loss, expected)


def test_one_near_positive_is_enough_for_any():
    anchor, keys = torch.eye(3)[:1], torch.eye(3)
    labels = torch.tensor([0]), torch.tensor([0, 0, 1])
    each, some = (
        mim4dd.info_nce_loss(anchor, keys, *labels, temperature=0.05, positives=positives).item()
        for positives in ("each", "any")
    )
    assert some < 1e-6 < 9 < each


def test_without_labels_it_is_cross_entropy_on_the_diagonal():
    a, k, _, _ = labelled_features(8, 8, 6, 1)
    z = (F.normalize(a) @ F.normalize(k).T) / 0.1
    target = torch.arange(8)
    torch.testing.assert_close(mim4dd.info_nce_loss(a, k), F.cross_entropy(z, target))
    both = F.cross_entropy(z, target) + F.cross_entropy(z.T, target)
    torch.testing.assert_close(mim4dd.info_nce_loss(a, k, symmetric=True), both)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradcheck_of_features_temperature_and_noise_ratio(symmetric):
    a, k, la, lk = labelled_features(4, 5, 3, 2)
    t, r = (torch.tensor(value, dtype=torch.float64) for value in (0.5, 1.7))
    inputs = [value.requires_grad_() for value in (a, k, t, r)]

    def nce(a, k, t, r):
        return mim4dd.nce_loss(a, k, la, lk, temperature=t, noise_ratio=r, symmetric=symmetric)

    def info_nce(a, k, t):
        return mim4dd.info_nce_loss(a, k, la, lk, temperature=t, symmetric=symmetric)

    def any_positive(a, k, t):
        return mim4dd.info_nce_loss(a, k, la, lk, temperature=t, symmetric=symmetric, positives="any")

    assert torch.autograd.gradcheck(nce, inputs)
    assert torch.autograd.gradgradcheck(nce, inputs)

    def without_itself(a, t):
        return mim4dd.info_nce_loss(a, a, la, la, temperature=t, exclude_self=True, symmetric=symmetric)

    assert torch.autograd.gradcheck(info_nce, inputs[:3])
    assert torch.autograd.gradcheck(any_positive, inputs[:3])
    assert torch.autograd.gradcheck(without_itself, (a, t))
    assert torch.autograd.gradgradcheck(without_itself, (a, t))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_give_a_float32_loss(dtype):
    a, k, la, lk = labelled_features(6, 9, 16, 3, dtype=torch.float32)
    for loss in (mim4dd.nce_loss, mim4dd.info_nce_loss):
        leaf = a.to(dtype).requires_grad_()
        value = loss(leaf, k.to(dtype), la, lk)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(loss(a, k, la, lk).item(), rel=3e-2)
        assert torch.autograd.grad(value, leaf)[0].dtype == dtype


def test_pairs_with_itself_left_out_are_as_if_they_were_not_there():
    a, k, _, _ = labelled_features(6, 6, 5, 2)
    la = torch.arange(6) % 3
    kept = ~torch.eye(6, dtype=torch.bool)
    rows = [(a[i : i + 1], k[kept[i]], la[i : i + 1], la[kept[i]]) for i in range(6)]
    for loss, options in (
        (mim4dd.nce_loss, {}),
        (mim4dd.nce_loss, {"negatives": 3.0}),
        (mim4dd.info_nce_loss, {}),
        (mim4dd.info_nce_loss, {"positives": "any"}),
    ):
        expected = torch.stack([loss(*row, **options) for row in rows]).mean()
        torch.testing.assert_close(loss(a, k, la, la, exclude_self=True, **options), expected)
        transposed = loss(k, a, la, la, exclude_self=True, **options)
        both = loss(a, k, la, la, exclude_self=True, symmetric=True, **options)
        torch.testing.assert_close(both, expected + transposed)


@pytest.mark.parametrize("positives", ["each", "any"])
def test_an_anchor_with_no_positive_but_itself_does_not_count(positives):
    a, k, _, _ = labelled_features(6, 6, 5, 1)
    labels = torch.tensor([0, 0, 1, 2, 2, 3])  # the third and the last are alone
    p = (F.normalize(a) @ F.normalize(k).T / 0.2).fill_diagonal_(-torch.inf).softmax(1)
    expected = -(p[0, 1] * p[1, 0] * p[3, 4] * p[4, 3]).log() / 4
    loss = mim4dd.info_nce_loss(a, k, labels, labels, temperature=0.2, positives=positives, exclude_self=True)
    torch.testing.assert_close(loss, expected)


LOSSES = [
    mim4dd.nce_loss,
    mim4dd.info_nce_loss,
    functools.partial(mim4dd.info_nce_loss, positives="any"),
]


def test_large_logits_do_not_overflow():
    a = torch.tensor([[1.0, 0.0]], requires_grad=True)
    k = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    for loss in LOSSES:
        value = loss(a, k, torch.tensor([0]), torch.tensor([1, 0]), temperature=1e-3)
        assert value.item() == pytest.approx(2000, rel=1e-3)
        assert torch.autograd.grad(value, a)[0].isfinite().all()


def test_zero_rows_have_neither_direction_nor_gradient():
    a, k, la, lk = labelled_features(3, 4, 5, 2)
    a[1], k[2] = 0, 0
    a.requires_grad_()
    k.requires_grad_()
    for loss in LOSSES:
        gradients = torch.autograd.grad(loss(a, k, la, lk), (a, k))
        assert all(g.isfinite().all() for g in gradients)
        assert not gradients[0][1].any()
        assert not gradients[1][2].any()
        assert gradients[0][0].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_nan_is_never_hidden(loss):
    """Not even in a row that does not count for want of a positive: its gradients are NaN as well."""
    a, k, la, lk = labelled_features(6, 9, 5, 3)
    a[1, 2], la[1] = math.nan, 7
    a.requires_grad_()
    value = loss(a, k, la, lk)
    assert value.isnan()
    assert torch.autograd.grad(value, a)[0].isnan().any()


def test_labels_of_any_strides_pass_without_a_warning(recwarn):
    a, k, la, lk = labelled_features(6, 9, 5, 3)
    batch = [torch.stack([labels, labels], 1) for labels in (la, lk)]
    for loss in LOSSES:
        assert torch.equal(loss(a, k, *(pairs[:, 0] for pairs in batch)), loss(a, k, la, lk))
    assert not recwarn.list


def test_modules_show_their_settings():
    assert "temperature=0.2, noise_ratio=1.0, negatives=3" in repr(
        mim4dd.NCELoss(temperature=0.2, negatives=3)
    )
    learned = mim4dd.InfoNCELoss(temperature=torch.nn.Parameter(torch.tensor(0.2)), positives="any")
    assert repr(learned).startswith("InfoNCELoss(positives='any', ")


def test_modules_learn_a_temperature():
    a, k, la, lk = labelled_features(6, 9, 8, 3)
    temperature = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
    for module in (mim4dd.NCELoss(temperature=temperature), mim4dd.InfoNCELoss(temperature=temperature)):
        assert [*module.parameters()] == [temperature]
        assert torch.autograd.grad(module(a, k, la, lk), temperature)[0] != 0


@pytest.mark.parametrize(
    ("capability", "dtype", "obstacle"),
    [
        ((9, 0), torch.bfloat16, None),
        ((7, 5), torch.float16, None),
        ((7, 5), torch.bfloat16, "for torch.bfloat16 they need compute capability 8.0, but cuda has 7.5"),
        ((6, 1), torch.float32, "for torch.float32 they need compute capability 7.0, but cuda has 6.1"),
    ],
)
def test_older_gpus_have_no_kernels(monkeypatch, capability, dtype, obstacle):
    """A compiled call does not ask: the answer is no tensor."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert backends.kernel_obstacle(dtype, device) == obstacle

    def step(x):
        return x * 2 if backends.kernel_obstacle(x.dtype, device) is None else x

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert compiled(torch.ones(1, dtype=dtype)) == 2


def test_the_length_of_a_row_does_not_matter():
    a, k, la, lk = labelled_features(4, 5, 6, 2, dtype=torch.float32)
    a.requires_grad_()
    for loss in LOSSES:
        value = loss(a, k, la, lk)
        (gradient,) = torch.autograd.grad(value, a)
        for length in (1e-12, 1e12):
            leaf = (a.detach() * length).requires_grad_()
            same = loss(leaf, k * length, la, lk)
            torch.testing.assert_close(same, value)
            close(torch.autograd.grad(same, leaf)[0] * length, gradient)


def test_modules_pass_every_option_on():
    a, k, _, _ = labelled_features(6, 6, 5, 2)
    labels = torch.arange(6) % 2  # two positives each
    torch.testing.assert_close(mim4dd.NCELoss()(a, k, labels, labels), mim4dd.nce_loss(a, k, labels, labels))
    torch.testing.assert_close(mim4dd.InfoNCELoss()(a, k), mim4dd.info_nce_loss(a, k))
    shared = {"temperature": 0.3, "symmetric": True, "exclude_self": True}
    for module, loss, options in (
        (mim4dd.NCELoss, mim4dd.nce_loss, {"noise_ratio": 2.0, "negatives": 3.0, **shared}),
        (mim4dd.InfoNCELoss, mim4dd.info_nce_loss, {"positives": "any", **shared}),
    ):
        expected = loss(a, k, labels, labels, **options)
        torch.testing.assert_close(module(**options)(a, k, labels, labels), expected)
        with pytest.raises(ValueError, match="backend is 'triton'"):
            module(backend="triton")(a, k, labels, labels)


def test_a_temperature_of_one_element_and_of_another_dtype_is_learned():
    a, k, la, lk = labelled_features(4, 5, 6, 2, dtype=torch.float32)
    temperature = torch.nn.Parameter(torch.full((1,), 0.2, dtype=torch.float64))
    loss = mim4dd.nce_loss(a, k, la, lk, temperature=temperature)
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, temperature)[0].shape == (1,)


def test_obstacles_to_the_kernels(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "need a CUDA device, or TRITON_INTERPRET=1" in backends.kernel_obstacle(torch.float32, cpu)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert backends.kernel_obstacle(torch.float32, gpu) == "the kernels are written for NVIDIA GPUs"
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    assert backends.kernel_obstacle(torch.float32, gpu) == "triton is not installed"
