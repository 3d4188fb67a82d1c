import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mim4dd import augment, data, named
from mim4dd.data import ImageSet, load
from mim4dd.errors import InputError

IDX_STEMS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def labels_of(*counts: int) -> np.ndarray:
    return np.random.default_rng(7).permutation(np.repeat(np.arange(len(counts)), counts))


def make_set(*counts: int, size: int = 8, channels: int = 3) -> ImageSet:
    labels = torch.from_numpy(labels_of(*counts))
    images = torch.from_numpy(pixels(len(labels), channels, size, size))
    names = tuple(f"class {i}" for i in range(len(counts)))
    return ImageSet(images, labels, names, torch.rand(channels), torch.rand(channels) + 0.1)


# ----------------------------------------------------------------------------------------- ImageSet


def test_properties():
    images = make_set(2, 3, size=9, channels=5)
    assert len(images) == 5
    assert (images.num_classes, images.channels, images.image_size) == (2, 5, (9, 9))
    assert images.to("cpu").class_names == images.class_names
    meta = images.to("meta")
    assert {t.device.type for t in (meta.images, meta.labels, meta.mean, meta.std)} == {"meta"}


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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 30), st.integers(0, 2**31))
def test_sample_draws_evenly_from_the_right_class(counts, per_class, seed):
    images = make_set(*counts, size=8, channels=1)
    index = images.sample(per_class, seeded(seed))
    assert index.shape == (len(counts), per_class)
    assert index.dtype == torch.int64
    assert (images.labels[index] == torch.arange(len(counts))[:, None]).all()
    for row, count in zip(index, counts, strict=True):
        drawn = torch.bincount(row, minlength=len(images))[images.labels == images.labels[row[0]]]
        assert drawn.max() - drawn.min() <= 1
        assert (drawn > 0).sum() == min(count, per_class)


def test_sample_is_random_uniform_and_reproducible():
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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_split_is_stratified(counts, fraction, seed):
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


# --------------------------------------------------------------------------------------- named sets


def test_digits():
    train, test = load("digits")
    assert len(train) + len(test) == 1797
    assert len(test) == pytest.approx(0.2 * 1797, abs=5)
    assert train.images.dtype == torch.uint8
    assert train.images.max() == 255
    assert (train.channels, train.image_size, train.class_names) == (1, (8, 8), tuple("0123456789"))
    batch = train.batch(torch.arange(len(train)))
    assert abs(batch.mean()) < 1e-4
    assert batch.std() == pytest.approx(1, abs=1e-3)
    assert torch.equal(test.images, load("digits")[1].images)


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, zipped: bool = True) -> tuple[np.ndarray, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = (pixels(30, 28, 28), labels_of(*[3] * 10), pixels(10, 28, 28, seed=1), np.arange(10))
    for stem, array in zip(IDX_STEMS, arrays, strict=True):
        content = idx(array.astype(np.uint8))
        (folder / f"{stem}-ubyte{'.gz' if zipped else ''}").write_bytes(
            gzip.compress(content) if zipped else content
        )
    return arrays


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("sub", ["", "kmnist"])
def test_idx(tmp_path, zipped, sub):
    images, labels, test_images, test_labels = write_idx(tmp_path / sub, zipped)
    train, test = load("kmnist", tmp_path)
    assert np.array_equal(train.images[:, 0], images)
    assert np.array_equal(train.labels, labels)
    assert np.array_equal(test.images[:, 0], test_images)
    assert np.array_equal(test.labels, test_labels)
    assert train.class_names[3] == "tsu"
    assert train.mean.item() == pytest.approx(images.mean() / 255, abs=1e-6)
    assert train.std.item() == pytest.approx(images.std() / 255, abs=1e-6)


def test_published_constants(tmp_path):
    write_idx(tmp_path)
    train, test = load("fashion-mnist", tmp_path)
    assert train.mean.tolist() == test.mean.tolist() == pytest.approx([0.2861])
    assert train.std.tolist() == pytest.approx([0.3530])
    assert train.class_names[:2] == ("T-shirt/top", "Trouser")
    assert len(train.class_names) == 10


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: gzip.compress(c)[:-100], "train-images.*not a readable idx file"),
        (lambda c: gzip.compress(c[:-1]), r"train-images.*\[30, 28, 28\] bytes but 23519 follow"),
        (lambda c: c + b"0", "23521 follow"),
        (lambda c: b"\0\0\x0d\3" + c[4:], "not an idx file of uint8 with 3"),
        (lambda c: c[:10], "announces"),
        (lambda c: b"", "not an idx file"),
    ],
)
def test_damaged_idx(tmp_path, damage, message):
    images, *_ = write_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(damage(idx(images)))
    with pytest.raises(InputError, match=message):
        load("mnist", tmp_path)


def test_missing_named_files(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError) as caught:
        load("mnist", tmp_path)
    text = str(caught.value)
    assert "t10k-labels-idx1-ubyte.gz not found" in text
    assert f"{tmp_path} or {tmp_path / 'mnist'}" in text
    assert "https://" in text
    assert "--data-dir" in text
    assert "train-images" not in text


class Python2Pickler(pickle._Pickler):
    """Writes text the way Python 2 did, as the published CIFAR files have it."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_text(self, value):
        content = value.encode() if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text


def python2(value) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")


def cifar_files(classes: int, dump=python2) -> dict[str, bytes]:
    names = [f"name{i}" for i in range(classes)]
    if classes == 100:
        return {
            "train": dump(
                {"data": pixels(200, 3072), "fine_labels": list(range(100)) * 2, "coarse_labels": [0] * 200}
            ),
            "test": dump(
                {"data": pixels(5, 3072), "fine_labels": [99, 1, 2, 3, 4], "coarse_labels": [0] * 5}
            ),
            "meta": dump({"fine_label_names": names, "coarse_label_names": ["x"]}),
        }
    batch = {"data": pixels(4, 3072), "labels": [1, 3, 5, 7]}
    odd = {"data": pixels(6, 3072, seed=2), "labels": [0, 2, 4, 6, 8, 9]}
    files = {f"data_batch_{i}": dump(batch) for i in range(1, 5)}
    return files | {
        "data_batch_5": dump(odd),
        "test_batch": dump(odd),
        "batches.meta": dump({"label_names": names}),
    }


def write_tar(path: Path, files: dict[str, bytes], folder: str = "cifar-10-batches-py") -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def check_cifar10(data_dir: Path) -> None:
    train, test = load("cifar10", data_dir)
    assert np.array_equal(train.images[:4].flatten(1), pixels(4, 3072))
    assert train.labels.tolist() == [1, 3, 5, 7] * 4 + [0, 2, 4, 6, 8, 9]
    assert np.array_equal(test.images.flatten(1), pixels(6, 3072, seed=2))
    assert (train.channels, train.image_size, train.num_classes) == (3, (32, 32), 10)
    assert train.class_names[9] == "name9"
    assert train.std.tolist() == pytest.approx([0.2023, 0.1994, 0.2010])


@pytest.mark.parametrize("dump", [python2, functools.partial(pickle.dumps, protocol=4)])
def test_cifar10(tmp_path, dump):
    files = cifar_files(10, dump)
    write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    check_cifar10(tmp_path)
    write_files(tmp_path / "extracted" / "cifar-10-batches-py", files)
    check_cifar10(tmp_path / "extracted")
    check_cifar10(tmp_path / "extracted" / "cifar-10-batches-py")


def test_cifar10_binary(tmp_path):
    def records(labels, images):
        return np.concatenate([np.array(labels, np.uint8)[:, None], images], axis=1).tobytes()

    files = {f"data_batch_{i}.bin": records([1, 3, 5, 7], pixels(4, 3072)) for i in range(1, 5)}
    odd = records([0, 2, 4, 6, 8, 9], pixels(6, 3072, seed=2))
    files |= {"data_batch_5.bin": odd, "test_batch.bin": odd}
    files["batches.meta.txt"] = "\n".join(f"name{i}" for i in range(10)).encode() + b"\n\n"
    write_tar(tmp_path / "cifar-10-binary.tar.gz", files, "cifar-10-batches-bin")
    check_cifar10(tmp_path)
    write_files(tmp_path / "a" / "cifar-10-batches-bin", files)
    check_cifar10(tmp_path / "a")
    (tmp_path / "a/cifar-10-batches-bin/data_batch_2.bin").write_bytes(odd[:-1])
    with pytest.raises(InputError, match=r"data_batch_2\.bin: not a readable CIFAR batch"):
        load("cifar10", tmp_path / "a")


@pytest.mark.parametrize("binary", [False, True])
def test_cifar100(tmp_path, binary):
    if binary:
        labels = np.stack([np.zeros(200), np.arange(200) % 100], axis=1).astype(np.uint8)
        train = np.concatenate([labels, pixels(200, 3072)], axis=1).tobytes()
        names = "\n".join(f"name{i}" for i in range(100)).encode()
        files = {"train.bin": train, "test.bin": train[-3074:], "fine_label_names.txt": names}
        write_files(tmp_path / "cifar-100-binary", files)
    else:
        write_tar(tmp_path / "cifar-100-python.tar.gz", cifar_files(100), "cifar-100-python")
    train, test = load("cifar100", tmp_path)
    assert np.array_equal(train.images.flatten(1), pixels(200, 3072))
    assert train.labels.tolist() == list(range(100)) * 2
    assert test.labels[0] == 99
    assert train.class_names == tuple(f"name{i}" for i in range(100))


def test_damaged_cifar(tmp_path):
    archive = tmp_path / "cifar-10-python.tar.gz"
    files = cifar_files(10)
    write_tar(archive, files)
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"cifar-10-python\.tar\.gz: not a readable tar archive"):
        load("cifar10", tmp_path)
    write_tar(archive, files | {"data_batch_3": files["data_batch_3"][:-500]})
    with pytest.raises(InputError, match="data_batch_3: not a readable CIFAR batch"):
        load("cifar10", tmp_path)
    del files["test_batch"]
    write_tar(archive, files)
    with pytest.raises(InputError, match="test_batch missing"):
        load("cifar10", tmp_path)


class Evil:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickle_that_runs_code_is_refused(tmp_path):
    evil = pickle.dumps({"data": Evil(tmp_path / "made"), "labels": [1]}, protocol=2)
    write_files(tmp_path / "cifar-10-batches-py", cifar_files(10) | {"data_batch_1": evil})
    with pytest.raises(InputError, match=r"mkdir, only numpy arrays are allowed"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "made").exists()


def test_svhn(tmp_path):
    from scipy.io import savemat

    images, labels = pixels(20, 3, 32, 32), np.array([*range(1, 11)] * 2)
    for name in ("train_32x32.mat", "test_32x32.mat"):
        savemat(tmp_path / name, {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None].astype(np.uint8)})
    train, _ = load("svhn", tmp_path)
    assert np.array_equal(train.images, images)
    assert train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
    assert train.mean.tolist() == pytest.approx([0.4377, 0.4438, 0.4728])
    file = tmp_path / "test_32x32.mat"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"test_32x32\.mat: not a readable \.mat file"):
        load("svhn", tmp_path)
    savemat(file, {"Z": images})
    with pytest.raises(InputError, match=r"test_32x32\.mat: not a readable"):
        load("svhn", tmp_path)


def test_tiny_imagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for name in ("n1", "n2"):
        write_pictures(root / "train" / name / "images", 3, (64, 64))
    write_pictures(root / "val" / "images", 2, (64, 64), seed=1)
    write_pictures(root / "test" / "images", 2, (64, 64), seed=2)
    (root / "val" / "val_annotations.txt").write_text("0.png\tn2\t0\t0\t1\t1\n1.png\tn1\t0\t0\t1\t1\n")
    (root / "wnids.txt").write_text("n1\nn2\n")
    train, test = load("tiny-imagenet", tmp_path)
    assert train.class_names == ("n1", "n2")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.labels.tolist() == [1, 0]
    assert np.array_equal(test.images[0].permute(1, 2, 0), picture((64, 64), seed=1))
    with pytest.raises(InputError, match=r"tiny-imagenet-200\.zip"):
        load("tiny-imagenet", tmp_path / "train")


# ----------------------------------------------------------------------------------------- fetching


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The folder that stands for the network: kmnist's addresses point to it, the cache lies in tmp_path."""
    folder = tmp_path / "served"
    write_idx(folder)
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        sums = [hashlib.md5((folder / f"{stem}-ubyte.gz").read_bytes()).hexdigest() for stem in IDX_STEMS]
        files = named._idx(f"http://127.0.0.1:{server.server_port}", *sums)
        fake = named.Named(named.SETS["kmnist"].read, files)
        monkeypatch.setitem(named.SETS, "kmnist", fake)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(named, "DEBIAN", tmp_path / "debian")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield folder
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_fetching_fills_the_cache_once(server, tmp_path):
    fetched, _ = load("kmnist")
    cache = tmp_path / "cache" / "mim4dd" / "kmnist"
    assert sorted(f.name for f in cache.iterdir()) == sorted(f"{stem}-ubyte.gz" for stem in IDX_STEMS)
    for file in server.iterdir():
        file.unlink()
    assert torch.equal(load("kmnist")[0].images, fetched.images)


def test_wrong_sum_leaves_nothing_behind(server, tmp_path):
    file = server / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes() + b"0")
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte\.gz: md5 .* expected"):
        load("kmnist")
    left = sorted(f.name for f in (tmp_path / "cache" / "mim4dd" / "kmnist").iterdir())
    assert left == sorted(f"{stem}-ubyte.gz" for stem in IDX_STEMS[:3])


def test_no_such_address(server, tmp_path):
    (server / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(
        InputError, match=r"train-images-idx3-ubyte\.gz cannot be fetched \(HTTP Error 404.*--data-dir"
    ):
        load("kmnist")
    assert not list((tmp_path / "cache" / "mim4dd" / "kmnist").iterdir())


def test_data_dir_is_never_filled_from_the_network(server, tmp_path):
    with pytest.raises(InputError, match="not found in"):
        load("kmnist", tmp_path / "empty")
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "empty").exists()


def test_debian_folder(server, tmp_path):
    images, *_ = write_idx(tmp_path / "debian" / "kmnist")
    assert np.array_equal(load("kmnist")[0].images[:, 0], images)
    assert not (tmp_path / "cache").exists()


# --------------------------------------------------------------------------------------- .npz files


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


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_train": np.linspace(0, 1, 10)}, "x_train: labels not integers but float64"),
        ({"y_train": np.arange(10) % 2 == 0}, "labels not integers but bool"),
        ({"y_test": np.array(["a", "b", "a", "b"])}, "x_test: labels not integers"),
        ({"y_train": np.arange(10) - 1}, "label -1; expected class numbers from 0"),
        ({"y_train": np.arange(10) % 2 + 1}, "class '0' has no training image"),
        ({"y_train": np.array([0, 1, 3] * 3 + [3])}, "class '2' has no training image"),
        ({"y_train": np.array([10**12] * 10)}, "class '0' has no training image"),
        ({"y_test": np.array([0, 1, 2, 0])}, "x_test: label 2, but the training labels end at 1"),
        ({"y_train": np.arange(9) % 2}, r"10 images but labels of shape \(9,\)"),
        ({"y_train": np.eye(10, dtype=int)}, r"10 images but labels of shape \(10, 10\)"),
        ({"x_train": pixels(10, 12, 16, 3)}, "expected square images"),
        ({"x_train": pixels(10, 12, 16)}, "images of 16x12; expected square"),
        ({"x_train": pixels(10, 7, 7, 3)}, "images of 7x7; expected at least 8x8"),
        ({"x_train": pixels(10, 8, 8, 8)}, "may be .N, H, W, C. or .N, C, H, W."),
        ({"x_train": pixels(10, 144)}, r"shape \(10, 144\); expected"),
        ({"x_train": pixels(10, 16, 16, 3)}, r"x_test: images \(3, 12, 12\) but \(3, 16, 16\)"),
        ({"x_train": np.full((10, 12, 12, 3), np.nan)}, "x_train: the images hold NaN or infinite"),
        ({"x_test": np.full((4, 12, 12, 3), np.inf)}, "x_test: the images hold NaN or infinite"),
        ({"x_train": pixels(0, 12, 12, 3), "y_train": np.arange(0)}, "holds no images"),
        ({"x_test": pixels(0, 12, 12, 3), "y_test": np.arange(0)}, "x_test: .* holds no images"),
        ({"x_train": pixels(10, 12, 12, 3).astype("c8")}, "images of type complex64"),
        ({"x_train": pixels(10, 12, 12, 3) / 255}, r"within \[0, 1\], test images within \[0, 255\]"),
        ({"x_train": None}, "x_train missing, found y_train, x_test, y_test"),
        ({"y_test": None}, "y_test missing"),
        ({"x_train": np.array([{}] * 10)}, "not a readable .npz file.*allow_pickle"),
        ({"y_train": np.arange(10), "x_test": None, "y_test": None}, "too few to hold out 20%"),
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


# ----------------------------------------------------------------------------------------- pictures


def picture(size: tuple[int, int], seed: int, grey: bool = False) -> np.ndarray:
    return pixels(1, *size, *(() if grey else (3,)), seed=seed)[0]


def write_pictures(folder: Path, count: int, size=(10, 10), seed: int = 0, grey: bool = False) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(picture(size, seed + i, grey)).save(folder / f"{i}.png")


def test_folder(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        write_pictures(tmp_path / split / "dog", count, seed=10)
        write_pictures(tmp_path / split / "cat", count, seed=20)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / "cat" / "._0.png").write_text("no picture")
    (tmp_path / "train" / ".hidden").mkdir()
    train, test = load(str(tmp_path))
    assert train.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(train.images[5].permute(1, 2, 0), picture((10, 10), seed=11))
    assert np.array_equal(test.images[0].permute(1, 2, 0), picture((10, 10), seed=20))


@pytest.mark.parametrize("root", ["", "train"])
def test_folder_without_test(tmp_path, root):
    write_pictures(tmp_path / root / "a", 10, grey=True)
    write_pictures(tmp_path / root / "b", 5, seed=50, grey=True)
    train, test = load(str(tmp_path))
    assert train.images.shape == (12, 1, 10, 10)
    assert torch.bincount(test.labels).tolist() == [2, 1]
    seeds = {0: range(10), 1: range(50, 55)}
    for image, label in zip(train.images, train.labels.tolist(), strict=True):
        assert any(np.array_equal(image[0], picture((10, 10), seed, grey=True)) for seed in seeds[label])


@pytest.mark.parametrize("name", ["val", "validation"])
def test_folder_of_grey_and_colour(tmp_path, name):
    write_pictures(tmp_path / "train" / "a", 2, grey=True)
    write_pictures(tmp_path / "train" / "b", 2)
    write_pictures(tmp_path / name / "a", 1, grey=True)
    write_pictures(tmp_path / name / "b", 1, grey=True)
    train, test = load(str(tmp_path))
    grey = picture((10, 10), seed=1, grey=True)
    assert train.images.shape == (4, 3, 10, 10)
    assert np.array_equal(train.images[1], np.stack([grey] * 3))
    assert np.array_equal(train.images[2].permute(1, 2, 0), picture((10, 10), seed=0))
    assert test.images.shape == (2, 3, 10, 10)


def test_image_size_of_pictures(tmp_path):
    write_pictures(tmp_path / "train" / "a", 2, (10, 12))
    write_pictures(tmp_path / "train" / "b", 2, (30, 20))
    write_pictures(tmp_path / "test" / "b", 2, (9, 9))
    with pytest.raises(InputError, match=r"b/0\.png: 20x30 pixels, the ones before it 12x10.*--image-size"):
        load(str(tmp_path))
    train, test = load(str(tmp_path), image_size=16)
    assert train.image_size == test.image_size == (16, 16)
    with pytest.raises(InputError, match="image size 4: expected at least 8"):
        load(str(tmp_path), image_size=4)


def test_folder_mistakes(tmp_path):
    from PIL import Image

    with pytest.raises(InputError, match="no pictures; expected"):
        load(str(tmp_path))
    write_pictures(tmp_path / "train" / "a", 3)
    write_pictures(tmp_path / "test" / "z", 1)
    with pytest.raises(InputError, match=r"z/0\.png: its class has no folder"):
        load(str(tmp_path))
    (tmp_path / "test" / "z").rename(tmp_path / "test" / "a")
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(InputError, match="class 'b' has no training image"):
        load(str(tmp_path))
    file = tmp_path / "train" / "b" / "0.jpg"
    file.write_bytes((tmp_path / "train" / "a" / "0.png").read_bytes()[:200])
    with pytest.raises(InputError, match=r"0\.jpg: not a readable picture"):
        load(str(tmp_path))
    file.write_bytes(b"hello")
    with pytest.raises(InputError, match=r"0\.jpg: not a readable picture"):
        load(str(tmp_path))
    file.unlink()
    Image.fromarray(np.zeros((10, 10), np.uint16)).save(file.with_suffix(".png"))
    with pytest.raises(InputError, match="more than 8 bits"):
        load(str(tmp_path))
    write_pictures(tmp_path / "oblong" / "a", 5, (10, 12))
    with pytest.raises(InputError, match=r"images of 12x10; expected square ones \(--image-size"):
        load(str(tmp_path / "oblong"))


def parquet_table(
    count: int, labels, size=(10, 10), names=None, columns=("img", "label"), seed: int = 0, **extra
):
    import pyarrow as pa
    from PIL import Image

    rows = []
    for i in range(count):
        file = io.BytesIO()
        Image.fromarray(picture(size, seed + i)).save(file, "png")
        rows.append({"bytes": file.getvalue(), "path": f"{i}.png"})
    table = pa.table({columns[0]: rows, columns[1]: labels, **extra})
    if names:
        features = {columns[0]: {"_type": "Image"}, columns[1]: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return table


def write_parquet(path: Path, *args, **kwargs) -> str:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(parquet_table(*args, **kwargs), path, row_group_size=3)
    return str(path)


def test_parquet_file(tmp_path):
    labels = [0, 1] * 5
    train, test = load(write_parquet(tmp_path / "any.parquet", 10, labels, names=["cat", "dog"]))
    assert (len(train), len(test)) == (8, 2)
    assert train.class_names == ("cat", "dog")
    for part in (train, test):
        for image, label in zip(part.images, part.labels, strict=True):
            source = [
                i for i in range(10) if np.array_equal(image.permute(1, 2, 0), picture((10, 10), seed=i))
            ]
            assert label == labels[source[0]]


@pytest.mark.parametrize(
    ("train_names", "test_name"),
    [
        (("train.parquet",), "test.parquet"),
        (
            ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"),
            "data/test-00000.parquet",
        ),
        (("train/0000.parquet", "train/0001.parquet"), "test/0000.parquet"),
        (("train.parquet",), "validation.parquet"),
    ],
)
def test_parquet_folder(tmp_path, train_names, test_name):
    for i, name in enumerate(train_names):
        write_parquet(tmp_path / name, 4, [0, 1, 2, 2], columns=("image", "labels"), seed=10 * i)
    write_parquet(tmp_path / test_name, 2, [2, 1], columns=("image", "labels"), seed=50)
    train, test = load(str(tmp_path))
    assert train.labels.tolist() == [0, 1, 2, 2] * len(train_names)
    assert np.array_equal(train.images[-1].permute(1, 2, 0), picture((10, 10), 10 * len(train_names) - 7))
    assert test.labels.tolist() == [2, 1]
    assert np.array_equal(test.images[0].permute(1, 2, 0), picture((10, 10), 50))
    assert load(str(tmp_path), image_size=8)[0].image_size == (8, 8)


def test_parquet_label_column(tmp_path):
    path = tmp_path / "a.parquet"
    labels = [0, 1] * 5
    assert len(load(write_parquet(path, 10, labels, columns=("picture", "target")))[0]) == 8
    train, _ = load(write_parquet(path, 10, labels, columns=("img", "fine_label"), coarse_label=[0] * 10))
    assert train.num_classes == 2
    with pytest.raises(InputError, match=r"found \['target', 'other'\] in .*call it 'label'"):
        load(write_parquet(path, 10, labels, columns=("img", "target"), other=[0] * 10))
    with pytest.raises(InputError, match="label column of integers: expected one, found none"):
        load(write_parquet(path, 10, [0.5] * 10))
    with pytest.raises(InputError, match="rows without a label"):
        load(write_parquet(path, 10, [None, *labels[1:]]))
    with pytest.raises(InputError, match="label 1 but only 1 class names"):
        load(write_parquet(path, 10, labels, names=["a"]))
    with pytest.raises(InputError, match="class 'c' has no training image"):
        load(write_parquet(path, 10, labels, names=["a", "b", "c"]))


def test_parquet_mistakes(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(write_parquet(tmp_path / "a.parquet", 10, [0, 1] * 5))
    with pytest.raises(InputError, match="do not start with 'train'"):
        load(str(tmp_path))
    table = pq.read_table(path)
    rows = table.column("img").to_pylist()
    rows[7] = {"bytes": b"no picture", "path": ""}
    pq.write_table(table.set_column(0, "img", pa.array(rows)), path)
    with pytest.raises(InputError, match=r"a\.parquet: img of row 7: not a readable picture"):
        load(str(path))
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(InputError, match="no rows"):
        load(str(path))
    pq.write_table(table.select(["label"]), path)
    with pytest.raises(InputError, match="image column, a struct with 'bytes': expected one, found none"):
        load(str(path))
    pq.write_table(table, path)
    content = path.read_bytes()
    for damaged in (content[:-100], b"", content[:200] + b"\xff" * 300 + content[500:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.parquet.*not a readable"):
            load(str(path))


# -------------------------------------------------------------------------------------------- names


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


def test_every_name_is_known():
    assert data.NAMES[0] == "digits"
    assert {"mnist", "fashion-mnist", "kmnist", "cifar10", "cifar100", "svhn"} <= set(data.NAMES)
    for entry in named.SETS.values():
        assert len(entry.mean) == len(entry.std)
        assert all(len(file.md5) in (0, 32) for file in entry.files)


def test_import_needs_only_torch_and_numpy():
    heavy = "{'PIL', 'pyarrow', 'sklearn', 'torchvision'}"  # torch itself may import scipy
    code = f"import sys, mim4dd.data; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
