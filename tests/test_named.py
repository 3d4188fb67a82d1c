"""The named sets from their published files."""

import functools
import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture, pixels, write_pictures
from idx_files import idx, write_idx

from mim4dd.data import load
from mim4dd.errors import InputError


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
    # What was measured on the held-out images stays comparable: they are these, on every machine.
    assert hashlib.sha256(test.images.numpy().tobytes()).hexdigest()[:16] == "f0a4b86e853e4076"


def test_a_set_without_files_needs_no_data_dir(tmp_path):
    with pytest.raises(InputError, match=f"--data-dir {tmp_path} is for sets of files, and digits has none"):
        load("digits", tmp_path)


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


def test_data_dir_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    images, *_ = write_idx(tmp_path / "data")
    train, _ = load("kmnist", Path("~/data"))
    assert np.array_equal(train.images[:, 0], images)


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
