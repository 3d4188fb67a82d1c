"""Pictures in folders and in parquet files."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture, write_pictures

from mim4dd.data import load, pictures
from mim4dd.errors import InputError


def test_folder(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        write_pictures(tmp_path / split / "dog", count, seed=10)
        write_pictures(tmp_path / split / "cat", count, seed=20)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / "cat" / "._0.png").write_text("no picture")
    (tmp_path / "train" / ".hidden").mkdir()
    write_pictures(tmp_path / "train" / "cat" / ".ipynb_checkpoints", 1)
    train, test = load(str(tmp_path))
    assert train.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(train.images[5].permute(1, 2, 0), picture((10, 10), seed=11))
    assert np.array_equal(test.images[0].permute(1, 2, 0), picture((10, 10), seed=20))


def test_pictures_are_in_order_however_many_are_decoded_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "AHEAD", 3)
    for name, count in (("train/a", 6), ("train/b", 2), ("test/a", 1)):
        write_pictures(tmp_path / name, count, seed=6 * name.endswith("b"))
    train, _ = load(str(tmp_path))
    for seed, image in enumerate(train.images):
        assert np.array_equal(image.permute(1, 2, 0), picture((10, 10), seed))
    for name in ("a/4.png", "b/0.png"):
        (tmp_path / "train" / name).write_text("no picture")
    with pytest.raises(InputError, match=r"a/4\.png: not a readable picture"):
        load(str(tmp_path))


def test_a_test_set_without_train_is_no_class(tmp_path):
    for name in ("a", "b", "test/a"):
        write_pictures(tmp_path / name, 2)
    with pytest.raises(InputError, match=r"test is a test set only beside .*train; rename one of them"):
        load(str(tmp_path))


def test_a_path_needs_no_data_dir(tmp_path):
    with pytest.raises(
        InputError, match="--data-dir there is for named sets, and .* is a path; leave it out"
    ):
        load(str(tmp_path), Path("there"))


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


def test_the_first_test_set_with_labels_is_read(tmp_path):
    write_pictures(tmp_path / "train" / "a", 2)
    write_pictures(tmp_path / "train" / "b", 2)
    write_pictures(tmp_path / "test", 4)
    for i, name in enumerate(("val", "valid")):
        write_pictures(tmp_path / name / "b", 1, seed=20 + i)
    assert np.array_equal(load(str(tmp_path))[1].images[0].permute(1, 2, 0), picture((10, 10), seed=20))
    write_pictures(tmp_path / "test" / "unknown", 4)
    assert load(str(tmp_path))[1].labels.tolist() == [1]


@pytest.mark.parametrize("stray", [".cache/x.parquet", "._x.parquet", "x.parquet", "train/metadata.parquet"])
def test_a_stray_parquet_file_hides_no_pictures(tmp_path, stray):
    write_pictures(tmp_path / "train" / "a", 2)
    write_pictures(tmp_path / "train" / "b", 2)
    write_pictures(tmp_path / "test" / "b", 1)
    (tmp_path / stray).parent.mkdir(exist_ok=True)
    (tmp_path / stray).touch()
    train, test = load(str(tmp_path))
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert test.labels.tolist() == [1]


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_modes_give_one_channel(tmp_path, mode):
    from PIL import Image

    cross = np.eye(10, dtype=np.uint8) * 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(cross).convert(mode).save(tmp_path / name / f"{i}.png")
    train, _ = load(str(tmp_path))
    assert train.images.shape == (4, 1, 10, 10)
    assert all(np.array_equal(image[0], cross) for image in train.images)


def loaded(folder: Path, image, suffix: str = ".png", **options) -> torch.Tensor:
    """What becomes of a picture saved like this: uint8 [C, H, W]."""
    for name in ("train/a/0", "train/b/0", "test/a/0"):
        path = (folder / name).with_suffix(suffix)
        path.parent.mkdir(parents=True)
        image.save(path, **options)
    return load(str(folder))[0].images[0]


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pictures_lie_on_white(tmp_path, mode):
    from PIL import Image

    grey, alpha = picture((10, 10), 0, grey=True), picture((10, 10), 1, grey=True)
    alpha[:2], alpha[2:4] = 0, 255
    bands = [*[grey] * (len(mode) - 1), alpha]
    image = Image.merge(mode, [Image.fromarray(band) for band in bands])
    expected = 255 + (grey - 255.0) * alpha / 255
    found = loaded(tmp_path, image)
    assert found.shape == (len(mode) - 1, 10, 10)
    assert np.abs(found.numpy() - expected).max() <= 1
    assert (found[:, :2] == 255).all()
    assert np.array_equal(found[0, 2:4], grey[2:4])


@pytest.mark.parametrize(
    ("mode", "colour", "suffix"),
    [("1", 0, ".png"), ("L", 0, ".png"), ("P", 0, ".png"), ("P", 0, ".gif"), ("RGB", (0, 0, 0), ".png")],
)
def test_a_transparent_colour_is_white(tmp_path, mode, colour, suffix):
    from PIL import Image

    cross = Image.fromarray(np.eye(10, dtype=np.uint8) * 255).convert(mode)
    found = loaded(tmp_path, cross, suffix, transparency=colour)
    assert found.shape[0] == (1 if mode in ("1", "L") else 3)
    assert (found == 255).all()


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
def test_pictures_are_upright_as_their_exif_says(tmp_path, suffix, orientation, turns):
    from PIL import Image

    quarters = np.repeat(np.array([0, 80, 160, 240], np.uint8), 4).reshape(2, 8).repeat(4, axis=0)
    image = Image.fromarray(quarters)
    exif = image.getexif()
    exif[0x112] = orientation
    found = loaded(tmp_path, image, suffix, exif=exif)
    assert np.abs(found[0].numpy() - np.rot90(quarters, turns).astype(float)).max() <= 8


def test_a_damaged_exif_still_turns_a_picture(tmp_path):
    """A number that is text elsewhere in it is nothing to refuse a picture for."""
    from PIL import Image

    image = Image.fromarray(picture((10, 10), 0))
    exif = image.getexif()
    exif[0x112], exif[0x11A] = 6, 72.0
    damaged = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")
    assert damaged != exif.tobytes()
    found = loaded(tmp_path, image, exif=damaged)
    assert np.array_equal(found.permute(1, 2, 0), np.rot90(picture((10, 10), 0), 3))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_deep_modes_are_refused(tmp_path, mode):
    from PIL import Image

    write_pictures(tmp_path / "a", 3)
    write_pictures(tmp_path / "b", 3)
    Image.fromarray(picture((10, 10), 0)).convert("L").convert(mode).save(tmp_path / "b" / "1.tiff")
    with pytest.raises(InputError, match=rf"1\.tiff: mode {mode}, more than 8 bits"):
        load(str(tmp_path))


def test_suffixes_in_capitals(tmp_path):
    write_pictures(tmp_path / "a", 5)
    write_pictures(tmp_path / "b", 5)
    for file in (tmp_path / "b").iterdir():
        file.rename(file.with_suffix(".PNG"))
    assert torch.bincount(load(str(tmp_path))[0].labels).tolist() == [4, 4]


def test_image_size_of_pictures(tmp_path):
    write_pictures(tmp_path / "train" / "a", 2, (10, 12))
    write_pictures(tmp_path / "train" / "b", 2, (30, 20))
    write_pictures(tmp_path / "test" / "b", 2, (9, 9))
    with pytest.raises(InputError, match=r"b/0\.png: 20x30 pixels, but 12x10 before it.*--image-size"):
        load(str(tmp_path))
    train, test = load(str(tmp_path), image_size=16)
    assert train.image_size == test.image_size == (16, 16)
    with pytest.raises(InputError, match="image size 4: expected at least 8"):
        load(str(tmp_path), image_size=4)


def test_folder_mistakes(tmp_path):
    from PIL import Image

    (tmp_path / "._x.parquet").touch()
    with pytest.raises(InputError, match="no pictures; expected"):
        load(str(tmp_path))
    write_pictures(tmp_path / "train" / "a", 3)
    write_pictures(tmp_path / "test" / "z", 1)
    with pytest.raises(InputError, match=r"z/0\.png: its class has no folder"):
        load(str(tmp_path))
    (tmp_path / "test" / "z").rename(tmp_path / "test" / "a")
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(
        InputError, match="train/b: class 'b' has no training image; fill or remove the folder"
    ):
        load(str(tmp_path))
    file = tmp_path / "train" / "b" / "0.jpg"
    file.write_bytes((tmp_path / "train" / "a" / "0.png").read_bytes()[:200])
    with pytest.raises(InputError, match=r"0\.jpg: not a readable picture"):
        load(str(tmp_path))
    file.write_bytes(b"hello")
    with pytest.raises(InputError, match=r"0\.jpg: not a readable picture \(cannot identify image file\);"):
        load(str(tmp_path))
    file.unlink()
    Image.fromarray(np.zeros((10, 10), np.uint16)).save(file.with_suffix(".png"))
    with pytest.raises(InputError, match="more than 8 bits"):
        load(str(tmp_path))
    write_pictures(tmp_path / "oblong" / "a", 5, (10, 12))
    with pytest.raises(
        InputError, match=r"oblong.*: 12x10 pixels; expected square pictures, as --image-size"
    ):
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
    write_pictures(tmp_path / "assets", 1)
    train, test = load(str(tmp_path))
    assert train.labels.tolist() == [0, 1, 2, 2] * len(train_names)
    assert np.array_equal(train.images[-1].permute(1, 2, 0), picture((10, 10), 10 * len(train_names) - 7))
    assert test.labels.tolist() == [2, 1]
    assert np.array_equal(test.images[0].permute(1, 2, 0), picture((10, 10), 50))
    assert load(str(tmp_path), image_size=8)[0].image_size == (8, 8)


def test_hidden_parquet_files_are_skipped(tmp_path):
    write_parquet(tmp_path / "train" / "0000.parquet", 4, [0, 1, 2, 2])
    write_parquet(tmp_path / "test" / "0000.parquet", 2, [2, 1])
    (tmp_path / "train" / "._0000.parquet").touch()
    (tmp_path / "test" / "._0000.parquet").touch()
    train, test = load(str(tmp_path))
    assert train.labels.tolist() == [0, 1, 2, 2]
    assert test.labels.tolist() == [2, 1]


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
    with pytest.raises(
        InputError, match="found none in .*'label'.; 'label' holds string, not integers; conv"
    ):
        load(write_parquet(path, 10, ["cat", "dog"] * 5))
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
    with pytest.raises(InputError, match="no parquet file's name starts with 'train'"):
        load(str(tmp_path))
    table = pq.read_table(path)
    rows = table.column("img").to_pylist()
    rows[7] = {"bytes": b"no picture", "path": ""}
    pq.write_table(table.set_column(0, "img", pa.array(rows)), path)
    with pytest.raises(InputError, match=r"a\.parquet: img of row 7: not a readable picture"):
        load(str(path))
    rows[7] = {"bytes": None, "path": "7.png"}
    pq.write_table(table.set_column(0, "img", pa.array(rows)), path)
    with pytest.raises(InputError, match=r"a\.parquet: img of row 7 has no bytes, only a path; write"):
        load(str(path))
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(InputError, match="no rows"):
        load(str(path))
    pq.write_table(table.select(["label"]), path)
    with pytest.raises(InputError, match="image column of structs with 'bytes': expected one, found none"):
        load(str(path))
    pq.write_table(table, path)
    content = path.read_bytes()
    for damaged in (content[:-100], b"", content[:200] + b"\xff" * 300 + content[500:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.parquet.*not a readable"):
            load(str(path))
