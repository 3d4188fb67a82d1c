"""Images in .npz files, and what becomes of their pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import labels_of, pixels

from mim4dd.data import load
from mim4dd.data.pixels import resized
from mim4dd.errors import InputError


def save(path: Path, **arrays) -> str:
    defaults = {
        "x_train": pixels(10, 12, 12, 3),
        "y_train": labels_of(5, 5),
        "x_test": pixels(4, 12, 12, 3, seed=1),
        "y_test": np.array([0, 1, 1, 0]),
    }
    arrays = {key: value for key, value in (defaults | arrays).items() if value is not None}
    np.savez(path / "set.npz", **arrays)
    return str(path / "set.npz")


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64])
def test_npz(tmp_path, layout, dtype):
    images = pixels(10, 2 if layout != "NHW" else 1, 12, 12)
    scaled = images / np.array(255, dtype) if np.issubdtype(dtype, np.floating) else images.astype(dtype)
    stored = {"NHWC": scaled.transpose(0, 2, 3, 1), "NCHW": scaled, "NHW": scaled[:, 0]}[layout]
    path = save(tmp_path, x_train=stored, x_test=stored[:4], y_train=labels_of(5, 5)[:, None])
    train, test = load(path)
    unit = 255 if train.images.dtype == torch.uint8 else 1
    assert train.images.dtype == (torch.float32 if np.issubdtype(dtype, np.floating) else torch.uint8)
    assert train.images.shape == images.shape
    np.testing.assert_allclose(train.images / unit, images / 255, atol=1e-6)
    np.testing.assert_allclose(test.images / unit, images[:4] / 255, atol=1e-6)
    np.testing.assert_allclose(train.mean, (images / 255).mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(train.std, (images / 255).std((0, 2, 3)), atol=1e-6)
    assert train.class_names == ("0", "1")


def test_npz_without_test_holds_out_a_fixed_fifth(tmp_path):
    path = save(tmp_path, x_train=pixels(60, 8, 8), y_train=labels_of(10, 50), x_test=None, y_test=None)
    train, test = load(path)
    assert torch.bincount(train.labels).tolist() == [8, 40]
    assert torch.bincount(test.labels).tolist() == [2, 10]
    assert torch.equal(load(path)[1].images, test.images)
    assert train.mean.item() == pytest.approx(train.images.float().mean().item() / 255, abs=1e-6)


def test_floats_up_to_255_and_any_range(tmp_path):
    images = pixels(10, 8, 8, 3)
    images[0, 0, 0] = (0, 128, 255)
    train, test = load(
        save(tmp_path, x_train=images.astype(np.float32), x_test=images[:4].astype(np.float64))
    )
    np.testing.assert_allclose(train.images, images.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    train, test = load(save(tmp_path, x_train=images / 127.5 - 1, x_test=images[:4] / 127.5 - 1.1))
    np.testing.assert_allclose(train.images, images.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    shifted = (images[:4].transpose(0, 3, 1, 2) / 255 - 0.05).clip(0, 1)
    np.testing.assert_allclose(test.images, shifted, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize(("low", "high"), [(0, 1.0000001), (-1e-4, 1.0005), (0, 0.9)])
def test_a_hair_beyond_a_bound_is_clamped(tmp_path, scale, low, high):
    """As resizing or float16 leaves it: the images are those of their scale, not black."""
    images = (pixels(10, 12, 12) / 255).astype(np.float32)
    images[0, 0, :2] = low, high
    train, test = load(save(tmp_path, x_train=images * scale, x_test=images[:4] * scale))
    for part, expected in ((train, images), (test, images[:4])):
        np.testing.assert_allclose(part.images[:, 0], expected.clip(0, 1), atol=1e-6)
        assert 0 <= part.images.min() <= part.images.max() <= 1


@pytest.mark.parametrize(("low", "high"), [(0, 1.5), (0, 2), (-0.01, 1), (0, 300), (-1, 255)])
def test_floats_of_no_known_scale_are_stretched(tmp_path, low, high):
    images = np.linspace(low, high, 10 * 12 * 12).reshape(10, 12, 12)
    train, _ = load(save(tmp_path, x_train=images, x_test=images[:4]))
    np.testing.assert_allclose(train.images[:, 0], (images - low) / (high - low), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool])
@pytest.mark.parametrize("test_dtype", [np.uint8, np.float32])
def test_masks_of_0_and_1_are_white_where_they_are_1(tmp_path, dtype, test_dtype):
    masks = pixels(10, 12, 12) % 2
    train, test = load(save(tmp_path, x_train=masks.astype(dtype), x_test=masks[:4].astype(test_dtype)))
    assert train.images.dtype == test.images.dtype == torch.float32
    assert np.array_equal(train.images[:, 0], masks)
    assert np.array_equal(test.images[:, 0], masks[:4])
    assert train.mean.item() == pytest.approx(masks.mean())


@pytest.mark.parametrize("dark", ["x_train", "x_test"])
def test_dark_bytes_beside_bright_ones_are_bytes(tmp_path, dark):
    arrays = {"x_train": pixels(10, 12, 12), "x_test": pixels(4, 12, 12)}
    train, test = load(save(tmp_path, **arrays | {dark: arrays[dark] % 2}))
    assert train.images.dtype == test.images.dtype == torch.uint8


def test_constant_channel_gives_no_nan(tmp_path):
    images = pixels(10, 8, 8, 2)
    images[..., 1] = 77
    train, _ = load(save(tmp_path, x_train=images, x_test=images[:4]))
    batch = train.batch(torch.arange(10))
    assert batch.isfinite().all()
    assert batch[:, 1].abs().max() < 1


def test_image_size_of_arrays(tmp_path):
    images = np.full((10, 12, 12, 3), 200, np.uint8)
    images[:, 6:] = 100
    train, test = load(save(tmp_path, x_train=images, x_test=images[:4]), image_size=8)
    assert train.images.shape == (10, 3, 8, 8)
    assert test.images.shape == (4, 3, 8, 8)
    assert train.images.dtype == torch.uint8
    assert (train.images[:, :, :2] == 200).all()
    assert (train.images[:, :, -2:] == 100).all()
    assert load("digits", image_size=32)[0].image_size == (32, 32)


def test_shrinking_averages():
    """Each pixel stands for the nine it replaces, not for the one in their middle."""
    board = (torch.arange(24)[:, None] + torch.arange(24)) % 2 * 255
    shrunk = resized(board.to(torch.uint8)[None, None], 8)
    assert shrunk.shape == (1, 1, 8, 8)
    assert (shrunk.float() - 127.5).abs().max() < 10


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_train": np.linspace(0, 1, 10)}, "set.npz: train: labels of type float64"),
        ({"y_train": np.arange(10) % 2 == 0}, "labels of type bool"),
        ({"y_test": np.array(["a", "b", "a", "b"])}, "set.npz: test: labels of type"),
        ({"y_train": np.arange(10) - 1}, "label -1; expected class numbers from 0"),
        ({"y_train": np.arange(10) % 2 + 1}, "class '0' has no training image"),
        ({"y_train": np.array([0, 1, 3] * 3 + [3])}, "class '2' has no training image"),
        ({"y_train": np.array([10**12] * 10)}, "class '0' has no training image"),
        ({"y_test": np.array([0, 1, 2, 0])}, "set.npz: test: label 2, but the training labels end at 1"),
        ({"y_train": np.arange(9) % 2}, r"10 images but labels of shape \(9,\)"),
        ({"y_train": np.eye(10, dtype=int)}, r"10 images but labels of shape \(10, 10\)"),
        ({"x_train": pixels(10, 12, 16, 3)}, "expected square images"),
        ({"x_train": pixels(10, 12, 16)}, "images of 16x12; expected square ones$"),
        ({"x_train": pixels(10, 7, 7, 3)}, "images of 7x7; expected at least 8x8"),
        ({"x_train": pixels(10, 8, 8, 8)}, "may be .N, H, W, C. or .N, C, H, W."),
        ({"x_train": pixels(10, 144)}, r"shape \(10, 144\); expected"),
        ({"x_train": pixels(10, 16, 16, 3)}, r"set.npz: test: images \(3, 12, 12\) but \(3, 16, 16\)"),
        (
            {"x_train": np.full((10, 12, 12, 3), np.nan)},
            "set.npz: train: the images hold NaN, infinite or huge",
        ),
        ({"x_test": np.full((4, 12, 12, 3), np.inf)}, "set.npz: test: the images hold NaN, infinite or huge"),
        (
            {"x_train": np.resize([1e39, -1e39], (10, 12, 12, 3))},
            "set.npz: train: the images hold NaN, infinite or huge",
        ),
        ({"x_train": pixels(0, 12, 12, 3), "y_train": np.arange(0)}, "holds no images"),
        ({"x_test": pixels(0, 12, 12, 3), "y_test": np.arange(0)}, "set.npz: test: .* holds no images"),
        ({"x_train": pixels(10, 12, 12, 3).astype("c8")}, "images of type complex64"),
        ({"x_train": pixels(10, 12, 12, 3) / 255}, r"floats within \[0, 1\], test images of bytes within"),
        (
            {"x_test": pixels(4, 12, 12, 3) / 250},
            r"bytes within .*, test images of floats within \[0, 1.02\]",
        ),
        (
            {"x_train": pixels(10, 12, 12, 3) / 255, "x_test": pixels(4, 12, 12, 3) / 250},
            r"training images within \[0, 1\], test images within \[0, 1.02\]; scale them alike",
        ),
        ({"x_train": None}, "x_train missing, found y_train, x_test, y_test"),
        ({"y_test": None}, "y_test missing"),
        (
            {"x_train": np.array([{}] * 10)},
            "not a readable .npz file.*allow_pickle.*; save its arrays as numbers",
        ),
        (
            {"y_train": np.arange(10), "x_test": None, "y_test": None},
            "has no test set, and only 10 images .* too few to hold out 0.2 of each; .* images, or",
        ),
    ],
)
def test_npz_mistakes(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message):
        load(save(tmp_path, **arrays))


def test_damaged_npz(tmp_path):
    path = Path(save(tmp_path))
    content = path.read_bytes()
    for damaged in (content[:-200], b"", b"not a zip at all", content[:1000] + b"x" * 100 + content[1100:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"set\.npz: not a readable \.npz file"):
            load(str(path))
