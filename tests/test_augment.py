import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from conftest import close, params_with, random_params
from hypothesis import given, settings
from hypothesis import strategies as st

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


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_inside_torch_func(generator, backend):
    """Once, twice, after `vjp` is over, and where the images are constants or parameters are drawn inside."""
    x, upstream = (torch.randn(3, 2, 4, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    mean, std = torch.tensor([0.4, 0.5]), torch.tensor([0.2, 0.3])
    seed = generator.get_state()

    def function(x):
        params = augment.sample(augment.DSA, 3, (4, 5), generator=generator.set_state(seed), mode="all")
        return augment.apply(x, params, mean=mean, std=std, backend=backend)

    def total(x):
        return function(x).pow(3).sum()

    def of_gradient(gradient):
        return lambda x: gradient(x).square().sum()

    def by_autograd(x):
        return torch.autograd.grad(total(x), x, create_graph=True)[0]

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(total)(x), by_autograd(leaf))
    torch.testing.assert_close(
        torch.func.grad(of_gradient(torch.func.grad(total)))(x),
        torch.autograd.grad(of_gradient(by_autograd)(leaf), leaf)[0],
    )
    expected = torch.autograd.grad(function(leaf), leaf, upstream)
    y, pull = torch.func.vjp(function, x)
    torch.testing.assert_close(pull(upstream), expected)
    upstream.requires_grad_()
    (twice,) = torch.autograd.grad(pull(upstream)[0].square().sum(), upstream)
    again = torch.autograd.grad(function(leaf), leaf, upstream, create_graph=True)[0].square().sum()
    torch.testing.assert_close(twice, torch.autograd.grad(again, upstream)[0])
    torch.testing.assert_close(torch.func.grad(lambda weight: (function(x) * weight).sum())(upstream), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_made_in_inference_mode_serves_training(generator, backend):
    x = torch.rand(2, 3, 6, 6, generator=generator, dtype=torch.float64, requires_grad=True)

    def arguments():
        mean, std, rows = torch.full((3,), 0.5), torch.full((3,), 0.25), torch.tensor([2, 0])
        return {"params": random_params(3, (6, 6)), "rows": rows, "mean": mean, "std": std}

    def gradients(given):
        total = augment.apply(x, **given, backend=backend).pow(3).sum()
        (once,) = torch.autograd.grad(total, x, create_graph=True)
        return once, *torch.autograd.grad(once.square().sum(), x)

    plain = arguments()
    with torch.inference_mode():
        made = arguments()
    for name in plain:
        torch.testing.assert_close(gradients({**plain, name: made[name]}), gradients(plain))


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
