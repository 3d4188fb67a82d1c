"""The named sets: where their files may lie, where they are published, what their classes are called."""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from ..errors import InputError
from ..files import atomic, cache_folder, expanded
from . import pictures, readers

DEBIAN = Path("/usr/share/datasets")  # where Debian's dataset-* packages install


@dataclass(frozen=True)
class File:
    """One file of a set: the names it may have, the first as published, its address and md5 sum."""

    names: tuple[str, ...]
    url: str = ""
    md5: str = ""


@dataclass(frozen=True)
class Named:
    """A named set: its reader takes the paths of `files` in this order."""

    read: Callable[..., readers.Pair]
    files: tuple[File, ...] = ()
    class_names: tuple[str, ...] | None = None  # None: read from the files
    mean: tuple[float, ...] = ()  # empty: measured
    std: tuple[float, ...] = ()

    def load(self, name: str, data_dir: Path | None) -> readers.Pair:
        """Find the files, fetching them if there is no `data_dir`, and read them.

        Raises:
            InputError: they are not found, cannot be fetched, or are damaged.
        """
        if data_dir and not self.files:
            raise InputError(f"--data-dir {data_dir} is for sets of files, and {name} has none; leave it out")
        folder = expanded(data_dir) if data_dir else None
        return self.read(*self._locate(name, folder)) if self.files else self.read()

    def _locate(self, name: str, data_dir: Path | None) -> list[Path]:
        cache = cache_folder() / name
        folders = [data_dir, data_dir / name] if data_dir else [DEBIAN / name, cache]
        missing = []
        for folder in folders:
            found = [next((folder / n for n in f.names if (folder / n).is_file()), None) for f in self.files]
            paths = [path for path in found if path]
            if len(paths) == len(found):
                return paths
            missing.append([f for f, path in zip(self.files, found, strict=True) if not path])
        if not data_dir and all(f.md5 for f in self.files):
            for file in missing[-1]:
                fetch(file.url, cache / file.names[0], file.md5)
            return self._locate(name, data_dir)
        lacking = min(missing, key=len)
        where = " or ".join(map(str, folders))
        raise InputError(
            f"{name}: {', '.join(f.names[0] for f in lacking)} not found in {where}; "
            f"download {' '.join(f.url for f in lacking)} and give the folder with --data-dir"
        )


def fetch(url: str, target: Path, md5: str) -> None:
    """Download `url` to `target`, which appears only once it is complete and has the right md5 sum.

    Says so on stderr, in one line, and shows a bar if that is a terminal.

    Raises:
        InputError: it cannot be fetched or written, or has another sum.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True, highlight=False, markup=False)
    console.print(f"fetching {url} into {target.parent}", soft_wrap=True)
    columns = BarColumn(), DownloadColumn(), TimeRemainingColumn()
    digest = hashlib.md5(usedforsecurity=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(url, timeout=60) as source,
            atomic(target) as partial,
            partial.open("wb") as file,
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        ):
            task = bar.add_task("", total=source.length)  # None if the server does not say
            while block := source.read(1 << 16):
                digest.update(block)
                file.write(block)
                bar.advance(task, len(block))
            if digest.hexdigest() != md5:
                raise InputError(
                    f"{url}: md5 {digest.hexdigest()}, expected {md5}; the file arrived damaged, try again"
                )
    except (OSError, HTTPException) as error:
        raise InputError(
            f"{url} cannot be fetched ({error}); download it by hand and give its folder with --data-dir"
        ) from error


def _idx(base: str, *sums: str) -> tuple[File, ...]:
    stems = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    names = [f"{stem}-ubyte" for stem in stems]
    return tuple(File((f"{n}.gz", n), f"{base}/{n}.gz", md5) for n, md5 in zip(names, sums, strict=True))


def _cifar(classes: int, python: str, binary: str, md5: str) -> tuple[File, ...]:
    """One file: the published archive, or else any extracted file, whose neighbours are read with it."""
    archive = f"cifar-{classes}-python.tar.gz"
    extracted = [name for path in (python, binary) for name in (path, Path(path).name)]
    names = (archive, *extracted, f"cifar-{classes}-binary.tar.gz")
    return (File(names, f"https://www.cs.toronto.edu/~kriz/{archive}", md5),)


def _read_tiny_imagenet(wnids: Path) -> readers.Pair:
    return pictures.read_folder(wnids.parent, None)


DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SETS = {
    "digits": Named(readers.read_digits, class_names=DIGITS),
    "mnist": Named(
        readers.read_idx,
        _idx(
            "https://ossci-datasets.s3.amazonaws.com/mnist",
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
        DIGITS,
        (0.1307,),
        (0.3081,),
    ),
    "fashion-mnist": Named(
        readers.read_idx,
        _idx(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        CLOTHES,
        (0.2861,),
        (0.3530,),
    ),
    "kmnist": Named(
        readers.read_idx,
        _idx(
            "http://codh.rois.ac.jp/kmnist/dataset/kmnist",
            "bdb82020997e1d708af4cf47b453dcf7",
            "e144d726b3acfaa3e44228e80efcd344",
            "5c965bf0a639b31b8f53240b1b52f4d7",
            "7320c461ea6c1c855c0b718fb2a4b134",
        ),
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ),
    "cifar10": Named(
        readers.read_cifar,
        _cifar(
            10,
            "cifar-10-batches-py/data_batch_1",
            "cifar-10-batches-bin/data_batch_1.bin",
            "c58f30108f718f92721af3b95e74349a",
        ),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    "cifar100": Named(
        readers.read_cifar,
        _cifar(
            100,
            "cifar-100-python/train",
            "cifar-100-binary/train.bin",
            "eb9058c3a382ffc7106e4002c42a8d85",
        ),
        mean=(0.5071, 0.4866, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
    "svhn": Named(
        readers.read_svhn,
        tuple(
            File((name,), f"http://ufldl.stanford.edu/housenumbers/{name}", md5)
            for name, md5 in (
                ("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
                ("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
            )
        ),
        DIGITS,
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
    ),
    "tiny-imagenet": Named(  # read from the unpacked folder: no md5, so it is never fetched
        _read_tiny_imagenet,
        (
            File(
                ("tiny-imagenet-200/wnids.txt", "wnids.txt"),
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip (unpacked)",
            ),
        ),
        mean=(0.485, 0.456, 0.406),  # ImageNet's
        std=(0.229, 0.224, 0.225),
    ),
}
