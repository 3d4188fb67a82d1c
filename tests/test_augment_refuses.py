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
    for match, images, bad_params, options in (
        (r"images is \[1, 8, 8\]", x[0], params, {}),
        ("torch.int32, expected .* torch.uint8", x.int(), params, {}),
        (r"images is \[2, 0, 8, 8\], expected sizes from 1", x[:, :0], params, {}),
        (r"params.flip is \[3\], expected \[2\]", x, params_with(2, flip=torch.zeros(3).bool()), {}),
        ("params.shift_x is of torch.float32", x, params_with(2, shift_x=torch.zeros(2)), {}),
        ("params.degrees is on meta", x, params_with(2, degrees=torch.zeros(2, device="meta")), {}),
        ("backend is 'gpu'", x, params, {"backend": "gpu"}),
        ("rows is .* of torch.int32", x, params, {"rows": torch.zeros(2, dtype=torch.int32)}),
        ("mean and std are given together", x, params, {"mean": torch.zeros(1)}),
        (r"std is \[3\]", x, params, {"mean": torch.zeros(1), "std": torch.ones(3)}),
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
    for row in (-1, 2, 2**40):
        with pytest.raises(ValueError, match=r"augment.apply: rows.* expected 0 to 1"):
            augment.apply(x, params, rows=torch.tensor([0, row]), backend=backend)


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
