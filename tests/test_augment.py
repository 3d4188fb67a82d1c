import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import close, params_with, random_params
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import IMAGE_TOLERANCE, same_on_any_threads

from mim4dd import augment
from mim4dd.augment import AugmentParams
from mim4dd.augment.reference import resample

BACKENDS = ["reference", "fused"]
SHAPES = ["1x28x28", "3x32x32"]
PARTS = augment.DSA.split("_")


def golden_params(case: str, golden: dict[str, torch.Tensor]) -> AugmentParams:
    """Translate the golden file's parameters of one op."""
    op = case.split("_")[0]
    given = {key.split(".")[1]: value for key, value in golden.items() if key.startswith(f"{case}.")}
    fields = {
        "brightness": lambda: {"brightness": given["shift"]},
        "saturation": lambda: {"saturation": given["factor"]},
        "contrast": lambda: {"contrast": given["factor"]},
        "color": lambda: {
            "brightness": given["shift"],
            "saturation": given["saturation"],
            "contrast": given["contrast"],
        },
        "crop": lambda: {"shift_y": given["dy"], "shift_x": given["dx"]},
        "cutout": lambda: {"cutout": torch.stack([given[edge] for edge in ("y0", "y1", "x0", "x1")], 1)},
        "flip": lambda: {"flip": given["flip"]},
        "scale": lambda: {"scale_x": given["sx"], "scale_y": given["sy"]},
        "rotate": lambda: {"degrees": given["degrees"]},
    }[op]()
    return params_with(6, **fields)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "case",
    [
        *("brightness", "saturation", "contrast", "color", "crop", "cutout", "flip"),
        *("scale_align", "scale_noalign", "rotate_align", "rotate_noalign"),
    ],
)
def test_every_op_equals_the_published_one(golden, shape, case, backend):
    file = golden(f"augment_{shape}")
    y = augment.apply(
        file["x"], golden_params(case, file), align_corners=not case.endswith("_noalign"), backend=backend
    )
    close(y, file[f"{case}.y"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_colour_gradient_equals_the_published_one(golden, shape, backend):
    file = golden(f"augment_{shape}")
    x = file["x"].requires_grad_()
    y = augment.apply(x, golden_params("color", file), backend=backend)
    (gradient,) = torch.autograd.grad(y, x, file["color.grad_y"])
    close(gradient, file["color.grad_x"])


def non_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": non_contiguous,
    "sliced": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 1))[:, :, 1:-1, 1:-2],
}


@given(
    batch=st.integers(0, 5),
    channels=st.sampled_from([1, 3, 7]),
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)) | st.just((65, 33)),
    dtype=st.sampled_from(list(IMAGE_TOLERANCE)),
    layout=st.sampled_from(list(LAYOUTS)),
    strategy=st.sampled_from([*PARTS, "crop_flip", augment.DSA]),
    align_corners=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_compiled_equals_reference(batch, channels, size, dtype, layout, strategy, align_corners, seed):
    generator = torch.Generator().manual_seed(seed)
    x, upstream = (torch.randn(batch, channels, *size, generator=generator).to(dtype) for _ in range(2))
    params = augment.sample(strategy, batch, size, generator=generator, mode="all")
    results = []
    for backend in BACKENDS:
        leaf = LAYOUTS[layout](x).requires_grad_()
        y = augment.apply(leaf, params, align_corners=align_corners, backend=backend)
        results.append((y, *torch.autograd.grad(y, leaf, LAYOUTS[layout](upstream))))
    tolerance = IMAGE_TOLERANCE[dtype]
    for compiled, reference in zip(results[1], results[0], strict=True):
        assert compiled.dtype == reference.dtype == dtype
        torch.testing.assert_close(compiled, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_are_normalised_on_the_way_in(generator, backend):
    bytes_ = torch.randint(0, 256, (5, 3, 9, 8), dtype=torch.uint8, generator=generator)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    params, rows = random_params(2, (9, 8)), torch.tensor([1, 0, 0, 1, 1])
    floats = (bytes_ / 255 - mean[:, None, None]) / std[:, None, None]
    expected = augment.apply(floats, params[rows], backend="reference")
    for layout in (torch.contiguous_format, torch.channels_last):
        stored = bytes_.contiguous(memory_format=layout)
        y = augment.apply(stored, params, rows=rows, mean=mean, std=std, backend=backend)
        assert y.is_contiguous(memory_format=layout) or backend == "reference"
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    unit = augment.apply(bytes_, params, rows=rows, backend=backend)
    torch.testing.assert_close(unit, augment.apply(bytes_ / 255, params[rows], backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_any_integers_and_statistics_of_any_floats(generator, backend):
    x = torch.rand(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    params, rows = random_params(2, (4, 4)), torch.tensor([1, 0])
    mean, std = torch.tensor([0.5, 0.25, 0.75]), torch.tensor([0.25, 0.5, 0.125])
    expected = augment.apply(x, params, rows=rows, mean=mean, std=std, backend=backend)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        y = augment.apply(x, params, rows=rows.to(dtype), mean=mean, std=std, backend=backend)
        assert torch.equal(y, expected)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        y = augment.apply(x, params, rows=rows, mean=mean.to(dtype), std=std.to(dtype), backend=backend)
        assert torch.equal(y, expected)
    strided = mean.repeat_interleave(2)[::2]
    y = augment.apply(x, params, rows=rows, mean=strided, std=std, backend=backend)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_goes_through_normalisation(generator, backend):
    x = torch.rand(2, 3, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    params = random_params(2, (4, 4))
    assert torch.autograd.gradcheck(
        lambda x: augment.apply(x, params, mean=mean, std=std, backend=backend), x
    )


def test_threads_do_not_change_a_bit(generator):
    x = torch.randn(64, 3, 32, 32, generator=generator, requires_grad=True)
    upstream = torch.randn(x.shape, generator=generator)
    params = random_params(64, (32, 32))

    def augmented():
        y = augment.apply(x, params, backend="fused")
        return (y, *torch.autograd.grad(y, x, upstream))

    same_on_any_threads(augmented)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pad_and_crop_is_the_usual_random_crop(generator, backend):
    x = torch.randn(20, 2, 6, 5, generator=generator)
    params = augment.pad_and_crop(20, 2, generator=generator)
    y = augment.apply(x, params, backend=backend)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    for i, (dy, dx) in enumerate(zip(params.shift_y + 2, params.shift_x + 2, strict=True)):
        torch.testing.assert_close(y[i], padded[i, :, dy : dy + 6, dx : dx + 5])
    assert set(params.shift_y.tolist()) == set(params.shift_x.tolist()) == set(range(-2, 3))
    with pytest.raises(ValueError, match="padding is -1"):
        augment.pad_and_crop(1, -1, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
def test_identity_changes_nothing_bit_for_bit(generator, backend):
    x = torch.randn(3, 3, 9, 12, generator=generator)
    close(augment.apply(x, AugmentParams.identity(3), backend=backend), x, tolerance=1e-6)
    assert torch.equal(resample(x, AugmentParams.identity(3), True), x)
    assert torch.equal(augment.apply(x, AugmentParams.identity(3), backend="fused"), x)


def test_shift_and_flip_are_exact(generator):
    x = torch.randn(1, 2, 6, 6, generator=generator)
    shift = params_with(1, shift_y=torch.tensor([2]), shift_x=torch.tensor([-1]))
    flip = params_with(1, flip=torch.tensor([True]))
    for move in (
        lambda params: resample(x, params, True),
        lambda params: augment.apply(x, params, backend="fused"),
    ):
        shifted = move(shift)
        assert torch.equal(shifted[:, :, :4, 1:], x[:, :, 2:, :5])
        assert not shifted[:, :, 4:].any()
        assert not shifted[:, :, :, 0].any()
        assert torch.equal(move(flip), x.flip(3))


def test_all_parts_compose_as_shift_after_flip_after_scale_after_rotate(generator):
    """A quarter turn, a flip and a shift of one pixel, followed by hand."""
    x = torch.randn(1, 1, 8, 8, generator=generator, dtype=torch.float64)
    params = params_with(
        1,
        degrees=torch.tensor([90.0]),
        flip=torch.tensor([True]),
        shift_x=torch.tensor([1]),
        cutout=torch.tensor([[0, 1, 2, 3]]),
    )
    by_hand = torch.zeros_like(x)
    by_hand[..., :7] = x[..., 1:]  # shifted
    by_hand = by_hand.flip(3).rot90(1, (2, 3))
    by_hand[..., 0:2, 2:4] = 0
    close(augment.apply(x, params), by_hand, tolerance=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_can_be_spread_over_images(generator, backend):
    per_class = random_params(3, (8, 8))
    labels = torch.tensor([2, 0, 1, 2])
    x = torch.randn(4, 1, 8, 8, generator=generator)
    together = augment.apply(x, per_class, rows=labels, backend=backend)
    alone = [augment.apply(x[i : i + 1], per_class[labels[i : i + 1]], backend=backend) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_documented_example_runs():
    text = (Path(__file__).parent.parent / "docs/augmentation.md").read_text()
    names: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["y"].requires_grad
    assert names["real"].dtype == torch.float32


def test_corners_are_aligned_unless_told_otherwise(generator):
    x, params = torch.randn(1, 1, 5, 9, generator=generator), params_with(1, degrees=torch.tensor([15.0]))
    assert torch.equal(augment.apply(x, params), augment.apply(x, params, align_corners=True))
    assert not torch.equal(augment.apply(x, params), augment.apply(x, params, align_corners=False))


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_parameters_and_rows_of_any_dtype_and_stride(generator, backend):
    x, params = torch.randn(3, 2, 8, 8, generator=generator), random_params(3, (8, 8))
    expected = augment.apply(x, params, backend="reference")
    strided = params.map(lambda field: torch.stack([field, field.flip(0)], -1)[..., 0])
    assert not any(field.is_contiguous() for field in strided.fields().values())
    wide = params.map(lambda field: field.double() if field.is_floating_point() else field)
    narrow = params.map(lambda field: field.int() if field.dtype == torch.int64 else field)
    for other in (strided, wide, narrow):
        torch.testing.assert_close(augment.apply(x, other, backend=backend), expected, rtol=1e-4, atol=1e-4)
    rows = torch.tensor([2, 0, 0, 1, 1, 2])[::2]
    found = augment.apply(x, params, rows=rows, backend=backend)
    torch.testing.assert_close(
        found, augment.apply(x, params[rows], backend="reference"), rtol=1e-4, atol=1e-4
    )
    alike = augment.sample(augment.DSA, 3, 8, generator=generator, siamese=True, mode="all")
    torch.testing.assert_close(
        augment.apply(x, alike, backend=backend),
        augment.apply(x, alike.map(torch.Tensor.contiguous), backend="reference"),
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_reference_takes_hostile_parameters_as_the_op_does(generator):
    x = torch.randn(6, 3, 7, 9, generator=generator, dtype=torch.float64)
    extreme = torch.tensor([0.0, -1.0, 1e-30, 1e30, -40.0, 1.0])
    far = torch.tensor([2**62, -(2**62), 40, -40, 0, 3])
    params = dataclasses.replace(
        random_params(6, (7, 9)), scale_x=extreme, scale_y=extreme.flip(0), shift_y=far, shift_x=far.flip(0)
    )
    found = augment.apply(x, params, backend="reference")
    torch.testing.assert_close(found, augment.apply(x, params, backend="fused"))
