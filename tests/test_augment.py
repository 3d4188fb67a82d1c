import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st

from mim4dd import augment, extension
from mim4dd.augment import AugmentParams
from mim4dd.augment_reference import resample

BACKENDS = ["reference", "fused"]
SHAPES = ["1x28x28", "3x32x32"]
PARTS = augment.DSA.split("_")


def params_with(batch: int, **fields: torch.Tensor) -> AugmentParams:
    return dataclasses.replace(AugmentParams.identity(batch), **fields)


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


def random_params(batch: int, size: tuple[int, int], seed: int = 0) -> AugmentParams:
    return augment.sample(augment.DSA, batch, size, generator=torch.Generator().manual_seed(seed), mode="all")


@pytest.mark.parametrize(
    ("strategy", "align_corners", "backend"),
    [
        *((part, True, "fused") for part in PARTS),
        *((augment.DSA, align, backend) for align in (True, False) for backend in BACKENDS),
    ],
)
def test_gradients_once_and_twice(generator, backend, align_corners, strategy):
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    params = augment.sample(strategy, 2, (3, 4), generator=generator, mode="all")

    def function(x):
        return augment.apply(x, params, align_corners=align_corners, backend=backend)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(lambda x: function(x) ** 2, x)


def non_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": non_contiguous,
    "sliced": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 1))[:, :, 1:-1, 1:-2],
}
# One rounding of the result, and of the gradient, may come out differently.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
}


@given(
    batch=st.integers(0, 5),
    channels=st.sampled_from([1, 3, 7]),
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)) | st.just((65, 33)),
    dtype=st.sampled_from(list(TOLERANCES)),
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
    for compiled, reference in zip(results[1], results[0], strict=True):
        assert compiled.dtype == reference.dtype == dtype
        torch.testing.assert_close(compiled, reference, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


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
def test_gradient_goes_through_normalisation(generator, backend):
    x = torch.rand(2, 3, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    params = random_params(2, (4, 4))
    assert torch.autograd.gradcheck(
        lambda x: augment.apply(x, params, mean=mean, std=std, backend=backend), x
    )


@pytest.mark.parametrize("adjoint", [False, True])
def test_compiled_op_is_well_registered(generator, adjoint):
    x = torch.randn(2, 3, 4, 5, generator=generator, requires_grad=True)
    fields = list(vars(random_params(3, (4, 5))).values())
    mean, std = torch.rand(3, generator=generator), torch.ones(3)
    for rows, m, s in ((torch.tensor([2, 0]), mean, std), (None, None, None)):
        chosen = fields if rows is not None else [field[:2] for field in fields]
        torch.library.opcheck(torch.ops.mim4dd.augment, (x, chosen, rows, m, s, True, adjoint))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(generator, compiler):
    if compiler == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    x = torch.randn(3, 3, 8, 8, generator=generator, requires_grad=True)
    params, rows = random_params(2, (8, 8)), torch.tensor([0, 1, 1])

    def function(x):
        return augment.apply(x * 2, params, rows=rows).relu()

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    upstream = torch.randn(x.shape, generator=generator)
    torch.testing.assert_close(compiled(x), function(x))
    (actual,), (expected,) = (torch.autograd.grad(f(x), x, upstream) for f in (compiled, function))
    torch.testing.assert_close(actual, expected)


def test_threads_do_not_change_a_bit(generator):
    x = torch.randn(64, 3, 32, 32, generator=generator, requires_grad=True)
    upstream = torch.randn(x.shape, generator=generator)
    params = random_params(64, (32, 32))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y = augment.apply(x, params, backend="fused")
            results.append((y, *torch.autograd.grad(y, x, upstream)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_gradient_is_the_adjoint_for_hostile_parameters(generator):
    """<A x, g> = <x, A' g>, whatever the parameters; a plane never lets anything outside the image in."""
    x, g = (torch.randn(6, 3, 7, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    extreme = torch.tensor([0.0, -1.0, 1e-30, 1e30, -40.0, 1.0])
    far = torch.tensor([2**62, -(2**62), 40, -40, 0, 3])
    params = dataclasses.replace(
        random_params(6, (7, 9)),
        brightness=torch.zeros(6),
        scale_x=extreme,
        scale_y=extreme.flip(0),
        degrees=extreme * 7,
        shift_y=far,
        shift_x=far.flip(0),
        cutout=torch.stack([far, far.flip(0), far.flip(0), far], 1),
    )
    x.requires_grad_()
    y = augment.apply(x, params, backend="fused")
    assert y.isfinite().all()
    (adjoint,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close((y * g).sum(), (x * adjoint).sum())


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


def test_single_mode_draws_one_part_per_call(generator):
    identity = vars(AugmentParams.identity(32))
    changed_by = {
        "color": {"brightness", "saturation", "contrast"},
        "crop": {"shift_y", "shift_x"},
        "cutout": {"cutout"},
        "flip": {"flip"},
        "scale": {"scale_x", "scale_y"},
        "rotate": {"degrees"},
    }
    seen = set()
    for _ in range(100):
        params = augment.sample(augment.DSA, 32, 16, generator=generator)
        changed = {name for name, value in vars(params).items() if not torch.equal(value, identity[name])}
        assert changed in changed_by.values()
        seen.add(next(part for part, fields in changed_by.items() if fields == changed))
    assert seen == set(PARTS)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (9, 32)])
def test_parameters_stay_in_the_published_ranges(size):
    params = random_params(4000, size)
    height, width = size
    assert params.brightness.abs().max() <= 0.5
    assert params.saturation.min() >= 0
    assert params.saturation.max() < 2
    assert params.contrast.min() >= 0.5
    assert params.contrast.max() < 1.5
    assert params.shift_y.unique().tolist() == list(range(-reach(height), reach(height) + 1))
    assert params.shift_x.unique().tolist() == list(range(-reach(width), reach(width) + 1))
    assert params.scale_x.min() >= 1 / 1.2 - 1e-6
    assert params.scale_y.max() < 1.2
    assert not torch.equal(params.scale_x, params.scale_y)
    assert 14 < params.degrees.abs().max() <= 15
    assert 0.4 < params.flip.float().mean() < 0.6
    y0, y1, x0, x1 = params.cutout.T
    for low, high, side in ((y0, y1, height), (x0, x1, width)):
        box = int(side * 0.5 + 0.5)
        assert (high - low + 1 == box).all()
        low, high = low.clamp_min(0), high.clamp_max(side - 1)  # of what lies in the image
        assert low.min() == 0
        assert high.max() == side - 1
        assert (high - low + 1).max() == box
        assert (high - low + 1).min() == box // 2 if box % 2 == 0 else math.ceil(box / 2)


def reach(side: int) -> int:
    return int(side * 0.125 + 0.5)


def test_siamese_rows_are_one_row_repeated(generator):
    params = augment.sample(augment.DSA, 5, 16, generator=generator, siamese=True, mode="all")
    assert len(params) == 5
    for field in vars(params).values():
        assert (field == field[:1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_can_be_spread_over_images(generator, backend):
    per_class = random_params(3, (8, 8))
    labels = torch.tensor([2, 0, 1, 2])
    x = torch.randn(4, 1, 8, 8, generator=generator)
    together = augment.apply(x, per_class, rows=labels, backend=backend)
    alone = [augment.apply(x[i : i + 1], per_class[labels[i : i + 1]], backend=backend) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_same_seed_same_parameters():
    first, second, other = (random_params(8, (16, 16), seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))
    assert not torch.equal(first.brightness, other.brightness)


@pytest.mark.parametrize("strategy", ["", "none"])
def test_no_strategy_is_the_identity(generator, strategy):
    params = augment.sample(strategy, 4, 8, generator=generator)
    identity = AugmentParams.identity(4)
    assert all(torch.equal(a, b) for a, b in zip(vars(params).values(), vars(identity).values(), strict=True))


def test_bad_input_is_named(generator):
    x, params = torch.zeros(2, 1, 8, 8), AugmentParams.identity(2)
    with pytest.raises(ValueError, match="unknown part 'shear'"):
        augment.sample("color_shear", 2, 8, generator=generator)
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


def test_documented_example_runs():
    text = (Path(__file__).parent.parent / "docs/augmentation.md").read_text()
    names: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["y"].requires_grad
    assert names["real"].dtype == torch.float32
