"""An image set in memory, and what a name or a path stands for."""

import dataclasses
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from allocations import allocated_at_most
from commands import npz
from conftest import digits_problem, labels_of, pixels
from hypothesis import given, settings
from hypothesis import strategies as st

from mim4dd import augment, data
from mim4dd.data import ImageSet, image_set, load, measure, named
from mim4dd.data.whitening import Whitening
from mim4dd.errors import InputError

SEEDS = st.integers(0, 2**31)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_set(*counts: int, size: int = 8, channels: int = 3) -> ImageSet:
    labels = torch.from_numpy(labels_of(*counts))
    images = torch.from_numpy(pixels(len(labels), channels, size, size))
    names = tuple(f"class {i}" for i in range(len(counts)))
    return ImageSet(images, labels, names, torch.rand(channels), torch.rand(channels) + 0.1)


def test_properties():
    images = make_set(2, 3, size=9, channels=5)
    assert len(images) == 5
    assert (images.num_classes, images.channels, images.image_size) == (2, 5, (9, 9))
    assert images.to("cpu").class_names == images.class_names
    assert images.to("meta").whitening is None
    meta = images.whitened(Whitening.fit(images.images)).to("meta")
    tensors = meta.images, meta.labels, meta.mean, meta.std, meta.whitening.mean, meta.whitening.matrix
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.zeros(5, 3, 8)},
            r"images is torch.float32 \[5, 3, 8\], expected uint8 or float32 \[N",
        ),
        (
            {"images": torch.zeros(5, 3, 8, 8).double()},
            r"images is torch.float64 .*, expected uint8 or float32",
        ),
        (
            {"labels": torch.zeros(4).long()},
            r"labels is torch.int64 \[4\], expected int64 \[5\], one per image",
        ),
        ({"labels": torch.zeros(5)}, r"labels is torch.float32 \[5\], expected int64"),
        ({"labels": torch.arange(5)}, "a label 2, expected 0 to 1: class_names names 2 classes"),
        ({"labels": torch.arange(5) - 4}, "a label -4, expected 0 to 1"),
        ({"mean": torch.rand(8)}, r"mean is torch.float32 \[8\], expected float32 \[3\], one per channel"),
        ({"std": torch.rand(3).double()}, "std is torch.float64"),
        ({"mean": torch.tensor([0.1, 126, 0.1])}, "expected that of pixels in .*; scale float images"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=f"mim4dd.ImageSet: .*{message}"):
        dataclasses.replace(make_set(2, 3), **change)


def test_sets_problems_and_parameters_can_be_compared_and_hashed():
    params = augment.sample("color", 2, 8, generator=seeded(), mode="all")
    pairs = (make_set(2, 3), make_set(2, 3)), (params, augment.AugmentParams.identity(2))
    problem, _ = digits_problem()
    for value, other in (*pairs, (problem, dataclasses.replace(problem, labels=problem.labels.clone()))):
        assert value == value
        assert value != other
        assert len({value, value}) == 1


def test_batch_is_normalised_and_keeps_leading_shape():
    images = make_set(4, 5)
    index = torch.tensor([[0, 8, 3], [3, 3, 1]])
    batch = images.batch(index)
    expected = (images.images[index].double() / 255 - images.mean[:, None, None]) / images.std[:, None, None]
    assert batch.dtype == torch.float32
    assert batch.shape == (2, 3, 3, 8, 8)
    torch.testing.assert_close(batch.double(), expected, atol=1e-5, rtol=1e-5)
    assert images.batch(torch.tensor(2)).shape == (3, 8, 8)
    assert images.batch(torch.empty(0, dtype=torch.long)).shape == (0, 3, 8, 8)
    assert images.images.dtype == torch.uint8


def test_batch_of_floats_is_not_divided_again():
    images = make_set(3, 3)
    floats = ImageSet(images.images.float() / 255, images.labels, images.class_names, images.mean, images.std)
    torch.testing.assert_close(floats.batch(torch.arange(6)), images.batch(torch.arange(6)))


def test_augmented_is_the_batch_augmented():
    stored = ImageSet(
        torch.from_numpy(pixels(6, 3, 9, 8)),
        torch.zeros(6, dtype=torch.int64),
        ("a",),
        torch.tensor([0.5, 0.4, 0.3]),
        torch.tensor([0.2, 0.3, 0.4]),
    )
    params = augment.sample(augment.DSA, 2, (9, 8), generator=seeded(), mode="all")
    index, rows = torch.tensor([[5, 0, 3], [1, 1, 2]]), torch.tensor([[0, 0, 0], [1, 1, 1]])
    floats = dataclasses.replace(stored, images=stored.images / 255)
    expected = augment.apply(stored.batch(index).flatten(0, 1), params, rows=rows.flatten())
    for images in (stored, floats):
        result = images.augmented(index, params, rows)
        torch.testing.assert_close(result, expected.unflatten(0, (2, 3)), atol=1e-5, rtol=1e-5)
    one_each = augment.sample("crop", 4, (9, 8), generator=seeded())
    expected = augment.apply(stored.batch(torch.arange(4)), one_each)
    torch.testing.assert_close(stored.augmented(torch.arange(4), one_each), expected, atol=1e-5, rtol=1e-5)


# By a key for each place of a table, and by one for each image, as where a class is far larger than the rest.
uneven = pytest.mark.parametrize("uneven", [image_set.UNEVEN, 0])


@uneven
@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 12), max_size=6, min_size=1), per_class=st.integers(1, 30), seed=SEEDS)
def test_sample_draws_evenly_from_the_right_class(uneven, counts, per_class, seed):
    with patch.object(image_set, "UNEVEN", uneven):
        check_sample(counts, per_class, seed)


def check_sample(counts, per_class, seed):
    images = make_set(*counts, size=8, channels=1)
    index = images.sample(per_class, seeded(seed))
    assert index.shape == (len(counts), per_class)
    assert index.dtype == torch.int64
    assert (images.labels[index] == torch.arange(len(counts))[:, None]).all()
    for row, count in zip(index, counts, strict=True):
        drawn = torch.bincount(row, minlength=len(images))[images.labels == images.labels[row[0]]]
        assert drawn.max() - drawn.min() <= 1
        assert (drawn > 0).sum() == min(count, per_class)


@uneven
def test_sample_is_random_uniform_and_reproducible(uneven, monkeypatch):
    monkeypatch.setattr(image_set, "UNEVEN", uneven)
    images = make_set(6, 20)
    assert torch.equal(images.sample(4, seeded(1)), images.sample(4, seeded(1)))
    assert not torch.equal(images.sample(4, seeded(1)), images.sample(4, seeded(2)))
    generator = seeded(3)
    drawn = torch.cat([images.sample(3, generator).flatten() for _ in range(2000)])
    frequency = torch.bincount(drawn, minlength=26) / 2000
    expected = 3 / torch.bincount(images.labels)[images.labels]
    assert (frequency - expected).abs().max() < 0.06
    first = torch.bincount(torch.stack([images.sample(9, generator)[0, 6] for _ in range(300)]), minlength=26)
    assert (first > 0).sum() == 6  # the cycle starts anew with a fresh permutation


def test_sample_from_an_empty_class():
    images = make_set(2, 0, 2)
    with pytest.raises(InputError, match="'class 1' has no image"):
        images.sample(1, seeded())


def test_a_large_class_does_not_make_the_others_slow():
    counts = torch.tensor([100_000, *[10] * 999])
    labels = torch.arange(1000).repeat_interleave(counts)
    images = ImageSet(
        torch.zeros(len(labels), 1, 1, 1), labels, tuple(map(str, range(1000))), *torch.eye(2, 1)
    )
    images.sample(20, seeded())  # finds the members of each class
    assert allocated_at_most(lambda: images.sample(20, seeded()), "cpu") < 50 * len(labels)
    assert allocated_at_most(lambda: images.split(0.2, seeded()), "cpu") < 4 * 1000 * 100_000


@uneven
@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=6), fraction=st.floats(0.01, 0.99), seed=SEEDS
)
def test_split_is_stratified(uneven, counts, fraction, seed):
    with patch.object(image_set, "UNEVEN", uneven):
        check_split(counts, fraction, seed)


def check_split(counts, fraction, seed):
    images = make_set(*counts, channels=1)
    held = [min(round((n * torch.tensor(fraction)).item()), n - 1) for n in counts]  # in float32, as there
    if not any(held):
        with pytest.raises(InputError, match="too few"):
            images.split(fraction, seeded(seed))
        return
    rest, held_out = images.split(fraction, seeded(seed))
    assert torch.bincount(held_out.labels, minlength=len(counts)).tolist() == held
    assert torch.bincount(rest.labels, minlength=len(counts)).min() >= 1
    together = torch.cat([rest.images, held_out.images]).flatten(1).tolist()
    assert sorted(together) == sorted(images.images.flatten(1).tolist())  # disjoint, and covers the set
    assert rest.class_names == held_out.class_names == images.class_names


def test_split_keeps_image_and_label_together_and_is_reproducible():
    images = make_set(10, 30)
    label = {tuple(x.flatten().tolist()): int(y) for x, y in zip(images.images, images.labels, strict=True)}
    rest, held_out = images.split(0.3, seeded(5))
    position = {tuple(x.flatten().tolist()): i for i, x in enumerate(images.images)}
    for part in (rest, held_out):
        order = [position[tuple(x.flatten().tolist())] for x in part.images]
        assert order == sorted(order)
        assert all(
            label[tuple(x.flatten().tolist())] == y for x, y in zip(part.images, part.labels, strict=True)
        )
    assert torch.equal(images.split(0.3, seeded(5))[1].images, held_out.images)
    assert not torch.equal(images.split(0.3, seeded(6))[1].images, held_out.images)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 20])
def test_split_fraction(fraction):
    with pytest.raises(InputError, match="between 0 and 1"):
        make_set(3, 3).split(fraction, seeded())


def test_unknown_name_and_missing_path(tmp_path):
    with pytest.raises(
        InputError, match="unknown data set 'fashon-mnist', did you mean fashion-mnist.*Expected.*svhn"
    ):
        load("fashon-mnist")
    with pytest.raises(InputError, match="unknown data set 'zzz'. Expected one of digits"):
        load("zzz")
    for missing in (f"{tmp_path}/no", "no.npz", "no.parquet"):
        with pytest.raises(InputError, match="no such file or folder"):
            load(missing)
    (tmp_path / "a.csv").touch()
    with pytest.raises(InputError, match=r"a\.csv: expected a folder of pictures, or a file ending in \.npz"):
        load(str(tmp_path / "a.csv"))


def test_a_path_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    npz(tmp_path / "set.npz")
    train, _ = load("~/set.npz")
    assert train.image_size == (12, 12)
    assert data.name_of("~/set.npz") == "set"


def test_a_dot_in_the_name_of_a_folder_starts_no_suffix(tmp_path):
    (tmp_path / "set-1.5").mkdir()
    (tmp_path / "set-1.5.npz").touch()
    assert data.name_of(str(tmp_path / "set-1.5")) == data.name_of(str(tmp_path / "set-1.5.npz")) == "set-1.5"


def test_fingerprint_tells_everything_apart():
    images = make_set(4, 5)
    others = [
        dataclasses.replace(images, **{name: getattr(images, name).flip(0)})
        for name in ("images", "labels", "mean", "std")
    ]
    assert len({one.fingerprint for one in (images, *others)}) == 5
    assert dataclasses.replace(images).fingerprint == images.fingerprint


def test_every_name_is_known():
    assert data.NAMES[0] == "digits"
    assert {"mnist", "fashion-mnist", "kmnist", "cifar10", "cifar100", "svhn"} <= set(data.NAMES)
    for entry in named.SETS.values():
        assert len(entry.mean) == len(entry.std)
        assert all(len(file.md5) in (0, 32) for file in entry.files)


def test_import_needs_only_torch_and_numpy():
    heavy = "{'PIL', 'pyarrow', 'rich', 'sklearn', 'torchvision'}"  # torch itself may import scipy
    code = f"import sys, mim4dd.data; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_large_images_are_taken_in_small_parts(monkeypatch):
    monkeypatch.setattr(data.pixels, "CHUNK_PIXELS", 100)
    images = torch.rand(7, 3, 4, 4)
    assert [len(part) for part in data.pixels.chunks(images)] == [2, 2, 2, 1]
    assert [len(part) for part in data.pixels.chunks(torch.rand(2, 3, 8, 8))] == [1, 1]
    assert all(found.device.type == "meta" for found in measure(images.to("meta")))
    for found, expected in zip(measure(images), (images.mean((0, 2, 3)), images.std((0, 2, 3))), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-5)
