"""Noise ratios that are measured: what they are, and that a module keeps its own."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import labelled_features

import mim4dd
from mim4dd.losses import calibrated_noise_ratio, calibration


def test_calibrated_critic_starts_at_its_prior(monkeypatch):
    a, k, _, _ = labelled_features(6, 200, 16, 1)
    la, lk = torch.arange(6) % 3, torch.arange(200) % 3
    noise_ratio = calibrated_noise_ratio(a, k, la, lk, temperature=0.5, negatives=7.0)
    h = (F.normalize(a) @ F.normalize(k).T / 0.5).exp()
    assert (h.mean() / (h.mean() + noise_ratio)).item() == pytest.approx(1 / 8, rel=1e-6)
    plain = calibrated_noise_ratio(a, k, la, lk, temperature=0.5)
    mean_negatives = torch.tensor([(lk != label).sum() for label in la]).double().mean()
    torch.testing.assert_close(plain, noise_ratio / 7 * mean_negatives)
    others = (F.normalize(a) @ F.normalize(a).T / 0.5).exp()[~torch.eye(6, dtype=torch.bool)].mean()
    for pairs in (450, 12):  # two rows at a time of k, and of a
        monkeypatch.setattr(calibration, "CHUNK_PAIRS", pairs)
        torch.testing.assert_close(calibrated_noise_ratio(a, k, la, lk, temperature=0.5), plain)
        for negatives, count in ((7.0, 7), (None, 4)):
            options = {"temperature": 0.5, "negatives": negatives, "exclude_self": True}
            torch.testing.assert_close(calibrated_noise_ratio(a, a, la, la, **options), others * count)


def test_calibration_of_one_label_counts_one_negative():
    a, k, _, _ = labelled_features(6, 9, 16, 1)
    zeros = torch.zeros(9, dtype=torch.int64)
    mean = (F.normalize(a) @ F.normalize(k).T / 0.5).exp().mean()
    torch.testing.assert_close(calibrated_noise_ratio(a, k, zeros[:6], zeros, temperature=0.5), mean)


def test_module_freezes_its_calibration_and_keeps_it_in_its_state():
    first, second = labelled_features(6, 20, 8, 3, seed=1), labelled_features(6, 20, 8, 3, seed=2)
    loss = mim4dd.NCELoss(noise_ratio="calibrated")
    loss(*first)
    frozen = loss.noise_ratio.clone()
    torch.testing.assert_close(frozen, calibrated_noise_ratio(*first))
    value = loss(*second)
    assert torch.equal(loss.noise_ratio, frozen)
    torch.testing.assert_close(value, mim4dd.nce_loss(*second, noise_ratio=frozen))
    other = mim4dd.NCELoss(noise_ratio="calibrated")
    new = other.state_dict()
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other(*second).float(), value.float())
    other.load_state_dict(new)
    other(*second)
    torch.testing.assert_close(other.noise_ratio.double(), calibrated_noise_ratio(*second))


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize(
    ("module", "name"),
    [(mim4dd.NCELoss(noise_ratio="calibrated"), "noise_ratio"), (mim4dd.MutualInformation(), "noise_ratios")],
)
def test_calibration_goes_where_its_module_goes(module, name, measured):
    first = copy.deepcopy(module)
    if measured:
        first(*labelled_features(6, 20, 8, 3, dtype=torch.float32))
    ratio = getattr(first, name)
    assert bool(ratio.numel()) == measured
    other = pickle.loads(pickle.dumps(module)).to(torch.float64)
    other.load_state_dict(first.state_dict())
    for moved in (other, copy.deepcopy(first).to(torch.float64)):
        assert torch.equal(getattr(moved, name), ratio.double())
    assert getattr(first.to("meta"), name).is_meta


def test_calibration_is_in_full_precision_under_autocast():
    """float16 holds no sum of e^10."""
    a, k, la, lk = labelled_features(64, 64, 256, 4)
    features = a.abs().float(), k.abs().float(), la, lk
    plain = calibrated_noise_ratio(*features)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(calibrated_noise_ratio(*features), plain)


def test_a_batch_that_calibrates_nothing_is_refused_and_forgotten():
    a, k, la, lk = labelled_features(6, 20, 8, 3)
    loss = mim4dd.NCELoss(noise_ratio="calibrated")
    with pytest.raises(
        ValueError, match="calibrated_noise_ratio: it is nan on these features; expected finite features"
    ):
        loss(a[:0], k, la[:0], lk)
    assert loss(a, k, la, lk).isfinite()
    with pytest.raises(ValueError, match="calibrated_noise_ratio: it is inf on these features"):
        calibrated_noise_ratio(a.float().abs(), k.float().abs(), la, lk, temperature=0.005)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_in_half_precision_keeps_its_calibration(dtype):
    """At a low temperature it is beyond float16, and bfloat16 has three digits of it."""
    a, k, la, lk = labelled_features(6, 20, 8, 3, dtype=torch.float32)
    loss = mim4dd.NCELoss(noise_ratio="calibrated", temperature=0.05)
    loss(a.abs(), k.abs(), la, lk)
    ratio = loss.noise_ratio.clone()
    assert ratio > torch.finfo(torch.float16).max
    assert torch.equal(torch.nn.Sequential(loss).to(dtype)[0].noise_ratio, ratio)
    assert loss(a.to(dtype), k.to(dtype), la, lk).isfinite()
    assert mim4dd.NCELoss(noise_ratio="calibrated").to(dtype).noise_ratio.dtype == torch.float32
    term = mim4dd.MutualInformation(loss="nce", temperature=0.05)
    term([a.abs()], [k.abs()], la, lk)
    assert torch.equal(term.to(dtype).noise_ratios, ratio[None])


def test_a_module_built_under_another_default_dtype_keeps_its_calibration():
    features = labelled_features(6, 20, 8, 3, dtype=torch.float32)
    measured = mim4dd.NCELoss(noise_ratio="calibrated")
    measured(*features)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        loaded = mim4dd.NCELoss(noise_ratio="calibrated")
    finally:
        torch.set_default_dtype(before)
    loaded.load_state_dict(measured.state_dict())
    assert torch.equal(loaded.noise_ratio, measured.noise_ratio)


def test_training_may_come_after_a_calibration_in_inference_mode():
    a, k, la, lk = labelled_features(6, 20, 8, 3)
    for loss, name in (
        (mim4dd.NCELoss(noise_ratio="calibrated"), "noise_ratio"),
        (mim4dd.MutualInformation(), "noise_ratios"),
    ):
        with torch.inference_mode():
            loss(a, k, la, lk)
        ratio = getattr(loss, name)
        assert not ratio.is_inference()
        ratio.copy_(2 * ratio)  # as DDP does, which sends the buffers of the first rank to the others
        loss(a.clone().requires_grad_(), k, la, lk).backward()


def test_nothing_is_calibrated_inside_a_transform():
    a, k, la, lk = labelled_features(6, 20, 8, 3)
    for loss in (mim4dd.NCELoss(noise_ratio="calibrated"), mim4dd.MutualInformation()):
        gradient = torch.func.grad(lambda a, loss=loss: loss(a, k, la, lk))
        with pytest.raises(RuntimeError, match="inside a transform of torch.func cannot be kept"):
            gradient(a)
        loss(a, k, la, lk)
        assert gradient(a).isfinite().all()
        copy.deepcopy(loss)


def test_calibration_of_mixed_dtypes_is_in_the_wider():
    a, k, la, lk = labelled_features(6, 20, 8, 3)
    mixed = calibrated_noise_ratio(a.float(), k, la, lk)
    torch.testing.assert_close(mixed, calibrated_noise_ratio(a.float().double(), k, la, lk))


def test_module_calibrates_with_its_options():
    a, k, _, _ = labelled_features(6, 6, 8, 3)
    labels = torch.arange(6) % 3
    for options in ({"temperature": 0.3}, {"negatives": 7.0}, {"exclude_self": True}):
        loss = mim4dd.NCELoss(noise_ratio="calibrated", **options)
        loss(a, k, labels, labels)
        torch.testing.assert_close(loss.noise_ratio, calibrated_noise_ratio(a, k, labels, labels, **options))
