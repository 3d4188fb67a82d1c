"""What `augment.apply` and its op refuse, and how they say it."""

import math

import pytest
import torch
from conftest import params_with

from mim4dd import augment, extension
from mim4dd.augment import AugmentParams

BACKENDS = ["reference", "fused"]


def test_bad_input_is_named(generator):
    x, params = torch.zeros(2, 1, 8, 8), AugmentParams.identity(2)
    with pytest.raises(ValueError, match="unknown part 'shear'"):
        augment.sample("color_shear", 2, 8, generator=generator)
    with pytest.raises(ValueError, match="strategy 'flip_crop_flip' has a part twice"):
        augment.sample("flip_crop_flip", 2, 8, generator=generator)
    with pytest.raises(ValueError, match="mode is 'both'"):
        augment.sample("color", 2, 8, generator=generator, mode="both")
    with pytest.raises(ValueError, match="strategy is None, expected some of color"):
        augment.sample(None, 2, 8, generator=generator)
    for size in (16.0, (3, 16, 16), 0, None):
        with pytest.raises(ValueError, match=r"image_size is .*, expected \(height, width\) or one side"):
            augment.sample("color", 2, size, generator=generator)
    for not_one in (None, 0):
        with pytest.raises(ValueError, match=f"generator is {not_one}, expected a torch.Generator"):
            augment.sample("color", 2, 8, generator=not_one)
        with pytest.raises(ValueError, match=f"generator is {not_one}, expected a torch.Generator"):
            augment.pad_and_crop(2, 1, generator=not_one)
    for match, images, bad_params, options in (
        (r"images is \[1, 8, 8\]", x[0], params, {}),
        ("torch.int32, expected .* torch.uint8", x.int(), params, {}),
        (r"images is \[2, 0, 8, 8\], expected sizes from 1", x[:, :0], params, {}),
        (r"params.flip is \[3\], expected \[2\]", x, params_with(2, flip=torch.zeros(3).bool()), {}),
        ("params.shift_x is of torch.float32", x, params_with(2, shift_x=torch.zeros(2)), {}),
        ("params.degrees is on meta", x, params_with(2, degrees=torch.zeros(2, device="meta")), {}),
        ("backend is 'gpu'", x, params, {"backend": "gpu"}),
        (r"rows is \[2\] of torch.float32, expected integers", x, params, {"rows": torch.zeros(2)}),
        (r"rows is \[3\] of torch.int64", x, params, {"rows": torch.zeros(3, dtype=torch.int64)}),
        ("mean and std are given together", x, params, {"mean": torch.zeros(1)}),
        (r"std is \[3\]", x, params, {"mean": torch.zeros(1), "std": torch.ones(3)}),
        (
            "mean is .* of torch.int64, expected floats",
            x,
            params,
            {"mean": torch.tensor([1]), "std": x[0, 0]},
        ),
        ("images is of type ndarray, expected a tensor", x.numpy(), params, {}),
        ("params is None, expected AugmentParams", x, None, {}),
        ("params is of type dict, expected AugmentParams", x, params.fields(), {}),
        ("params.flip is of type list, expected a tensor", x, params_with(2, flip=[True, False]), {}),
        ("params.degrees is None, expected a tensor", x, params_with(2, degrees=None), {}),
        ("rows is of type list, expected a tensor", x, params, {"rows": [0, 1]}),
        ("mean is of type tuple, expected a tensor", x, params, {"mean": (0.5,), "std": torch.ones(1)}),
    ):
        with pytest.raises(ValueError, match=match):
            augment.apply(images, bad_params, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_values_are_named_on_the_cpu(backend):
    x, params = torch.zeros(2, 1, 8, 8), AugmentParams.identity(2)
    for name in ("brightness", "saturation", "contrast", "scale_x", "scale_y", "degrees"):
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match=f"augment.apply: params.{name} is not finite"):
                augment.apply(x, params_with(2, **{name: torch.tensor([1.0, value])}), backend=backend)
    for std in (torch.tensor([0.0]), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match=r"augment.apply: std is .*, expected a positive number"):
            augment.apply(x, params, mean=torch.zeros(1), std=std, backend=backend)
    for row in (-1, 2, 2**40):
        with pytest.raises(ValueError, match=r"augment.apply: rows.* expected 0 to 1"):
            augment.apply(x, params, rows=torch.tensor([0, row]), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_images_have_a_gradient(backend):
    """Nobody's is dropped in silence, nor inside torch.func."""
    x, params = torch.rand(2, 1, 8, 8), AugmentParams.identity(2)

    def total(name, value):
        chosen = {"mean": torch.zeros(1), "std": torch.ones(1)} | (
            {name: value} if name in "mean std" else {}
        )
        of = params_with(2, **({name: value} if name in params.fields() else {}))
        return augment.apply(x, of, **chosen, backend=backend).sum()

    for name in ("brightness", "saturation", "contrast", "scale_x", "scale_y", "degrees", "mean", "std"):
        value = torch.ones(1 if name in "mean std" else 2, requires_grad=True)
        match = f"{name} requires a gradient, which augment.apply does not give; detach it"
        with pytest.raises(ValueError, match=match):
            total(name, value)
        with pytest.raises(ValueError, match=match):
            torch.func.grad(lambda value, name=name: total(name, value))(value.detach())
        with torch.no_grad():
            total(name, value)


def test_op_called_directly_checks_for_itself():
    x, fields = torch.zeros(2, 3, 8, 8), list(vars(AugmentParams.identity(2)).values())

    def call(images=x, fields=fields, rows=None, mean=None, std=None, adjoint=False):
        return torch.ops.mim4dd.augment(images, fields, rows, mean, std, True, adjoint)

    for match, arguments in (
        ("images must be", {"images": x[0]}),
        ("images has a size", {"images": x[:, :, :0]}),
        ("images is of an unsupported dtype", {"images": x.int()}),
        ("images of bytes have no gradient", {"images": x.byte(), "adjoint": True}),
        ("params has 9 fields", {"fields": fields[1:]}),
        ("params has 1 rows for 2 images", {"fields": [field[:1] for field in fields]}),
        ("params.saturation must hold a number", {"fields": [fields[0], fields[1][:1], *fields[2:]]}),
        ("params.brightness must be of float32 or float64", {"fields": [fields[0].half(), *fields[1:]]}),
        ("params.shift_y must be of int32 or int64", {"fields": [*fields[:3], fields[0], *fields[4:]]}),
        ("params.flip must be of bool", {"fields": [*fields[:6], fields[3], *fields[7:]]}),
        ("rows must be int64", {"rows": torch.zeros(3, dtype=torch.int64)}),
        ("mean and std", {"mean": torch.zeros(3)}),
        ("mean must be", {"mean": torch.zeros(1), "std": torch.ones(3)}),
    ):
        with pytest.raises(ValueError, match=match):
            call(**arguments)


def test_fused_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(extension, "_C", None)
    with pytest.raises(RuntimeError, match="not built"):
        augment.apply(torch.zeros(1, 1, 8, 8), AugmentParams.identity(1), backend="fused")
    augment.apply(torch.zeros(1, 1, 8, 8), AugmentParams.identity(1))


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_too_large_images_and_too_few_rows_are_named(backend):
    one = AugmentParams.identity(1)
    with pytest.raises(ValueError, match="from 1 to 16384"):
        augment.apply(torch.zeros(1).expand(1, 1, 1, 16385), one, backend=backend)
    with pytest.raises(ValueError, match=r"rows is \[1\] of torch.int64, expected integers \[2\]"):
        augment.apply(torch.zeros(2, 1, 4, 4), one, rows=torch.tensor([0]), backend=backend)
