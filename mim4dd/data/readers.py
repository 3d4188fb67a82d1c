"""Files that hold arrays of images: idx, CIFAR, SVHN, .npz (`pictures.py` reads encoded pictures).

Every reader returns `Raw` arrays as they lie in the file; `loading.py` checks and scales them. Whatever a
decoder raises about a damaged file becomes an `InputError` that names the file.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError

# CIFAR-10 and -100, python and binary version: training batches, test batch, class names
CIFAR_LAYOUTS = (
    ([f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta"),
    ([f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", "batches.meta.txt"),
    (["train"], "test", "meta"),
    (["train.bin"], "test.bin", "fine_label_names.txt"),
)


class Raw(NamedTuple):
    """Images [N, C, H, W] and labels [N] of any dtype, class names if the file has them, and its name."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] | None
    source: str  # what errors call it


Pair = tuple[Raw, Raw | None]  # train and test; None: the file has no test set


@contextmanager
def reading(path: Path | str, kind: str) -> Iterator[None]:
    """Turn any failure to decode `path` into an `InputError`."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # damaged bytes make decoders raise nearly anything
        reason = re.sub(r" ?<[^<>]* at 0x\w+>", "", str(error)) or type(error).__name__  # objects' addresses
        objects = "Object arrays" in reason
        mend = "save its arrays as numbers" if objects else "damaged or incomplete, get it again"
        raise InputError(f"{path}: not a readable {kind} ({reason}); {mend}") from error


# ---------------------------------------------------------------------------------------- named sets


def read_digits() -> Pair:
    """scikit-learn's 1,797 digits of 8x8 pixels with values 0..16."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return Raw(images[:, None], digits.target, None, "digits"), None


def read_idx(train_images: Path, train_labels: Path, test_images: Path, test_labels: Path) -> tuple[Raw, Raw]:
    """The four files of MNIST and sets like it, gzipped or not."""

    def pair(images: Path, labels: Path) -> Raw:
        return Raw(_idx_array(images, 3)[:, None], _idx_array(labels, 1), None, str(images))

    return pair(train_images, train_labels), pair(test_images, test_labels)


def _idx_array(path: Path, dims: int) -> np.ndarray:
    with reading(path, "idx file"):
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    header = 4 + 4 * dims  # two zero bytes, the type (8: uint8), the number of dimensions, each size
    if data[:4] != bytes((0, 0, 8, dims)):
        raise InputError(
            f"{path}: not an idx file of uint8 with {dims} dimension(s): starts with {data[:4]!r}"
        )
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4)]
    if len(data) - header != math.prod(shape):
        raise InputError(
            f"{path}: the header announces {shape} bytes but {max(len(data) - header, 0)} follow; "
            "damaged or incomplete, get it again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


# numpy has moved the function that rebuilds an array from one module to another: an example knows where it is
PICKLED = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}


class _ArrayUnpickler(pickle.Unpickler):
    """Loads lists, dicts, text and numpy arrays; a pickle that asks for any other code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in PICKLED:
            return PICKLED[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, only numpy arrays are allowed")


def read_cifar(path: Path) -> tuple[Raw, Raw]:
    """CIFAR-10 or -100, python or binary: a published archive, or an extracted file among the others."""
    layouts = [layout for layout in CIFAR_LAYOUTS if path.name in layout[0]] or CIFAR_LAYOUTS
    wanted = {name for train, *others in layouts for name in (*train, *others)}
    if path.name.endswith(".tar.gz"):
        files = {}
        with reading(path, "tar archive"), tarfile.open(path) as archive:
            for member in archive:
                if (name := Path(member.name).name) in wanted and (file := archive.extractfile(member)):
                    files[name] = file.read()
    else:
        with reading(path.parent, "folder"):
            files = {
                f.name: f.read_bytes() for f in path.parent.iterdir() if f.name in wanted and f.is_file()
            }
    train, test, names = next((layout for layout in layouts if layout[0][0] in files), layouts[0])
    if missing := [name for name in (*train, test) if name not in files]:
        raise InputError(f"{path}: {', '.join(missing)} missing from this copy of CIFAR; get it again")

    def part(batches: list[str]) -> Raw:
        blocks = []
        for name in batches:
            with reading(f"{path}: {name}", "CIFAR batch"):
                blocks.append(_cifar_batch(files[name], name))
        images, labels = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
        return Raw(images.reshape(-1, 3, 32, 32), labels, class_names, str(path))

    with reading(f"{path}: {names}", "list of class names"):
        class_names = _cifar_names(files[names], names) if names in files else None
    return part(train), part([test])


def _cifar_batch(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    if name.endswith(".bin"):  # records of label bytes (CIFAR-100: coarse, fine) and 3072 pixels
        label_bytes = 1 if "batch" in name else 2
        records = np.frombuffer(data, np.uint8).reshape(-1, label_bytes + 3072)
        return records[:, label_bytes:], records[:, label_bytes - 1]
    batch = _unpickle(data)
    labels = batch["fine_labels" if "fine_labels" in batch else "labels"]
    return batch["data"].reshape(len(labels), 3072), np.asarray(labels)


def _cifar_names(data: bytes, name: str) -> tuple[str, ...]:
    if name.endswith(".txt"):
        return tuple(data.decode().split())
    meta = _unpickle(data)
    return tuple(meta["fine_label_names" if "fine_label_names" in meta else "label_names"])


def _unpickle(data: bytes) -> dict[str, Any]:
    return _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()  # latin1: written by Python 2


def read_svhn(train: Path, test: Path) -> tuple[Raw, Raw]:
    """The cropped digits of SVHN, .mat files with X uint8 [32, 32, 3, N] and y [N, 1], 10 for the digit 0."""
    from scipy.io import loadmat

    def part(path: Path) -> Raw:
        with reading(path, ".mat file"):
            file: Any = loadmat(path, variable_names=["X", "y"])
            images, labels = file["X"].transpose(3, 2, 0, 1), file["y"].reshape(-1)
        return Raw(images, np.where(labels == 10, 0, labels), None, str(path))

    return part(train), part(test)


# ------------------------------------------------------------------------------------ your own files


def read_npz(path: Path) -> Pair:
    """`x_train` and `y_train`, and `x_test` and `y_test` if the file has a test set of its own."""
    with reading(path, ".npz file"), np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test") if key in file.files}
        found = ", ".join(file.files) or "nothing"
    wanted = {"x_train", "y_train"} | ({"x_test", "y_test"} if {"x_test", "y_test"} & set(arrays) else set())
    if missing := ", ".join(sorted(wanted - set(arrays))):
        raise InputError(
            f"{path}: {missing} missing, found {found}; expected x_train, y_train, x_test, y_test"
        )

    def part(split: str) -> Raw:
        labels = arrays[f"y_{split}"]
        if labels.ndim == 2 and labels.shape[1] == 1:  # a column, as Keras keeps labels
            labels = labels[:, 0]
        images = _channels_first(arrays[f"x_{split}"], f"{path}: x_{split}")
        return Raw(images, labels, None, f"{path}: {split}")

    return part("train"), part("test") if "x_test" in arrays else None


def _channels_first(images: np.ndarray, source: str) -> np.ndarray:
    """[N, H, W], [N, H, W, C] or [N, C, H, W] -> [N, C, H, W]: images are square, H and W the equal axes."""
    if images.ndim == 3:
        return images[:, None]
    first, second, third = images.shape[1:] if images.ndim == 4 else (0, 1, 2)
    if first == second == third:
        raise InputError(
            f"{source}: shape {images.shape} may be [N, H, W, C] or [N, C, H, W]; resize the images"
        )
    if first == second:
        return images.transpose(0, 3, 1, 2)
    if second == third:
        return images
    raise InputError(
        f"{source}: shape {images.shape}; expected square images as [N, H, W], [N, H, W, C] or [N, C, H, W]"
    )
