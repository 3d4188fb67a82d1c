"""What the contrastive losses refuse, by name."""

import functools
import math
import re

import pytest
import torch
from conftest import labelled_features

import mim4dd
from mim4dd.losses import calibrated_noise_ratio

A, K, LA, LK = labelled_features(4, 5, 3, 2)
GIVEN = {"anchors": A, "keys": K, "anchor_labels": LA, "key_labels": LK}
LAYERS = {"anchors": [A, A], "keys": [K, K]}
UNLABELLED = {"anchor_labels": None, "key_labels": None}
CALIBRATED = "noise_ratio is 'calibrated', .*NCELoss and calibrated_noise_ratio"
BOTH, NCE = [mim4dd.nce_loss, mim4dd.info_nce_loss], [mim4dd.nce_loss, calibrated_noise_ratio]
WRONG = [  # the losses, what they are given instead, and what they say of it
    (BOTH, {"anchors": A[0]}, r"anchors is \[3\]"),
    (BOTH, {"keys": K[:, :2]}, r"anchors is \[4, 3\] and keys is \[5, 2\]"),
    (BOTH, {"keys": K.long()}, "keys has dtype torch.int64"),
    (BOTH, {"anchors": A.numpy()}, "anchors is of type ndarray, expected a tensor of float16 or bfloat16"),
    (BOTH, {"keys": K.tolist()}, "keys is of type list, expected a tensor of float16 or bfloat16"),
    (BOTH, {"anchors": A.to(torch.float8_e4m3fn)}, "anchors has dtype torch.float8_e4m3fn, .*float64"),
    (BOTH, {"keys": K.to("meta")}, "anchors is on cpu and keys on meta"),
    (BOTH, {"anchor_labels": LA.numpy()}, "anchor_labels is of type ndarray, expected .* of int32 or int64"),
    (BOTH, {"key_labels": LK.tolist()}, "key_labels is of type list, expected a tensor of int32 or int64"),
    (BOTH, {"anchor_labels": LA[:3]}, r"anchor_labels is \[3\], expected \[4\]"),
    (BOTH, {"key_labels": LK.float()}, "key_labels has dtype torch.float32"),
    (BOTH, {"anchor_labels": LA.to("meta")}, "anchor_labels is on meta and the features on cpu"),
    (BOTH, {"temperature": 0.0}, "temperature is 0.0"),
    (BOTH, {"temperature": torch.ones(2)}, r"temperature is \[2\]"),
    (BOTH, {"temperature": torch.tensor(1)}, "temperature has dtype torch.int64, expected a floating dtype"),
    (BOTH, {"temperature": None}, "temperature is None, expected a positive number or a tensor"),
    (BOTH, {"backend": "triton"}, "backend is 'triton'"),
    (NCE, {"temperature": "all"}, "temperature is 'all', expected a positive number"),
    (NCE, {"negatives": "all"}, "negatives is 'all', expected a positive number"),
    (NCE, {"negatives": -1}, "negatives is -1, expected a positive number"),
    (NCE, {"negatives": 0.0}, "negatives is 0.0, expected a positive number"),
    (NCE, {"negatives": math.inf}, "negatives is inf, expected a positive number"),
    (NCE, {"negatives": torch.tensor(3.0)}, "negatives is a tensor, .* expected a positive number or None"),
    (BOTH + NCE[1:], {"exclude_self": True}, r"exclude_self .* anchors is \[4, 3\] and keys is \[5, 3\]"),
    ([mim4dd.nce_loss], {"noise_ratio": -1}, "noise_ratio is -1"),
    ([mim4dd.nce_loss], {"noise_ratio": "calibrated"}, CALIBRATED),
    ([mim4dd.nce_losses], LAYERS | {"noise_ratio": "calibrated"}, CALIBRATED),
    ([mim4dd.nce_losses], LAYERS | {"noise_ratio": [1.0, None]}, "noise_ratio is None, expected a positive"),
    ([mim4dd.info_nce_loss], {"key_labels": None}, "key_labels is None"),
    ([mim4dd.info_nce_loss], UNLABELLED, "as many keys as anchors"),
    ([mim4dd.info_nce_losses], LAYERS | UNLABELLED, "info_nce_losses: .* as many keys as anchors"),
    ([mim4dd.info_nce_loss], {"positives": "all"}, "positives is 'all', expected 'each' or 'any'"),
]


@pytest.mark.parametrize(
    ("loss", "wrong", "message"), [(loss, *case) for losses, *case in WRONG for loss in losses]
)
def test_bad_input_is_named(loss, wrong, message):
    with pytest.raises(ValueError, match=message):
        loss(**GIVEN | wrong)


@pytest.mark.parametrize("loss", BOTH)
def test_what_the_fused_backend_does_not_take_is_named(loss):
    with pytest.raises(RuntimeError, match="backend='fused' cannot run, .*torch.float64"):
        loss(**GIVEN, backend="fused")


@pytest.mark.parametrize(
    ("loss", "side"),
    [
        (mim4dd.info_nce_loss, A),
        (mim4dd.info_nce_losses, [A, A]),
        (functools.partial(mim4dd.info_nce_loss, positives="any", symmetric=True), A),
        (lambda *sides, exclude_self: mim4dd.InfoNCELoss(exclude_self=exclude_self)(*sides), A),
    ],
)
def test_the_only_positive_is_not_left_out(loss, side):
    with pytest.raises(ValueError, match="exclude_self is True, but without labels .*; give labels"):
        loss(side, side, exclude_self=True)


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan")])
def test_tensors_that_are_not_positive_are_named(value):
    a, k, la, lk = labelled_features(5, 6, 4, 3)
    wrong = torch.nn.Parameter(torch.tensor(value))
    for loss in (mim4dd.nce_loss, mim4dd.info_nce_loss):
        with pytest.raises(ValueError, match=f"temperature is {value}, expected a positive number"):
            loss(a, k, la, lk, temperature=wrong)
    with pytest.raises(ValueError, match=f"noise_ratio is {value}, expected a positive number"):
        mim4dd.nce_loss(a, k, la, lk, noise_ratio=wrong)


@pytest.mark.parametrize("value", [1e-40, 1e39])
@pytest.mark.parametrize("tensor", [False, True])
def test_numbers_that_float32_does_not_hold_are_named(value, tensor):
    a, k, la, lk = labelled_features(5, 6, 4, 3)
    narrow = a.float(), k.float(), la, lk
    given = torch.tensor(value, dtype=torch.float64) if tensor else value
    message = "expected a positive number from 1.18e-38 to 3.4e+38, the range of torch.float32"
    for loss, name in (
        (mim4dd.nce_loss, "temperature"),
        (mim4dd.nce_loss, "noise_ratio"),
        (mim4dd.info_nce_loss, "temperature"),
        (calibrated_noise_ratio, "temperature"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{name} is {value}, {message}")):
            loss(*narrow, **{name: given})
    assert mim4dd.nce_loss(a, k, la, lk, noise_ratio=given).isfinite()
    with pytest.raises(ValueError, match=re.escape(f"negatives is {value}, {message}")):
        mim4dd.nce_loss(*narrow, negatives=value)


def test_each_noise_ratio_that_cannot_be_read_is_looked_at():
    class Unread(torch.Tensor):
        """As on a GPU: its value is not read."""

    a, k, la, lk = labelled_features(5, 6, 4, 3)
    ratios = [torch.tensor(2.0), torch.tensor(-1.0).as_subclass(Unread)]
    with pytest.raises(RuntimeError, match="nce_losses: noise_ratio is not a positive number"):
        mim4dd.nce_losses([a, a], [k, k], la, lk, noise_ratio=ratios)


def test_modules_refuse_settings_when_they_are_made():
    for module in (mim4dd.NCELoss, mim4dd.InfoNCELoss):
        with pytest.raises(ValueError, match=f"{module.__name__}: temperature is -1, expected a positive"):
            module(temperature=-1)
        with pytest.raises(ValueError, match=f"{module.__name__}: backend is 'foo', expected 'reference'"):
            module(backend="foo")
    with pytest.raises(ValueError, match="NCELoss: negatives is 0, expected a positive number"):
        mim4dd.NCELoss(negatives=0)
    with pytest.raises(ValueError, match=r"NCELoss: noise_ratio is \[0\], expected one number"):
        mim4dd.NCELoss(noise_ratio=torch.empty(0))
    with pytest.raises(ValueError, match="noise_ratio is 'auto'"):
        mim4dd.NCELoss(noise_ratio="auto")
    with pytest.raises(ValueError, match="InfoNCELoss: positives is 'all', expected 'each' or 'any'"):
        mim4dd.InfoNCELoss(positives="all")


@pytest.mark.parametrize("losses", [mim4dd.nce_losses, mim4dd.info_nce_losses])
def test_no_layers_are_named(losses):
    message = "anchors has 0 layers, keys 0; expected the same number, at least 1"
    with pytest.raises(ValueError, match=message):
        losses([], [], LA, LK)
