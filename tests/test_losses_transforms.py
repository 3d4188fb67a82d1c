"""The contrastive losses inside torch.func, inference mode, and on tensors without values."""

import pytest
import torch
from conftest import labelled_features
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import mim4dd
from mim4dd.losses.scales import scales_of

LOSSES = [mim4dd.nce_loss, mim4dd.info_nce_loss]


@pytest.mark.parametrize("transform", ["create_graph", "torch.func"])
def test_gradients_to_be_differentiated_are_those_of_one_tensor_in_two_places(transform):
    """Features that are anchors and keys, and those of a layer that is made of another's."""
    a, _, labels, _ = labelled_features(6, 1, 4, 3)

    def loss(x):
        maps = [x, (x @ x.T).tanh()]
        both = mim4dd.info_nce_losses(maps, maps, labels, labels, exclude_self=True)
        return both.sum() + mim4dd.nce_loss(x, x.sin(), labels, labels)

    leaf = a.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    if transform == "torch.func":
        found = torch.func.grad(loss)(a)
    else:
        (found,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev"])
def test_functional_gradients(loss, transform):
    a, k, la, lk = labelled_features(5, 6, 4, 3)
    inputs = [a, k, torch.tensor(0.3, dtype=torch.float64)]

    def function(a, k, t):
        return loss(a, k, la, lk, temperature=t)

    leaves = [value.clone().requires_grad_() for value in inputs]
    expected = torch.autograd.grad(function(*leaves), leaves)
    if transform == "vjp":
        found = torch.func.vjp(function, *inputs)[1](torch.ones((), dtype=torch.float64))
    else:
        found = getattr(torch.func, transform)(function, argnums=(0, 1, 2))(*inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("around", ["torch.func", "autograd"])
@pytest.mark.parametrize("transform", ["vjp", "jacrev"])
def test_functional_gradients_have_a_gradient(transform, around):
    """Also by what they are not for: by the keys, of the gradient for anchors that need none otherwise."""
    a, k, la, lk = labelled_features(5, 6, 4, 3)

    def gradient(keys):
        def function(x):
            return mim4dd.nce_loss(x, keys, la, lk)

        if transform == "vjp":
            return torch.func.vjp(function, a)[1](torch.ones((), dtype=torch.float64))[0]
        return torch.func.jacrev(function)(a)

    leaf, keys = a.clone().requires_grad_(), k.clone().requires_grad_()
    (first,) = torch.autograd.grad(mim4dd.nce_loss(leaf, keys, la, lk), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), keys)
    if around == "torch.func":
        found = torch.func.grad(lambda k: gradient(k).square().sum())(k)
    else:
        (found,) = torch.autograd.grad(gradient(keys).square().sum(), keys)
    torch.testing.assert_close(found, expected)


def test_gradients_have_a_gradient_inside_a_checkpoint():
    a, k, la, lk = labelled_features(5, 6, 4, 3)
    a.requires_grad_()

    def penalty(a):
        return torch.autograd.grad(mim4dd.nce_loss(a * 2, k, la, lk), a, create_graph=True)[0].square().sum()

    (expected,) = torch.autograd.grad(penalty(a), a)
    (found,) = torch.autograd.grad(checkpoint(penalty, a, use_reentrant=False), a)
    torch.testing.assert_close(found, expected)


def test_numbers_first_met_inside_a_transform_do_not_outlive_it():
    a, k, la, lk = labelled_features(5, 6, 4, 3)

    def loss(a, temperature):
        return mim4dd.nce_loss(a, k, la, lk, temperature=temperature)

    def step(a, temperature):  # MAML: the loss after a step
        return loss(a - torch.func.grad(loss)(a, temperature), temperature)

    expected = torch.func.grad(step)(a, torch.tensor(0.3217, dtype=torch.float64))
    for _ in range(2):
        torch.testing.assert_close(torch.func.grad(step)(a, 0.3217), expected)
    assert loss(a, 0.3217).isfinite()


@pytest.mark.parametrize("loss", LOSSES)
def test_features_and_labels_of_inference_mode_are_those_of_no_grad(loss):
    a, k, la, lk = labelled_features(5, 6, 4, 3)
    leaf = a.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, k, la, lk), leaf)
    with torch.inference_mode():
        keys, key_labels = k.clone(), lk.clone()
        assert loss(leaf, keys, la, key_labels).isfinite()
    torch.testing.assert_close(torch.autograd.grad(loss(leaf, keys, la, key_labels), leaf)[0], expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_meta_tensors_have_losses_and_gradients(loss):
    a, k, la, lk = (value.to("meta") for value in labelled_features(5, 6, 4, 3))
    a.requires_grad_()
    value = loss(a, k, la, lk)
    (gradient,) = torch.autograd.grad(value, a, create_graph=True)
    (again,) = torch.autograd.grad(gradient.sum(), a)
    assert (value.shape, gradient.shape, again.shape) == ((), a.shape, a.shape)
    assert mim4dd.NCELoss(noise_ratio="calibrated")(a, k, la, lk).is_meta


def test_fake_losses_and_real_ones_do_not_mix():
    """Numbers are kept as tensors; those made under one mode must not be met again under another."""
    real = [value.detach() for value in labelled_features(6, 9, 16, 3)]
    for _ in range(2):
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(value) for value in real]
            assert mim4dd.nce_loss(*fake, temperature=0.123).shape == ()
        assert mim4dd.nce_loss(*real, temperature=0.123).isfinite()


def test_fake_features_mix_with_real_ones_and_dtypes():
    _, k, la, lk = labelled_features(6, 9, 16, 3, dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        anchors = torch.zeros(6, 16, dtype=torch.bfloat16, requires_grad=True)
        loss = mim4dd.nce_loss(anchors, k, la, lk)
        assert loss.dtype == torch.float32
        assert torch.autograd.grad(loss, anchors)[0].dtype == torch.bfloat16


def test_numbers_stay_where_a_recorded_step_reads_them():
    rows = torch.zeros(1, 2)
    first = scales_of("nce_loss", rows, 0.25, [1.0])
    for k in range(1, 100):
        scales_of("nce_loss", rows, float(k), [1.0])
    assert scales_of("nce_loss", rows, 0.25, [1.0]).data_ptr() == first.data_ptr()


def test_numbers_first_met_in_inference_mode_serve_training_too():
    a, k, la, lk = labelled_features(4, 5, 6, 2, dtype=torch.float32)
    with torch.inference_mode():
        mim4dd.nce_loss(a, k, la, lk, temperature=0.4567)
    assert torch.autograd.grad(mim4dd.nce_loss(a.requires_grad_(), k, la, lk, temperature=0.4567), a)[0].any()


def test_gradients_to_be_differentiated_are_exact_under_autocast():
    a, k, la, lk = labelled_features(5, 6, 4, 2, dtype=torch.float32)
    a.requires_grad_()

    def penalty():
        (gradient,) = torch.autograd.grad(mim4dd.nce_loss(a, k, la, lk), a, create_graph=True)
        return gradient.square().sum()

    expected = penalty()
    with torch.autocast("cpu", torch.bfloat16):
        actual = penalty()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    twice = (torch.autograd.grad(value, a)[0] for value in (actual, expected))
    torch.testing.assert_close(*twice, rtol=0, atol=0)
