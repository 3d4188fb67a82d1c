"""Encoded pictures: a folder for each class, or Hugging Face parquet files; Pillow decodes them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from .readers import Pair, Raw, reading

if TYPE_CHECKING:
    import pyarrow.parquet as pq

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
TEST_NAMES = ("test", "val", "validation", "valid")  # the first one with labels is the test set
GREY_MODES = ("1", "L", "LA")
ALPHA_MODES = ("LA", "PA", "RGBA")
ANNOTATIONS = "val_annotations.txt"  # Tiny ImageNet keeps its validation images in one folder and this table
AHEAD = 256  # pictures decoded before the first of them is taken
Decoded = tuple[str, np.ndarray]
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # converting these would clip them to 8 bits


def read_folder(path: Path, image_size: int | None) -> Pair:
    """Read `path/train/<class>/*` with a test set `path/<name>/<class>/*`, or `path/<class>/*` alone.

    The names of a test set are test, val, validation and valid. If there are several, the first one that has
    labels is read: a folder of the training classes with pictures in it, or the table of Tiny ImageNet.

    Raises:
        InputError: pictures that cannot be read, of several sizes or without a class, or a class without any.
    """
    root = _root(path)
    classes = tuple(sorted(folder.name for folder in _folders(root)))
    if root == path and (reserved := next((name for name in TEST_NAMES if name in classes), None)):
        raise InputError(f"{path / reserved} is a test set only beside {path / 'train'}; rename one of them")
    train = _folder_part(root, classes, image_size)
    if len(empty := np.setdiff1d(np.arange(len(classes)), train.labels)):
        name = classes[empty[0]]
        raise InputError(f"{root / name}: class {name!r} has no training image; fill or remove the folder")
    candidates = [path / name for name in TEST_NAMES if root != path and (path / name).is_dir()]
    if not candidates:
        return train, None
    labelled = (  # Tiny ImageNet's test is not
        c for c in candidates if (c / ANNOTATIONS).is_file() or any(k in classes for _, k in _pictures(c))
    )
    return _same_channels(train, _folder_part(next(labelled, candidates[0]), classes, image_size))


def _root(path: Path) -> Path:
    return path / "train" if (path / "train").is_dir() else path


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _pictures(root: Path) -> Iterator[tuple[Path, str]]:
    """The pictures in the class folders of `root`, with the name of their class."""
    for folder in _folders(root):
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in SUFFIXES and not _hidden(file.relative_to(folder)):
                yield file, folder.name


def _folder_part(root: Path, classes: tuple[str, ...], image_size: int | None) -> Raw:
    if (root / ANNOTATIONS).is_file():
        with reading(root / ANNOTATIONS, "table of file names and classes"):
            rows = [line.split("\t") for line in (root / ANNOTATIONS).read_text().splitlines()]
            files = [(root / "images" / row[0], row[1]) for row in rows]
    else:
        files = [*_pictures(root)]
    if not files:
        raise InputError(
            f"{root}: no pictures; expected {root}/<class>/<name> with one of {' '.join(SUFFIXES)}"
        )
    number = {name: i for i, name in enumerate(classes)}
    if stray := next((file for file, name in files if name not in number), None):
        raise InputError(f"{stray}: its class has no folder among the training images")

    def contents() -> Iterator[tuple[str, bytes]]:
        for file, _ in files:
            with reading(file, "picture"):
                yield str(file), file.read_bytes()

    images = _decode(contents(), len(files), image_size)
    return Raw(images, np.array([number[name] for _, name in files]), classes, str(root))


def read_parquet(path: Path, image_size: int | None) -> Pair:
    """Read a Hugging Face image file, or a folder (or its `data/`) of train* and test* files or folders."""
    if path.is_file():
        return _parquet_part([path], image_size), None
    roots = (path, path / "data")

    def files(split: str) -> list[Path]:
        found = [f for r in roots for g in (f"{split}*.parquet", f"{split}/*.parquet") for f in r.glob(g)]
        return sorted(file for file in found if not _hidden(file.relative_to(path)))

    train = files("train")
    if not train:
        raise InputError(
            f"{path}: no parquet file's name starts with 'train'; give one file instead of the folder"
        )
    tests = next((found for found in map(files, TEST_NAMES) if found), None)
    if tests is None:
        return _parquet_part(train, image_size), None
    return _same_channels(_parquet_part(train, image_size), _parquet_part(tests, image_size))


def is_parquet(path: Path) -> bool:
    """Whether the folder is one for `read_parquet`: of parquet files, and not of pictures of several classes.

    Beside these, a parquet file holds something else; a single folder of pictures may be there to illustrate.
    """
    globs = ("*.parquet", "*/*.parquet", "data/*/*.parquet")
    found = any(not _hidden(file.relative_to(path)) for g in globs for file in path.glob(g))
    return found and len({name for _, name in _pictures(_root(path))}) < 2


def _parquet_part(paths: list[Path], image_size: int | None) -> Raw:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(paths[0], "parquet file"):
        schema = pq.read_schema(paths[0])
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    integers = [f.name for f in schema if pa.types.is_integer(f.type)]
    types = {f.name: str(f.type) for f in schema}
    picture = _choose(structs, ("image", "img"), paths[0], "structs with 'bytes'", types)
    label = _choose(integers, ("label", "labels", "fine_label"), paths[0], "integers", types)
    labels: list[np.ndarray] = []

    def rows(file: Path, source: pq.ParquetFile) -> Iterator[tuple[str, bytes]]:
        row = 0
        with reading(file, "parquet file"):
            for batch in source.iter_batches(columns=[picture, label], batch_size=1024):
                if batch.column(label).null_count:
                    raise InputError(f"{file}: column {label!r} has rows without a label")
                labels.append(batch.column(label).to_numpy())
                for data in batch.column(picture).field("bytes").to_pylist():
                    if data is None:
                        raise InputError(
                            f"{file}: {picture} of row {row} has no bytes, only a path; write the file again "
                            "with the pictures in it"
                        )
                    yield f"{file}: {picture} of row {row}", data
                    row += 1

    with reading(paths[0], "parquet file"):
        sources = [pq.ParquetFile(path) for path in paths]
    count = sum(source.metadata.num_rows for source in sources)
    if not count:
        raise InputError(f"{paths[0]}: no rows, so no images")
    pictures = (item for path, source in zip(paths, sources, strict=True) for item in rows(path, source))
    images = _decode(pictures, count, image_size)
    return Raw(images, np.concatenate(labels), _hub_names(schema.metadata, label), str(paths[0]))


def _choose(
    found: list[str], preferred: tuple[str, ...], path: Path, kind: str, types: dict[str, str]
) -> str:
    """The first preferred name, else the only one found, among columns of the kind."""
    if name := next((name for name in preferred if name in found), None):
        return name
    if len(found) == 1:
        return found[0]
    other = next((name for name in preferred if name in types), None)
    advice = (
        f"{other!r} holds {types[other]}, not {kind}; convert it" if other else f"call it {preferred[0]!r}"
    )
    what = f"{path}: {preferred[0]} column of {kind}"
    raise InputError(f"{what}: expected one, found {found or 'none'} in {[*types]}; {advice}")


def _hub_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    try:
        return tuple(json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):  # names are optional: no such metadata, or not a ClassLabel
        return None


def _decode(pictures: Iterable[tuple[str, bytes]], count: int, image_size: int | None) -> np.ndarray:
    """`count` pairs (name, encoded picture) -> uint8 [count, C, H, W], C = 1 if every one is grey, else 3."""
    images: np.ndarray = np.empty((0, 1, 0, 0), np.uint8)
    for i, (name, pixels) in enumerate(_in_threads(partial(_pixels, image_size), pictures)):
        if i == 0:
            images = np.empty((count, *pixels.shape), np.uint8)
        height, width = images.shape[2:]
        if pixels.shape[1:] != (height, width):
            raise InputError(
                f"{name}: {pixels.shape[2]}x{pixels.shape[1]} pixels, but {width}x{height} before it; "
                "resize them all with --image-size"
            )
        if len(pixels) > images.shape[1]:  # the first colour picture after grey ones
            images = np.repeat(images, 3, axis=1)
        images[i] = pixels  # a grey picture among coloured ones fills all three channels
    height, width = images.shape[2:]
    if height != width:
        raise InputError(
            f"{name}: {width}x{height} pixels; expected square pictures, as --image-size crops them"
        )
    return images


def _in_threads(
    decode: Callable[[tuple[str, bytes]], Decoded], pictures: Iterable[tuple[str, bytes]]
) -> Iterator[Decoded]:
    """Decode the pictures in order, some of them ahead; Pillow lets other threads run meanwhile."""
    pictures = iter(pictures)
    with ThreadPoolExecutor() as pool:
        while ahead := [*islice(pictures, AHEAD)]:
            yield from pool.map(decode, ahead)


def _pixels(image_size: int | None, encoded: tuple[str, bytes]) -> Decoded:
    """Return a picture's name and uint8 [C, H, W]: upright as its EXIF says, on white where transparent."""
    from PIL import Image, ImageOps

    name, data = encoded
    with reading(name, "picture"), Image.open(io.BytesIO(data)) as file:
        if file.mode in DEEP_MODES:
            raise InputError(
                f"{name}: mode {file.mode}, more than 8 bits a pixel; save it as an 8-bit picture"
            )
        file.getexif()  # kept by Pillow; without its bytes, turning need not write it anew,
        file.info.pop("exif", None)  # which fails where other parts of it are damaged
        picture = ImageOps.exif_transpose(file)
        if picture.mode in ALPHA_MODES or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("L" if file.mode in GREY_MODES else "RGB")
        if image_size:
            picture = ImageOps.fit(picture, (image_size, image_size))
    pixels = np.asarray(picture).reshape(picture.height, picture.width, -1)
    return name, pixels.transpose(2, 0, 1)


def _same_channels(train: Raw, test: Raw) -> tuple[Raw, Raw]:
    """Give grey pictures three channels if those of the other part are in colour."""

    def colour(raw: Raw) -> Raw:
        return raw._replace(images=np.repeat(raw.images, 3, axis=1)) if raw.images.shape[1] == 1 else raw

    same = train.images.shape[1] == test.images.shape[1]
    return (train, test) if same else (colour(train), colour(test))
