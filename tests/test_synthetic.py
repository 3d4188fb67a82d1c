import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import close
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mim4dd.data import ImageSet, load
from mim4dd.data.clusters import image_for_each, kmeans_centres, members
from mim4dd.data.whitening import Whitening
from mim4dd.errors import InputError
from mim4dd.seeding import generator
from mim4dd.synthetic import SyntheticSet, decode, encode, initialise


@pytest.fixture(scope="module")
def digits():
    return load("digits")[0]


def test_round_trip(tmp_path, digits):
    start = initialise(digits, 2, "real", generator(0, "init"))
    written = SyntheticSet(
        start.images,
        start.labels,
        start.class_names,
        start.mean,
        start.std,
        {"seed": 3, "config": {"a": [1]}, "factor": "of the user", "metadata": 1},
        factor=2,
        soft_labels=torch.rand(80, 10),
        network_lr=0.02,
    )
    written.save(tmp_path / "set.safetensors")
    read = SyntheticSet.load(tmp_path / "set.safetensors")
    for name in ("images", "labels", "mean", "std", "soft_labels"):
        assert torch.equal(getattr(read, name), getattr(written, name))
    assert read.class_names == digits.class_names
    assert read.metadata == written.metadata
    assert (read.factor, read.network_lr) == (2, 0.02)


def test_a_file_with_metadata_among_its_own_facts_is_read(tmp_path, digits):
    whole, path = tmp_path / "set.safetensors", tmp_path / "older.safetensors"
    initialise(digits, 1, "real", generator(0, "init")).save(whole)
    facts = {"dataset": "digits", "config": {}, "class_names": "0123456789", "factor": 1, "network_lr": 0.5}
    header = {"format": "mim4dd-synthetic-1", "facts": json.dumps(facts)}
    save_file(load_file(whole), path, header)
    read = SyntheticSet.load(path)
    assert read.metadata == {"dataset": "digits", "config": {}}
    assert (read.class_names, read.factor, read.network_lr) == (digits.class_names, 1, 0.5)


@pytest.mark.parametrize("as_bytes", [True, False])
@pytest.mark.parametrize("whiten", [True, False])
def test_real_images_are_normalised_as_the_set_is(digits, whiten, as_bytes):
    pixels = digits.images if as_bytes else digits.images / 255
    real = replace(digits, images=pixels)
    real = real.whitened(Whitening.fit(pixels)) if whiten else real
    start = initialise(real, 1, "real", generator(0, "init"))
    close(start.normalise(pixels), real.batch(torch.arange(len(real))), 1e-5)
    close(start.normalise(start.pixels), start.images, 1e-4)


@pytest.mark.parametrize("views", [lambda m: (m[0], m), lambda m: (torch.zeros(64), m.T)])
def test_whitening_of_views_is_saved(tmp_path, digits, views):
    mean, matrix = views(torch.rand(64, 64))
    start = initialise(digits, 1, "real", generator(0, "init"))
    replace(start, whitening=Whitening(mean, matrix)).save(tmp_path / "set.safetensors")
    read = SyntheticSet.load(tmp_path / "set.safetensors").whitening
    assert torch.equal(read.mean, mean)
    assert torch.equal(read.matrix, matrix)


def test_a_whitening_of_impossible_numbers_is_refused(tmp_path, digits):
    start = initialise(digits, 1, "real", generator(0, "init"))
    broken = Whitening(torch.zeros(64), torch.full((64, 64), torch.nan))
    replace(start, whitening=broken).save(tmp_path / "set.safetensors")
    with pytest.raises(InputError, match="whitening.matrix holds NaN, infinite or impossible values"):
        SyntheticSet.load(tmp_path / "set.safetensors")


def test_one_tensor_for_mean_and_std_and_scalars_of_numpy_and_torch_are_saved(tmp_path, digits):
    half = torch.full((1,), 0.5)
    start = initialise(digits, 1, "real", generator(0, "init"))
    written = replace(
        start,
        mean=half,
        std=half,
        network_lr=np.float32(0.25),
        class_names=tuple(np.arange(10)),
        factor=np.int64(1),
        metadata={"best": torch.tensor(0.5), "data": np.str_("digits")},
    )
    written.save(tmp_path / "set.safetensors")
    read = SyntheticSet.load(tmp_path / "set.safetensors")
    assert read.mean.item() == read.std.item() == 0.5
    assert (read.network_lr, read.class_names, read.factor) == (0.25, tuple(range(10)), 1)
    assert read.metadata == {"best": 0.5, "data": "digits"}
    with pytest.raises(TypeError, match=r"mim4dd.SyntheticSet: .*Path.* cannot be written as JSON; expected"):
        replace(start, metadata={"from": tmp_path}).save(tmp_path / "other.safetensors")


def test_a_folder_stands_for_the_set_in_it(tmp_path, digits):
    with pytest.raises(InputError, match=r"synthetic\.safetensors: no such file"):
        SyntheticSet.load(tmp_path)
    start = initialise(digits, 1, "real", generator(0, "init"))
    start.save(tmp_path / "synthetic.safetensors")
    for path in (tmp_path, str(tmp_path)):
        assert torch.equal(SyntheticSet.load(path).images, start.images)


def test_a_save_that_fails_leaves_the_old_set(tmp_path, digits, monkeypatch):
    path = tmp_path / "set.safetensors"
    start = initialise(digits, 2, "real", generator(0, "init"))
    start.save(path)

    def half(tensors, file, metadata):
        file.write_bytes(b"garbage")
        raise OSError("disk full")

    monkeypatch.setattr("mim4dd.synthetic.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        initialise(digits, 2, "noise", generator(0, "init")).save(path)
    assert torch.equal(SyntheticSet.load(path).images, start.images)
    assert list(tmp_path.iterdir()) == [path]


def test_soft_labels_that_do_not_fit_are_refused(tmp_path, digits):
    start = initialise(digits, 2, "real", generator(0, "init"))
    with pytest.raises(ValueError, match=r"soft labels \[20, 9\], expected \[20, 10\]"):
        replace(start, soft_labels=torch.rand(20, 9))
    replace(start, soft_labels=torch.rand(20, 10)).save(tmp_path / "set.safetensors")
    tensors, path = load_file(tmp_path / "set.safetensors"), tmp_path / "cut.safetensors"
    with safe_open(tmp_path / "set.safetensors", "pt") as file:
        save_file({**tensors, "soft_labels": torch.rand(20, 9)}, path, file.metadata())
    with pytest.raises(InputError, match=r"cut.safetensors: .*soft labels \[20, 9\], expected \[20, 10\]"):
        SyntheticSet.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: {"labels": labels[1:]}, r"labels are \[19\], expected \[20\]: one per image"),
        (lambda images, labels: {"labels": labels[:, None]}, r"labels are \[20, 1\], expected \[20\]"),
        (
            lambda images, labels: {"images": images[:, 0]},
            r"images are \[20, 8, 8\], expected \[n, C, H, W\]",
        ),
        (
            lambda images, labels: {"labels": labels + 1},
            "label 10, expected 0 to 9: class_names names 10 classes",
        ),
        (lambda images, labels: {"labels": labels - 1}, "label -1, expected 0 to 9"),
        (
            lambda images, labels: {"images": images.double()},
            "images are torch.float64, expected torch.float32",
        ),
        (lambda images, labels: {"labels": labels.int()}, "labels are torch.int32, expected torch.int64"),
        (
            lambda images, labels: {"soft_labels": torch.eye(10).int()[labels]},
            "soft_labels are torch.int32, expected torch.float32",
        ),
        (
            lambda images, labels: {"mean": torch.zeros(3)},
            r"mean is torch.float32 \[3\], expected floats \[1\]",
        ),
        (
            lambda images, labels: {"std": torch.tensor(1.0)},
            r"std is torch.float32 \[\], expected floats \[1\]",
        ),
        (
            lambda images, labels: {"std": torch.ones(1).int()},
            r"std is torch.int32 \[1\], expected floats \[1\]",
        ),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(tmp_path, digits, change, message):
    start = initialise(digits, 2, "real", generator(0, "init"))
    wrong = {name: value.contiguous() for name, value in change(start.images, start.labels).items()}
    with pytest.raises(ValueError, match=f"mim4dd.SyntheticSet: .*{message}"):
        replace(start, **wrong)
    whole, path = tmp_path / "set.safetensors", tmp_path / "wrong.safetensors"
    start.save(whole)
    with safe_open(whole, "pt") as file:
        save_file({**load_file(whole), **wrong}, path, file.metadata())
    with pytest.raises(InputError, match=f"wrong.safetensors: not a readable synthetic set .*{message}"):
        SyntheticSet.load(path)


def test_images_that_the_factor_does_not_divide_are_refused(digits):
    start = initialise(digits, 2, "real", generator(0, "init"))
    with pytest.raises(ValueError, match=r"images \[20, 1, 8, 8\] cannot hold 3 x 3 others"):
        replace(start, factor=3)
    for factor in (0, -1):
        with pytest.raises(ValueError, match=f"factor is {factor}, expected at least 1"):
            replace(start, factor=factor)


def test_dataset_trains_as_it_is(digits):
    dataset = initialise(digits, 2, "real", generator(0, "init")).dataset()
    images, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=20)))
    assert images.shape == (20, 1, 8, 8)
    assert torch.equal(labels, torch.arange(10).repeat_interleave(2))


@pytest.mark.parametrize("how", ["real", "kmeans", "noise"])
def test_start_is_class_by_class_and_reproducible(digits, how):
    first, second = (initialise(digits, 3, how, generator(1, "init")) for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.images, initialise(digits, 3, how, generator(2, "init")).images)
    assert torch.equal(first.labels, torch.arange(10).repeat_interleave(3))
    assert first.images.shape == (30, 1, 8, 8)


def nearest_to_centres(real, ipc, random):
    return image_for_each(kmeans_centres(real, ipc, random), real, members(real))


@pytest.mark.parametrize("select", [ImageSet.sample, nearest_to_centres])
def test_selected_images_are_real_of_their_class_and_distinct(digits, select):
    index = select(digits, 5, generator(0, "select"))
    assert torch.equal(digits.labels[index], torch.arange(10)[:, None].expand(10, 5))
    assert len(index.unique()) == 50


def test_kmeans_images_lie_nearer_to_their_class_than_random_ones(digits):
    def distance_to_nearest(index):
        return sum(
            torch.cdist(
                digits.batch(torch.where(digits.labels == c)[0]).flatten(1), digits.batch(i).flatten(1)
            )
            .min(1)
            .values.square()
            .sum()
            .item()
            for c, i in enumerate(index)
        )

    kmeans = distance_to_nearest(nearest_to_centres(digits, 5, generator(0, "select")))
    random = [distance_to_nearest(digits.sample(5, generator(k, "select"))) for k in range(5)]
    assert kmeans < min(random)


def test_kmeans_with_as_many_centres_as_images_takes_each_once(digits):
    import dataclasses

    index = torch.cat([torch.where(digits.labels == c)[0][:4] for c in range(10)])
    few = dataclasses.replace(digits, images=digits.images[index], labels=digits.labels[index])
    chosen = nearest_to_centres(few, 4, generator(0, "select"))
    assert torch.equal(chosen.flatten().sort().values, torch.arange(40))


def test_pixels_are_the_original_colours(digits):
    index = digits.sample(1, generator(0, "init"))
    synthetic = initialise(digits, 1, "real", generator(0, "init"))
    close(synthetic.pixels, digits.images[index.flatten()] / 255, tolerance=1e-5)


@pytest.mark.parametrize("how", ["real", "kmeans", "noise"])
def test_too_few_images_are_refused(digits, how):
    with pytest.raises(InputError, match=r"class '\d' has \d+ training images, fewer than the 1000 asked"):
        initialise(digits, 1000, how, generator(0, "init"))


def test_foreign_and_corrupted_files_are_refused(tmp_path, digits):
    with pytest.raises(InputError, match="no such file"):
        SyntheticSet.load(tmp_path / "missing.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(InputError, match="expected a synthetic set written by mim4dd"):
        SyntheticSet.load(foreign)
    whole = tmp_path / "whole.safetensors"
    initialise(digits, 1, "real", generator(0, "init")).save(whole)
    for length in (0, 5, 100, whole.stat().st_size - 7):
        (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:length])
        with pytest.raises(InputError, match=r"cut\.safetensors: not a readable synthetic set"):
            SyntheticSet.load(tmp_path / "cut.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_text("hello, this is not a synthetic set at all")
    with pytest.raises(InputError, match="not a readable synthetic set"):
        SyntheticSet.load(text)


@pytest.mark.parametrize(
    ("name", "value"), [("images", torch.nan), ("mean", torch.inf), ("std", 0.0), ("soft_labels", torch.nan)]
)
def test_a_set_of_impossible_numbers_is_refused(tmp_path, digits, name, value):
    start = replace(
        initialise(digits, 1, "real", generator(0, "init")), soft_labels=torch.full((10, 10), 0.1)
    )
    wrong = getattr(start, name).clone()
    wrong.view(-1)[0] = value
    replace(start, **{name: wrong}).save(tmp_path / "set.safetensors")
    with pytest.raises(InputError, match=rf"set\.safetensors: {name} holds NaN, infinite or impossible"):
        SyntheticSet.load(tmp_path / "set.safetensors")


def test_saving_into_a_folder_that_is_not_there_names_it(tmp_path, digits):
    start = initialise(digits, 1, "real", generator(0, "init"))
    with pytest.raises(FileNotFoundError, match="No such folder: '.*nowhere'"):
        start.save(tmp_path / "nowhere" / "set.safetensors")


def test_decode_enlarges_the_quarters_of_an_image():
    x = torch.randn(2, 3, 8, 8, generator=generator(0, "x"))
    decoded = decode(x, 2)
    assert decoded.shape == (8, 3, 8, 8)
    for n in range(2):
        for row in range(2):
            for column in range(2):
                quarter = x[n : n + 1, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                expected = torch.nn.functional.interpolate(quarter, scale_factor=2, mode="bilinear")[0]
                torch.testing.assert_close(decoded[4 * n + 2 * row + column], expected)
    assert decode(x, 1) is x


def test_encode_averages_the_pixels_of_every_tile():
    x = torch.randn(4, 3, 8, 8, generator=generator(0, "x"))
    (encoded,) = encode(x, 2)
    for k, small in enumerate(x.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))):
        row, column = 4 * (k // 2), 4 * (k % 2)
        torch.testing.assert_close(encoded[:, row : row + 4, column : column + 4], small)


def test_encode_is_undone_by_decode_up_to_what_is_lost():
    """Tiles keep their place: constant images survive exactly."""
    levels = torch.arange(2 * 9.0)
    x = levels[:, None, None, None].expand(18, 3, 6, 6)
    encoded = encode(x, 3)
    assert encoded.shape == (2, 3, 6, 6)
    torch.testing.assert_close(decode(encoded, 3), x.contiguous())


def test_start_with_a_factor_is_made_of_more_real_images(digits):
    start = initialise(digits, 2, "real", generator(1, "init"), factor=2)
    index = digits.sample(8, generator(1, "init"))
    torch.testing.assert_close(start.images, encode(digits.batch(index.flatten()), 2))
    assert len(start) == 20
    assert start.decoded.shape == (80, 1, 8, 8)
    assert torch.equal(start.targets, torch.arange(10).repeat_interleave(8))
    with pytest.raises(InputError, match="--factor 3 does not divide images of 8x8"):
        initialise(digits, 2, "real", generator(1, "init"), factor=3)
    with pytest.raises(InputError, match="fewer than the 1600 asked for"):
        initialise(digits, 100, "real", generator(1, "init"), factor=4)
