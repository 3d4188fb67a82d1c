"""What the contrastive losses refuse, by name."""

import functools
import math
import re

import pytest
import torch
from conftest import labelled_features

import mim4dd
from mim4dd.losses import calibrated_noise_ratio


def test_bad_input_is_named():
    a, k, la, lk = labelled_features(4, 5, 3, 2)
    wrong = [
        ((a[0], k, la, lk), {}, r"anchors is \[3\]"),
        ((a, k[:, :2], la, lk), {}, r"anchors is \[4, 3\] and keys is \[5, 2\]"),
        ((a, k.long(), la, lk), {}, "keys has dtype torch.int64"),
        ((a.numpy(), k, la, lk), {}, "anchors is of type ndarray, expected a tensor of float16 or bfloat16"),
        ((a, k.tolist(), la, lk), {}, "keys is of type list, expected a tensor of float16 or bfloat16"),
        (
            (a.to(torch.float8_e4m3fn), k, la, lk),
            {},
            "anchors has dtype torch.float8_e4m3fn, expected .*float64",
        ),
        ((a, k, la.numpy(), lk), {}, "anchor_labels is of type ndarray, expected a tensor of int32 or int64"),
        ((a, k, la, lk.tolist()), {}, "key_labels is of type list, expected a tensor of int32 or int64"),
        ((a, k, la[:3], lk), {}, r"anchor_labels is \[3\], expected \[4\]"),
        ((a, k, la, lk.float()), {}, "key_labels has dtype torch.float32"),
        ((a, k.to("meta"), la, lk), {}, "anchors is on cpu and keys on meta"),
        ((a, k, la, lk), {"temperature": 0.0}, "temperature is 0.0"),
        ((a, k, la, lk), {"temperature": torch.ones(2)}, r"temperature is \[2\]"),
        (
            (a, k, la, lk),
            {"temperature": None},
            "temperature is None, expected a positive number or a tensor",
        ),
        ((a, k, la, lk), {"backend": "triton"}, "backend is 'triton'"),
    ]
    for loss in (mim4dd.nce_loss, mim4dd.info_nce_loss):
        for args, options, message in wrong:
            with pytest.raises(ValueError, match=message):
                loss(*args, **options)
        with pytest.raises(RuntimeError, match="backend='fused' cannot run, .*torch.float64"):
            loss(a, k, la, lk, backend="fused")
    with pytest.raises(ValueError, match="noise_ratio is -1"):
        mim4dd.nce_loss(a, k, la, lk, noise_ratio=-1)
    for loss, sides in ((mim4dd.nce_loss, (a, k)), (mim4dd.nce_losses, ([a], [k]))):
        with pytest.raises(
            ValueError, match="noise_ratio is 'calibrated', .*NCELoss and calibrated_noise_ratio"
        ):
            loss(*sides, la, lk, noise_ratio="calibrated")
    with pytest.raises(ValueError, match="noise_ratio is None, expected a positive number"):
        mim4dd.nce_losses([a, a], [k, k], la, lk, noise_ratio=[1.0, None])
    for name in ("temperature", "negatives"):
        for loss in (mim4dd.nce_loss, calibrated_noise_ratio):
            with pytest.raises(ValueError, match=f"{name} is 'all', expected a positive number"):
                loss(a, k, la, lk, **{name: "all"})
    with pytest.raises(ValueError, match="noise_ratio is 'auto'"):
        mim4dd.NCELoss(noise_ratio="auto")
    with pytest.raises(ValueError, match="key_labels is None"):
        mim4dd.info_nce_loss(a, k, la)
    with pytest.raises(ValueError, match="as many keys as anchors"):
        mim4dd.info_nce_loss(a, k)
    with pytest.raises(ValueError, match="info_nce_losses: .* as many keys as anchors"):
        mim4dd.info_nce_losses([a], [k])
    with pytest.raises(ValueError, match="positives is 'all', expected 'each' or 'any'"):
        mim4dd.info_nce_loss(a, k, la, lk, positives="all")
    for negatives in (-1, 0.0, math.inf):
        with pytest.raises(ValueError, match=f"negatives is {negatives}, expected a positive number"):
            mim4dd.nce_loss(a, k, la, lk, negatives=negatives)
    for loss in (mim4dd.nce_loss, calibrated_noise_ratio):
        with pytest.raises(ValueError, match="negatives is a tensor, .* expected a positive number or None"):
            loss(a, k, la, lk, negatives=torch.tensor(3.0))
    for loss in (mim4dd.nce_loss, mim4dd.info_nce_loss, calibrated_noise_ratio):
        with pytest.raises(ValueError, match=r"exclude_self .* anchors is \[4, 3\] and keys is \[5, 3\]"):
            loss(a, k, la, lk, exclude_self=True)
    for loss, side in (
        (mim4dd.info_nce_loss, a),
        (mim4dd.info_nce_losses, [a, a]),
        (functools.partial(mim4dd.info_nce_loss, positives="any", symmetric=True), a),
    ):
        with pytest.raises(ValueError, match="exclude_self is True, but without labels .*; give labels"):
            loss(side, side, exclude_self=True)
    with pytest.raises(ValueError, match="exclude_self is True, but without labels .*; give labels"):
        mim4dd.InfoNCELoss(exclude_self=True)(a, a)


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
    with pytest.raises(ValueError, match="InfoNCELoss: positives is 'all', expected 'each' or 'any'"):
        mim4dd.InfoNCELoss(positives="all")


def test_other_devices_dtypes_and_no_layers_are_named():
    a, k, la, lk = labelled_features(4, 5, 3, 2)
    for loss in (mim4dd.nce_loss, mim4dd.info_nce_loss):
        with pytest.raises(ValueError, match="anchor_labels is on meta and the features on cpu"):
            loss(a, k, la.to("meta"), lk)
        with pytest.raises(ValueError, match="temperature has dtype torch.int64, expected a floating dtype"):
            loss(a, k, la, lk, temperature=torch.tensor(1))
    for losses in (mim4dd.nce_losses, mim4dd.info_nce_losses):
        with pytest.raises(
            ValueError, match="anchors has 0 layers, keys 0; expected the same number, at least 1"
        ):
            losses([], [], la, lk)
