"""What `augment.sample` draws."""

import math

import numpy as np
import pytest
import torch
from conftest import random_params

from mim4dd import augment, extension
from mim4dd.augment import AugmentParams, at_once, sampling

PARTS = augment.DSA.split("_")


CHANGED_BY = {
    "color": {"brightness", "saturation", "contrast"},
    "crop": {"shift_y", "shift_x"},
    "cutout": {"cutout"},
    "flip": {"flip"},
    "scale": {"scale_x", "scale_y"},
    "rotate": {"degrees"},
}


@pytest.fixture(params=["on a CPU", "as on a GPU", "as on a GPU without the extension"], autouse=True)
def drawer(request, monkeypatch):
    """Draw what is wanted one after the other, or everything at once, as on a GPU."""

    def all_at_once(parts, rows, size, generator, mode):
        return at_once.draw(tuple(parts), rows, size, [generator], mode)

    if request.param != "on a CPU":
        monkeypatch.setattr(sampling, "_one_by_one", all_at_once)
    if request.param == "as on a GPU without the extension":
        monkeypatch.setattr(extension, "available", lambda device="cpu": False)


def part_of(params: AugmentParams) -> str:
    """The only part that is not the identity."""
    identity = AugmentParams.identity(len(params)).fields()
    changed = {name for name, value in params.fields().items() if not torch.equal(value, identity[name])}
    (part,) = (part for part, fields in CHANGED_BY.items() if fields >= changed > set())
    return part


def test_single_mode_draws_one_part_per_call(generator):
    drawn = (augment.sample(augment.DSA, 32, 16, generator=generator) for _ in range(100))
    assert {part_of(params) for params in drawn} == set(PARTS)


def test_each_mode_draws_one_part_per_row(generator):
    """All parts as often, and with numbers as they are drawn alone."""
    params = augment.sample("color_cutout_rotate", 3000, 16, generator=generator, mode="each")
    parts = [part_of(params[torch.tensor([k])]) for k in range(len(params))]
    assert all(900 < parts.count(part) < 1100 for part in ("color", "cutout", "rotate"))
    rotated = params.degrees[params.degrees != 0]
    assert rotated.abs().max() > 14
    assert rotated.std() == pytest.approx(15 / 3**0.5, rel=0.1)
    alike = augment.sample("color_cutout_rotate", 5, 16, generator=generator, siamese=True, mode="each")
    assert len({part_of(alike[torch.tensor([k])]) for k in range(5)}) == 1


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (9, 32)])
def test_parameters_stay_in_the_published_ranges(size):
    params = random_params(4000, size)
    height, width = size
    for drawn, low, high in (
        (params.brightness, -0.5, 0.5),
        (params.saturation, 0, 2),
        (params.contrast, 0.5, 1.5),
        (params.scale_x, 1 / 1.2, 1.2),
        (params.scale_y, 1 / 1.2, 1.2),
        (params.degrees, -15, 15),
    ):
        near = 0.01 * (high - low)
        assert low - 1e-6 <= drawn.min() < low + near
        assert high - near < drawn.max() <= high + 1e-6
    assert params.shift_y.unique().tolist() == list(range(-reach(height), reach(height) + 1))
    assert params.shift_x.unique().tolist() == list(range(-reach(width), reach(width) + 1))
    assert not torch.equal(params.scale_x, params.scale_y)
    assert 0.4 < params.flip.float().mean() < 0.6
    y0, y1, x0, x1 = params.cutout.T
    for low, high, side in ((y0, y1, height), (x0, x1, width)):
        box = int(side * 0.5 + 0.5)
        assert low.min() == 0
        assert high.max() == side - 1
        assert (high - low + 1).max() == box
        assert (high - low + 1).min() == box // 2 if box % 2 == 0 else math.ceil(box / 2)


def test_every_field_of_the_identity_is_its_own():
    expected = AugmentParams.identity(3).fields()
    for name in expected:
        params = AugmentParams.identity(3)
        getattr(params, name).fill_(3)  # which none of them is
        changed = [k for k, value in params.fields().items() if not torch.equal(value, expected[k])]
        assert changed == [name]


@pytest.mark.parametrize("mode", ["single", "each", "all"])
def test_a_negative_number_of_rows_is_refused(generator, mode):
    with pytest.raises(ValueError, match=r"augment.sample: batch is -1, expected 0 or more rows"):
        augment.sample(augment.DSA, -1, 16, generator=generator, mode=mode)


def reach(side: int) -> int:
    return int(side * 0.125 + 0.5)


def test_siamese_rows_are_one_row_repeated(generator):
    params = augment.sample(augment.DSA, 5, 16, generator=generator, siamese=True, mode="all")
    assert len(params) == 5
    for field in params.fields().values():
        assert (field == field[:1]).all()


def test_same_seed_same_parameters():
    first, second, other = (random_params(8, (16, 16), seed) for seed in (1, 1, 2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.fields().values(), second.fields().values(), strict=True)
    )
    assert not torch.equal(first.brightness, other.brightness)


def test_the_default_dtype_changes_no_parameter():
    def drawn():
        random = torch.Generator().manual_seed(0)
        return (
            random_params(8, (16, 16)),
            augment.sample(augment.DSA, 8, 16, generator=random, mode="each"),
            augment.sample("", 8, 16, generator=random),
            augment.pad_and_crop(8, 2, generator=random),
        )

    expected = drawn()
    torch.set_default_dtype(torch.float64)
    try:
        actual = drawn()
    finally:
        torch.set_default_dtype(torch.float32)
    for params, other in zip(actual, expected, strict=True):
        for name, field in params.fields().items():
            assert torch.equal(field, other.fields()[name])
            assert field.dtype == other.fields()[name].dtype


def test_an_image_size_is_a_side_or_any_pair():
    def drawn(size):
        return augment.sample("crop", 50, size, generator=torch.Generator().manual_seed(0)).fields()

    expected = drawn((16, 16))
    for size in (16, np.int64(16), [16, 16], torch.Size((16, 16))):
        assert all(torch.equal(field, expected[name]) for name, field in drawn(size).items())


def test_parameters_are_moved_together(generator):
    params = augment.sample(augment.DSA, 3, 16, generator=generator, mode="all")
    moved = params.to("meta")
    for name, field in moved.fields().items():
        assert field.device.type == "meta"
        assert (field.shape, field.dtype) == (params.fields()[name].shape, params.fields()[name].dtype)


@pytest.mark.parametrize("strategy", ["", "none"])
def test_no_strategy_is_the_identity(generator, strategy):
    params = augment.sample(strategy, 4, 8, generator=generator)
    identity = AugmentParams.identity(4)
    assert all(
        torch.equal(a, b) for a, b in zip(params.fields().values(), identity.fields().values(), strict=True)
    )


@pytest.mark.parametrize("mode", ["single", "each", "all"])
def test_rows_from_several_generators_are_those_from_each(mode):
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(3)]

    together = (
        augment.sample_each(augment.DSA, 5, (12, 9), generators=generators(), mode=mode),
        at_once.draw(tuple(PARTS), 5, (12, 9), generators(), mode),
    )
    alone = (
        [augment.sample(augment.DSA, 5, (12, 9), generator=random, mode=mode) for random in generators()],
        [at_once.draw(tuple(PARTS), 5, (12, 9), [random], mode) for random in generators()],
    )
    assert len(at_once.draw(tuple(PARTS), 0, (12, 9), generators(), mode)) == 0
    for params, each in zip(together, alone, strict=True):
        for name, field in params.fields().items():
            assert torch.equal(field, torch.cat([drawn.fields()[name] for drawn in each]))
            assert field.is_contiguous()


def test_a_part_is_drawn_for_all_rows_unless_told_otherwise():
    one, other = (
        sample(augment.DSA, 64, 16, **{name: value})
        for sample, name, value in (
            (augment.sample, "generator", torch.Generator().manual_seed(0)),
            (augment.sample_each, "generators", [torch.Generator().manual_seed(0)]),
        )
    )
    for name, field in one.fields().items():
        assert torch.equal(field, other.fields()[name])
