"""The files that MNIST and sets like it are published in, small and of random pixels."""

import gzip
import struct
from pathlib import Path

import numpy as np
from conftest import labels_of, pixels

STEMS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def idx(array: np.ndarray) -> bytes:
    """The content of a file that holds an array of bytes."""
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, zipped: bool = True) -> tuple[np.ndarray, ...]:
    """Write the four files; return their arrays: images and labels, for training and for testing."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = (pixels(30, 28, 28), labels_of(*[3] * 10), pixels(10, 28, 28, seed=1), np.arange(10))
    for stem, array in zip(STEMS, arrays, strict=True):
        content = idx(array.astype(np.uint8))
        (folder / f"{stem}-ubyte{'.gz' if zipped else ''}").write_bytes(
            gzip.compress(content) if zipped else content
        )
    return arrays
